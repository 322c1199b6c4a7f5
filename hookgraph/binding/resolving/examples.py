"""Inputs on which a model can be traced: a few tokens, a small picture, a little sound.

What a model is given is told by the names of its arguments; of what shape, by trying.
"""

import inspect
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hookgraph.binding.resolving.captions import captioned, stands_alone
from hookgraph.binding.resolving.making import MAKERS, Arguments, packed, token_ids
from hookgraph.binding.running.inputs import device_of
from hookgraph.errors import BindingError
from hookgraph.graph.pictures import packed_in


def example_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments for one forward pass, always the same ones: the first that the model can be run on.

    Raises:
        BindingError: it can be run on no tokens, picture or sound; give `example` to `bind`.
    """
    first: Exception | None = None
    for candidate in candidates(model):
        try:
            with torch.no_grad():
                model(**candidate)
                if stands_alone(model, candidate):
                    return candidate
        except Exception as error:  # whatever a model raises that is given what it was not made for
            first = first or error
    raise unrunnable(model, first) from first


def unrunnable(model: PreTrainedModel, error: Exception | None) -> BindingError:
    """What to raise for a model that runs on none of its examples; `error` is what the first one led to."""
    name = type(model).__name__
    if type(model).forward is PreTrainedModel.forward:
        inside = [n for n, part in model.named_children() if isinstance(part, PreTrainedModel)]
        bound = (
            f"the models inside it by themselves: {', '.join(inside)}" if inside else "a model that has one"
        )
        return BindingError(f"{name} has no forward pass: bind {bound}")
    if error is None:
        return BindingError(
            f"{name} takes none of {', '.join(MAKERS)}: give bind(model, example=...) keyword arguments on "
            "which it can be run"
        )
    return BindingError(
        f"{name} is not a transformer that hookgraph can bind: running it on the example failed with "
        f"{type(error).__name__}: {error}; if it needs other inputs, give bind(model, example=...)"
    )


def candidates(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Examples to try: text with a picture in it; then the simplest first: the main input alone, what is
    required, everything.

    A table of pictures is made together with the pictures.
    """
    parameters = inspect.signature(model.forward).parameters
    for arguments in captioned(model):
        yield _completed(model, arguments, frozenset(parameters))
    known = [name for name in MAKERS if name in parameters]
    stated = model.main_input_name
    main = [n for n in ([stated] if isinstance(stated, str) else stated) if n in known]
    required = [n for n in known if parameters[n].default is inspect.Parameter.empty]
    tried: list[set[str]] = []
    tables = [n for n in required if MAKERS[n] is packed]
    for names in (tables, main or known[:1], [*main, *required], [*known[:1], *main, *required], known):
        if not names or set(names) in tried:
            continue
        tried.append(set(names))
        for made in product(*(MAKERS[name](model) for name in dict.fromkeys(names))):
            arguments = {k: v for part in reversed(made) for k, v in part.items() if k in parameters}
            yield _completed(model, arguments, frozenset(parameters))


def _completed(model: PreTrainedModel, arguments: Arguments, accepted: frozenset[str]) -> dict[str, Any]:
    """The arguments on the model's device, with what a decoder reads and without a cache."""
    inputs: dict[str, Any] = dict(arguments)
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = token_ids(model)[:, :-2]
    device = device_of(model)
    inputs = {k: v.to(device) for k, v in inputs.items()}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def one_row(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The first of `batch` examples. An example may take several rows, as one per codebook or patch."""
    packed = packed_in(inputs)
    rows = {
        k: packed[k].examples(max(1, batch))[0] if k in packed else max(1, v.shape[0] // max(1, batch))
        for k, v in inputs.items()
        if isinstance(v, Tensor) and v.ndim
    }
    return {k: v[: rows[k]] if k in rows else v for k, v in inputs.items()}
