"""In which order the axes of a tensor lie, where that is not the order of a location's dimensions."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, final

import torch
from jaxtyping import Shaped
from torch import Tensor

from hookgraph.binding.tracing.trace import Trace
from hookgraph.binding.tracing.values import Value
from hookgraph.graph.examples import count_examples

Layout: TypeAlias = Literal[
    "",
    "flat",
    "one row",
    "positions first",
    "features first",
    "streams first",
    "rows and columns",
    "picture",
    "frames",
]
"""How a tensor that a mechanism reaches lies:

* empty: batch, positions, then the rest, as locations have it.
* `flat`: one axis for batch and positions.
* `one row`: the same, after an axis of size one.
* `positions first`: positions, batch, then the rest.
* `features first`: batch, features, positions, as convolutions take them.
* `streams first`: residual streams side by side, batch, positions, features.
* `rows and columns`: batch, two axes of positions, then the rest, as of a picture.
* `picture`: batch, features, then two axes of positions, as two-dimensional convolutions take them.
* `frames`: one axis for batch and frames, the positions of a frame, then the rest, as of a film.
"""

_MOVES: Final[dict[Layout, tuple[int, int]]] = {
    "positions first": (0, 1),
    "features first": (2, 1),
    "streams first": (0, 2),
}
"""Which axis goes where, to lie as in locations."""

_TOKENS: Final = ("input_ids", "decoder_input_ids")
"""Arguments that hold tokens."""

_JOINED: Final[dict[Layout, int]] = {"rows and columns": 3, "frames": 2}
"""How many axes a model has where locations have batch and positions."""

_ALONG_SECOND: Final = frozenset({"convolution", "native_batch_norm", "native_group_norm"})
_ALONG_LAST: Final = frozenset({"mm", "addmm", "native_layer_norm", "mean"})
"""Operations that map or norm features, by the axis on which they find them."""


def arranged(layout: Layout, raw: Shaped[Tensor, "..."], batch: int) -> Shaped[Tensor, "batch pos ..."]:
    """A tensor with its axes as locations have them; a view."""
    if layout == "flat":
        return raw.unflatten(0, (batch, -1))
    if layout == "one row":
        return raw[0].unflatten(0, (batch, -1))
    if layout == "rows and columns":
        return raw.flatten(1, 2)
    if layout == "picture":
        return raw.flatten(2).transpose(1, 2)
    if layout == "frames":
        return raw.unflatten(0, (batch, -1)).flatten(1, 2)
    return raw.movedim(*_MOVES[layout]) if layout in _MOVES else raw


def restored(
    layout: Layout, value: Shaped[Tensor, "batch pos ..."], like: Shaped[Tensor, "..."] | None = None
) -> Shaped[Tensor, "..."]:
    """A tensor with its axes as the model has them: what `arranged` undoes.

    Args:
        layout: how the model has them.
        value: the tensor.
        like: one of the model, where several axes became one.
    """
    if like is not None and layout == "picture":
        return _strided(value.transpose(1, 2).reshape(len(value), -1, *like.shape[2:]), like)
    if like is not None and layout in _JOINED:
        return _strided(value.reshape(*like.shape[: _JOINED[layout]], *value.shape[2:]), like)
    if layout == "flat":
        return value.flatten(0, 1)
    if layout == "one row":
        return value.flatten(0, 1)[None]
    return value.movedim(*reversed(_MOVES[layout])) if layout in _MOVES else value


def _strided(value: Shaped[Tensor, "..."], like: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A tensor in the memory layout of another of its shape: kernels round differently by that."""
    if value.shape != like.shape or value.stride() == like.stride():
        return value
    return torch.empty_like(like, requires_grad=False).copy_(value)


@final
@dataclass(frozen=True, slots=True)
class Grid:
    """How many examples and positions a stack of layers has, and how its residual stream lies."""

    batch: int
    positions: int
    layout: Layout = ""
    axes: tuple[int, ...] = ()
    """The sizes of the axes that the model has for batch and positions, where these are not two."""

    def layout_of(self, value: Value) -> Layout:
        """The layout of an activation of this stack."""
        shape = tuple(value.tensor.shape)
        if len(shape) == 2:
            return "flat"
        if self.layout == "picture":
            return "picture" if len(shape) == 4 and (shape[0], *shape[2:]) == self.axes else ""
        if self.axes:
            return self.layout if shape[: len(self.axes)] == self.axes else ""
        if self.layout == "flat":
            return ""
        if shape[:2] == (self.batch, self.positions):
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
    if not batch and shape[0] != examples:
        return _grid_of_frames(shape, examples)
    if not batch or batch == tokens or shape[0] == batch:
        if len(shape) == 3 and shape[2] == tokens != shape[1] and shape[0] == batch != tokens:
            return Grid(batch, tokens, "features first")
        return Grid(shape[0], shape[1])
    if len(shape) == 3 and shape[1] == batch:
        return Grid(batch, shape[0], "positions first")
    return _grid_of_frames(shape, batch or examples)


def _grid_of_frames(shape: tuple[int, ...], examples: int) -> Grid:
    """The grid of a stack that is given several frames of each example, as so many examples."""
    if len(shape) == 3 and examples and shape[0] > examples and shape[0] % examples == 0:
        return Grid(examples, shape[0] // examples * shape[1], "frames", shape[:2])
    return Grid(shape[0], shape[1])


def grid_of_pictures(trace: Trace, entering: Value) -> Grid:
    """The grid of a stack whose stream has rows and columns."""
    if _has_features_first(trace, entering):
        batch, _, rows, columns = entering.tensor.shape
        return Grid(batch, rows * columns, "picture", (batch, rows, columns))
    batch, rows, columns = entering.tensor.shape[:3]
    return Grid(batch, rows * columns, "rows and columns", (batch, rows, columns))


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
            batch, second, *rest = entering.tensor.shape
            if tuple(value.tensor.shape) in ((batch, second, *rest), (batch, *rest, second)):
                turned[value] = not turned[read]
        elif value.tensor.numel() == entering.tensor.numel():
            turned[value] = turned[read]
    return False


def _examples(trace: Trace) -> int:
    """How many examples a model was given."""
    return count_examples(trace.inputs) or 0


def _tokens(trace: Trace) -> tuple[int, int]:
    """(batch, positions) of the tokens that a model was given; zeros if it was given none."""
    integers = {
        str(name): v.tensor.shape
        for name, v in trace.root.inputs.items()
        if v.tensor.ndim == 2 and not v.tensor.is_floating_point() and v.tensor.dtype is not torch.bool
    }
    # Sizes of pictures may lie before them.
    names = sorted(integers, key=lambda name: name not in _TOKENS)
    return (integers[names[0]][0], integers[names[0]][1]) if names else (0, 0)
