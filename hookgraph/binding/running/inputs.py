"""Token ids, keyword arguments or text -> keyword arguments of the model."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from hookgraph.binding.running.recalling import Lent, Remembered, Retained, lent
from hookgraph.errors import InputError, nearest
from hookgraph.graph.abstract import Inputs, OfExamples
from hookgraph.graph.examples import changed, changed_rows, count_examples, rows_axis

_ROWS: Final = ("input_ids", "inputs_embeds")
"""The arguments that have a row per example, whatever others have."""

_FEATURES: Final = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
"""The arguments by which pictures and sounds are given."""

_SLIP: Final = 0.8
"""How alike two names are of which one is taken for a slip of the other."""


@final
@dataclass(frozen=True, slots=True)
class Accepted:
    """The keyword arguments that a model knows.

    Args:
        names: those of its signature.
        more: whether it takes others as well, to hand them on.
        first_position: the number of the first position.
        known: whether it is a model of transformers itself, where labels make a loss and nothing else.
        ids: how many axes token ids have: a third one where several are read at each position.
    """

    names: frozenset[str]
    more: bool
    first_position: int = 0
    known: bool = False
    ids: int = 2

    @staticmethod
    def by(model: PreTrainedModel, example: Mapping[str, Any] | None = None) -> "Accepted":
        """What a model's `forward` says, and what it was run on."""
        parameters = inspect.signature(model.forward).parameters.values()
        open_ended = [p.name for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        names = frozenset(p.name for p in parameters) - frozenset(open_ended)
        more = any(p.kind is p.VAR_KEYWORD for p in parameters)
        known = type(model).__module__.startswith("transformers.")
        shown = (example or {}).get("input_ids")
        axes = max(2, shown.ndim) if isinstance(shown, Tensor) else 2
        return Accepted(names, more, _first_position(model), known, axes)

    def check(self, arguments: Iterable[str]) -> None:
        """Refuse what the model does not know, or, if it hands others on, what is nearly a name it knows.

        Raises:
            InputError: naming the argument and those near to it.
        """
        for name in arguments:
            if name in self.names or (self.more and not self._slip(name)):
                continue
            raise InputError(f"the model takes no argument {name!r}: {nearest(name, self.names)}")

    def unfed(self, example: Iterable[str]) -> str:
        """What to bind a model with, if the example leaves out pictures or sounds that it takes; or empty."""
        given = sorted(example)
        left = [name for name in _FEATURES if name in self.names and name not in given]
        if not left:
            return ""
        return (
            f": it was bound on {' and '.join(given)} alone, and takes {' and '.join(left)} too: "
            "bind(model, example=...) with what its processor makes of text together with these"
        )

    def _slip(self, name: str) -> bool:
        """Whether a name is nearly a known one; with a word more or less, it is one of its own."""
        words = name.count("_")
        return bool(get_close_matches(name, [x for x in self.names if x.count("_") == words], 1, _SLIP))


def prepare(
    inputs: Inputs,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    accepted: Accepted,
    vocabulary: int,
    device: torch.device,
    copies: int,
) -> dict[str, Any]:
    """Keyword arguments of a model, on a device, the whole batch repeated `copies` times.

    Where the attention mask shows padding on the left, position ids are derived from it. A cache is read, and
    not written to: each pass is given a copy.

    Args:
        inputs: what to run.
        tokenizer: what makes token ids of text, if there is one.
        accepted: the keyword arguments that the model knows.
        vocabulary: how many tokens the model embeds.
        device: where the model is.
        copies: how often the batch is repeated.

    Raises:
        InputError: the inputs cannot be run, with the reason.
    """
    arguments: dict[str, Any] = dict(_arguments(tokenizer, inputs))
    if not arguments:
        raise InputError("there is nothing to run: the inputs are empty; give token ids, as input_ids")
    accepted.check(arguments)
    # The tokens come first: their rows are the examples, where positions may be given once for all.
    names = sorted(arguments, key=lambda name: name not in _ROWS)
    count = count_examples(arguments) or 0
    held = {k: lent(v, count) if isinstance(v := arguments[k], Cache) else v for k in names}
    arguments = changed(held, partial(_moved, device))
    if accepted.known and ("decoder_input_ids" in arguments or "decoder_input_ids" not in accepted.names):
        arguments.pop("labels", None)  # they make a loss, of all logits, which nothing here reads
    ids = arguments.get("input_ids")
    if isinstance(ids, Tensor):
        _check_ids(ids, vocabulary, accepted.ids)
    _give_each_its_positions(arguments)
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask[:, 0].all()):
        mask = None
    if mask is not None and "position_ids" in accepted.names and "position_ids" not in arguments:
        columns = torch.arange(mask.shape[1], device=mask.device)
        numbers = (columns - (mask != 0).int().argmax(1, keepdim=True)).clamp(min=0) + accepted.first_position
        arguments["position_ids"] = numbers if ids is None else numbers[:, -ids.shape[1] :]  # behind a cache
    if "use_cache" in accepted.names:  # some ignore the cache that they are given, unless they may add to it
        arguments.setdefault("use_cache", any(isinstance(v, OfExamples) for v in arguments.values()))
    return arguments if copies == 1 else _repeated(arguments, copies)


