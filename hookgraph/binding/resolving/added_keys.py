"""Keys and values of no token: learned ones, or zeros, that a layer puts before or behind those of tokens."""

import torch
from jaxtyping import Bool
from torch import Tensor

from hookgraph.binding.data.views import Axes
from hookgraph.binding.resolving.projections import PRODUCTS, behind
from hookgraph.binding.tracing.values import ALIASES, Value


def added_around(value: Value, view: Axes, first: int) -> tuple[int, int]:
    """How many positions before, and how many after, those of tokens keys or values have.

    Args:
        value: the keys or values.
        view: how they lie.
        first: number of the first value that the layer computed.
    """
    marks = view.get(_of_tokens(value, first))[0, :, 0, 0]
    places = marks.nonzero().flatten().tolist()
    return (places[0], len(marks) - 1 - places[-1]) if places else (0, 0)


def _of_tokens(value: Value, first: int) -> Bool[Tensor, "..."]:
    """Which elements of a value come from no part that was made of weights alone and joined to others."""
    shape = value.tensor.shape
    whole = torch.ones(shape, dtype=torch.bool)
    if value.number < first or value.op in PRODUCTS:
        return whole
    if value.op == "cat":
        made = [_is_made_of_activations(v) for v in value.inputs]
        axis = int(value.scalars[0]) if value.scalars else 0
        return whole if all(made) else torch.cat([_of_part(v, first) for v in value.inputs], axis)
    source = next((v for v in value.inputs if v.tensor.numel() == shape.numel() and not v.is_source), None)
    if source is None:
        return whole
    marks = _of_tokens(source, first)
    if value.op in ALIASES:
        moved = None if value.replay is None else value.replay(marks)
        return moved > 0 if isinstance(moved, Tensor) and moved.shape == shape else whole
    return marks if marks.shape == shape else whole


def _of_part(value: Value, first: int) -> Bool[Tensor, "..."]:
    made = _is_made_of_activations(value)
    return _of_tokens(value, first) if made else torch.zeros(value.tensor.shape, dtype=torch.bool)


def _is_made_of_activations(value: Value) -> bool:
    """Whether anything that is no weight went into a value."""
    inputs = (v for x in behind(value, 0) for v in x.inputs)
    return any(v.is_source and v.op != "parameter" for v in inputs)
