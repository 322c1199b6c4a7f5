"""Token ids, keyword arguments or text -> keyword arguments of the model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hookgraph.errors import InputError
from hookgraph.graph.abstract import Inputs


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    accepted: frozenset[str],
    inputs: Inputs,
    copies: int,
) -> dict[str, Any]:
    """Keyword arguments of `model`, on its device, the whole batch repeated `copies` times.

    Where the attention mask shows padding on the left, position ids are derived from it.

    Raises:
        InputError: the inputs cannot be run, with the reason.
    """
    arguments = dict(_arguments(tokenizer, inputs))
    device = model.device
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    ids = arguments.get("input_ids")
    if isinstance(ids, Tensor):
        _check_ids(model, ids)
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask[:, 0].all()):
        mask = None
    if mask is not None and "position_ids" in accepted and "position_ids" not in arguments:
        arguments["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in accepted:
        arguments.setdefault("use_cache", False)
    return arguments if copies == 1 else _repeated(arguments, copies)


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens the model embeds; a large number where it does not say."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        weight = None
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0]
    return int(getattr(model.config, "vocab_size", None) or 1 << 31)


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


def _check_ids(model: PreTrainedModel, ids: Tensor) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"token ids are integers, not {str(ids.dtype).removeprefix('torch.')}")
    if ids.ndim != 2:
        raise InputError(f"token ids have shape (batch, pos), not {tuple(ids.shape)}")
    if ids.numel() == 0:
        raise InputError(f"there are no tokens: token ids have shape {tuple(ids.shape)}")
    vocabulary = vocabulary_size(model)
    if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        span = f"{int(ids.min())} to {int(ids.max())}"
        raise InputError(f"token ids range from {span}, but the vocabulary has {vocabulary} tokens")


def _repeated(arguments: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """The arguments for `copies` batches one after the other."""
    batch = next((v.shape[0] for v in arguments.values() if isinstance(v, Tensor)), 1)
    return {
        k: v.repeat(copies, *([1] * (v.ndim - 1))) if isinstance(v, Tensor) and v.shape[:1] == (batch,) else v
        for k, v in arguments.items()
    }