def _moved(device: torch.device, value: object) -> object:
    return value.to(device) if isinstance(value, Tensor) else value


def _give_each_its_positions(arguments: dict[str, Any]) -> None:
    """Positions given once for all examples become those of each: the batch may be repeated and joined."""
    positions, rows = arguments.get("position_ids"), count_examples(arguments)
    if not isinstance(positions, Tensor) or positions.ndim not in (2, 3) or not rows:
        return
    if positions.shape[-2] == 1 and rows_axis("position_ids", positions, rows) is None:
        arguments["position_ids"] = positions.expand(*positions.shape[:-2], rows, -1)


def _first_position(model: PreTrainedModel) -> int:
    """Where positions are counted from: behind the one for padding, if their embedding has one."""
    count = getattr(model.config, "max_position_embeddings", None)
    words = embedding_of(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not words and module.num_embeddings == count:
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def embedding_of(model: PreTrainedModel) -> nn.Module | None:
    """The module that embeds tokens; None where the model does not say."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs: where its weights are, or where they are brought for each pass."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    # accelerate keeps the weights elsewhere, and tells where it brings them.
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(place) for place in places if place is not None), torch.device("cpu"))


def vocabulary_size(model: PreTrainedModel, embedding: nn.Module | None) -> int:
    """How many tokens the embedding of a model has; a large number where neither of them says."""
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0]
    inner = [getattr(model.config, name, None) for name in getattr(model.config, "sub_configs", {}) or {}]
    sizes = [getattr(config, "vocab_size", None) for config in (model.config, *inner)]
    return next((size for size in sizes if isinstance(size, int) and size > 0), 1 << 31)


def _arguments(tokenizer: PreTrainedTokenizerBase | None, inputs: Inputs) -> Mapping[str, Any]:
    if isinstance(inputs, Tensor):
        return {"input_ids": inputs}
    if isinstance(inputs, Mapping):
        return inputs
    if isinstance(inputs, str) or (isinstance(inputs, list) and all(isinstance(x, str) for x in inputs)):
        if tokenizer is None:
            raise InputError("text needs a tokenizer: bind(model, tokenizer=...), or pass token ids")
        texts = [inputs] if isinstance(inputs, str) else inputs
        return tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
    raise InputError(
        f"cannot run {type(inputs).__name__}: pass token ids (a tensor), keyword arguments of the model "
        "(a dict or BatchEncoding), or text"
    )


def _check_ids(ids: Tensor, vocabulary: int, axes: int) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"token ids are integers, not {str(ids.dtype).removeprefix('torch.')}")
    if ids.ndim != axes:
        shape = ("batch", "pos", *["ids of each position"] * (axes - 2))
        raise InputError(f"token ids have shape ({', '.join(shape)}), not {tuple(ids.shape)}")
    if ids.numel() == 0:
        raise InputError(f"there are no tokens: token ids have shape {tuple(ids.shape)}")
    if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        span = f"{int(ids.min())} to {int(ids.max())}"
        raise InputError(f"token ids range from {span}, but the vocabulary has {vocabulary} tokens")


def _repeated(arguments: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """The arguments for `copies` batches one after the other."""
    again = partial(_repeated_rows, copies)
    return changed_rows(arguments, count_examples(arguments), again, partial(_repeated_cache, copies))


def _repeated_rows(copies: int, value: Tensor, axis: int) -> Tensor:
    return value.repeat(*(copies if i == axis else 1 for i in range(value.ndim)))


def _repeated_cache(copies: int, value: object) -> object:
    return value.repeated(copies) if isinstance(value, Remembered | Retained | Lent) else value
