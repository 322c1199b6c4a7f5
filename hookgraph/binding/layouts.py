"""In which order the axes of a tensor lie, where that is not the order of a location's dimensions."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, final

import torch
from jaxtyping import Shaped
from torch import Tensor

from hookgraph.binding.tracing import Trace, Value

Layout: TypeAlias = Literal["", "flat", "one row", "positions first", "features first", "streams first"]
"""How a tensor that a mechanism reaches lies:

* empty: batch, positions, then the rest, as locations have it.
* `flat`: one axis for batch and positions.
* `one row`: the same, after an axis of size one.
* `positions first`: positions, batch, then the rest.
* `features first`: batch, features, positions, as convolutions take them.
* `streams first`: residual streams side by side, batch, positions, features.
"""

_MOVES: Final[dict[Layout, tuple[int, int]]] = {
    "positions first": (0, 1),
    "features first": (2, 1),
    "streams first": (0, 2),
}
"""Which axis goes where, to lie as in locations."""

_ALONG_SECOND: Final = frozenset({"convolution", "native_batch_norm", "_native_batch_norm_legit_no_training"})
_ALONG_LAST: Final = frozenset({"mm", "addmm", "native_layer_norm", "mean"})
"""Operations that map or norm features, by the axis on which they find them."""


def arranged(layout: Layout, raw: Shaped[Tensor, "..."], batch: int) -> Shaped[Tensor, "batch pos ..."]:
    """A tensor with its axes as locations have them; a view."""
    if layout == "flat":
        return raw.unflatten(0, (batch, -1))
    if layout == "one row":
        return raw[0].unflatten(0, (batch, -1))
    return raw.movedim(*_MOVES[layout]) if layout in _MOVES else raw


def restored(layout: Layout, value: Shaped[Tensor, "batch pos ..."]) -> Shaped[Tensor, "..."]:
    """A tensor with its axes as the model has them: what `arranged` undoes."""
    if layout == "flat":
        return value.flatten(0, 1)
    if layout == "one row":
        return value.flatten(0, 1)[None]
    return value.movedim(*reversed(_MOVES[layout])) if layout in _MOVES else value


@final
@dataclass(frozen=True, slots=True)
class Grid:
    """How many examples and positions a stack of layers has, and how its residual stream lies."""

    batch: int
    positions: int
    layout: Layout = ""

    def layout_of(self, value: Value) -> Layout:
        """The layout of an activation of this stack."""
        shape = tuple(value.tensor.shape)
        if len(shape) == 2:
            return "flat"
        if self.layout == "flat":
            return ""
        if self.layout == "" or shape[:2] == (self.batch, self.positions):
            return ""
        if shape[:2] == (self.positions, self.batch):
            return "positions first"
        return self.layout


def grid_of(trace: Trace, entering: Value) -> Grid:
    """The grid of a stack, given what enters its first layer."""
    shape = tuple(entering.tensor.shape)
    examples = _examples(trace)
    if len(shape) == 2:
        return Grid(examples, shape[0] // examples, "flat")
    if len(shape) == 3 and shape[0] == 1 < examples and shape[1] % examples == 0:
        return Grid(examples, shape[1] // examples, "one row")
    batch, tokens = _tokens(trace)
    if not batch and len(shape) == 3 and shape[0] != examples == shape[1]:
        return Grid(examples, shape[0], "positions first")
    if not batch and len(shape) == 3 and _has_features_first(trace, entering):
        return Grid(shape[0], shape[2], "features first")
    if len(shape) == 4 and shape[1:3] == (batch, tokens) != shape[:2]:
        return Grid(batch, tokens, "streams first")
    if not batch or batch == tokens or shape[0] == batch:
        if len(shape) == 3 and shape[2] == tokens != shape[1] and shape[0] == batch != tokens:
            return Grid(batch, tokens, "features first")
        return Grid(shape[0], shape[1])
    if len(shape) == 3 and shape[1] == batch:
        return Grid(batch, shape[0], "positions first")
    return Grid(shape[0], shape[1])


def _has_features_first(trace: Trace, entering: Value) -> bool:
    """Whether the first map of features, or norm, that reads a stream finds these on its second axis."""
    turned = {entering: False}
    for value in trace.values[entering.number + 1 :]:
        read = next((v for v in value.inputs if v in turned), None)
        if read is None:
            continue
        if value.op in _ALONG_SECOND or value.op in _ALONG_LAST:
            return turned[read] == (value.op in _ALONG_LAST)
        if value.op in ("transpose", "permute"):
            batch, second, last = entering.tensor.shape
            if tuple(value.tensor.shape) in ((batch, second, last), (batch, last, second)):
                turned[value] = not turned[read]
        elif value.tensor.numel() == entering.tensor.numel():
            turned[value] = turned[read]
    return False


def _examples(trace: Trace) -> int:
    """How many examples a model was given: of its first argument, or of the table of what lies packed."""
    first = next(iter(trace.root.inputs.values()), None)
    given = trace.root.inputs.get(trace.counted, first)
    return given.tensor.shape[0] if given is not None and given.tensor.ndim else 0


def _tokens(trace: Trace) -> tuple[int, int]:
    """(batch, positions) of the tokens that a model was given; zeros if it was given none."""
    integers = [
        v.tensor.shape
        for v in trace.root.inputs.values()
        if v.tensor.ndim == 2 and not v.tensor.is_floating_point() and v.tensor.dtype is not torch.bool
    ]
    return (integers[0][0], integers[0][1]) if integers else (0, 0)
