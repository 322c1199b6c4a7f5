"""How a location's value lies in the tensor that a mechanism reaches, and back. Each view is data."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from hookgraph.binding.tracing.values import Value


@final
@dataclass(frozen=True, slots=True)
class Columns:
    """Heads inside the last axis: head h holds `width` features from `start + h · stride` on."""

    start: int
    count: int
    stride: int
    width: int

    def get(self, raw: Shaped[Tensor, "batch pos ..."]) -> Shaped[Tensor, "batch pos head d_head"]:
        """The features by head; a view."""
        if self.stride == self.width:
            span = raw.narrow(-1, self.start, self.count * self.width)
            return span.unflatten(-1, (self.count, self.width))
        span = raw.narrow(-1, self.start, (self.count - 1) * self.stride + self.width)
        return span.unfold(-1, self.width, self.stride)

    def put(
        self, raw: Shaped[Tensor, "batch pos ..."], value: Shaped[Tensor, "batch pos head d_head"]
    ) -> Shaped[Tensor, "batch pos ..."]:
        """A copy of `raw` with these features replaced; `value` itself, flat, where they are all."""
        if self.stride == self.width and self.count * self.width == raw.shape[-1]:
            return value.reshape(raw.shape)
        result = raw.clone()
        self.get(result).copy_(value)
        return result


@final
@dataclass(frozen=True, slots=True)
class Span:
    """Some consecutive features of the last axis."""

    start: int
    width: int

    def get(self, raw: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The features; a view."""
        return raw.narrow(-1, self.start, self.width)

    def put(self, raw: Shaped[Tensor, "..."], value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """A copy of `raw` with these features replaced."""
        result = raw.clone()
        self.get(result).copy_(value)
        return result


@final
@dataclass(frozen=True, slots=True)
class HeadsFirst:
    """Heads before positions, as attention functions take them."""

    def get(self, raw: Shaped[Tensor, "batch head pos d_head"]) -> Shaped[Tensor, "batch pos head d_head"]:
        """Positions before heads; a view."""
        return raw.transpose(1, 2)

    def put(
        self, raw: Shaped[Tensor, "batch head pos d_head"], value: Shaped[Tensor, "batch pos head d_head"]
    ) -> Shaped[Tensor, "batch head pos d_head"]:
        """Heads before positions; a view."""
        return value.transpose(1, 2)


@final
@dataclass(frozen=True, slots=True)
class Axes:
    """Axes in another order, as code of a model's own has them; the first may be examples times heads.

    Args:
        order: for each axis of the value the axis of the tensor, examples and heads counted apart, and so
            are groups of heads and the heads of a group.
        heads: how many heads the first axis holds of each example; 0 where they have an axis.
        grouped: which axis of the value has heads that lie in groups in the tensor; 0 where they do not.
        added: how many positions before and after those of tokens the tensor has, which the value has not.
    """

    order: tuple[int, ...]
    heads: int = 0
    grouped: int = 0
    added: tuple[int, int] = (0, 0)

    @property
    def axes(self) -> int:
        """How many axes the tensor has."""
        return len(self.order) - bool(self.heads)

    def get(self, raw: Shaped[Tensor, "..."]) -> Shaped[Tensor, "batch ..."]:
        """The axes as locations have them; a view, but for heads in groups that do not lie in a row."""
        whole, (before, after) = self._whole(raw), self.added
        return whole[:, before : whole.shape[1] - after] if before or after else whole

    def _whole(self, raw: Shaped[Tensor, "..."]) -> Shaped[Tensor, "batch ..."]:
        """The same with the positions of no token."""
        apart = raw.unflatten(0, (-1, self.heads)) if self.heads else raw
        turned = apart.permute(self.order)
        return turned.flatten(self.grouped, self.grouped + 1) if self.grouped else turned

    def put(self, raw: Shaped[Tensor, "..."], value: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "..."]:
        """The axes as the tensor has them."""
        before, after = self.added
        if before or after:
            whole = self._whole(raw)
            value = torch.cat([whole[:, :before], value, whole[:, whole.shape[1] - after :]], 1)
        if self.grouped:
            of_groups = raw.shape[self.order[self.grouped]]
            value = value.unflatten(self.grouped, (of_groups, -1))
        apart = value.permute([self.order.index(i) for i in range(len(self.order))])
        return apart.flatten(0, 1) if self.heads else apart


@final
@dataclass(frozen=True, slots=True)
class Scaled:
    """A tensor times a constant, as where a model multiplies an update before adding it."""

    factor: float

    def get(self, raw: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The scaled tensor."""
        return raw * self.factor

    def put(self, raw: Shaped[Tensor, "..."], value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The tensor that scales to `value`; `raw` itself, bit for bit, where nothing changed."""
        return raw + (value - raw * self.factor) / self.factor


View: TypeAlias = Columns | Span | HeadsFirst | Axes | Scaled | None
"""None: the value is the tensor itself."""


def view_along(source: Value, path: Iterable[Value], *, heads_first: bool) -> tuple[bool, View]:
    """(found, view) from `source` to the value at the end of `path`, in the layout of locations.

    The operations of the path are carried out again on the numbers of the source's features.

    Args:
        source: a value of the trace.
        path: values, each a view of the one before, the first one of `source`.
        heads_first: whether the last one has its heads before its positions.
    """
    shape = source.tensor.shape
    flat = source.tensor.ndim in (2, 3)
    numbers = torch.arange(shape[-1] if flat else source.tensor.numel())
    numbers = (numbers.expand(shape) if flat else numbers.view(shape)).contiguous()
    start = numbers
    for step in path:
        result = None if step.replay is None else step.replay(numbers)
        found = result[step.output] if isinstance(result, (list, tuple)) else result
        if not isinstance(found, Tensor):
            return False, None
        numbers = numbers if found.is_floating_point() else found  # a cast moves no features
    if heads_first and numbers.ndim == 4:
        numbers = numbers.transpose(1, 2)
    if numbers.shape == start.shape and bool((numbers == start).all()):
        return True, None
    if source.tensor.ndim == 2:
        return _columns(numbers.reshape(1, *numbers.shape[-3:])) if _by_row(numbers, shape) else (False, None)
    if source.tensor.ndim == 4:
        swapped = start.transpose(1, 2)
        same = numbers.shape == swapped.shape and bool((numbers == swapped).all())
        return same, HeadsFirst() if same else None
    if source.tensor.ndim != 3:
        return False, None
    if numbers.ndim == 3 and numbers.shape[:2] != shape[:2]:
        numbers = numbers.transpose(1, 2)  # features before positions, as convolutions take them
    return _columns(numbers) if numbers.shape[:2] == shape[:2] else (False, None)


def _by_row(numbers: Int[Tensor, "..."], shape: tuple[int, ...]) -> bool:
    """Whether heads lie behind the one axis that examples and positions share."""
    rows = numbers.shape[-3] if numbers.ndim >= 3 else 0
    return rows == shape[0] and numbers.shape[:-3].numel() == 1


def _columns(numbers: Int[Tensor, "batch pos *chosen"]) -> tuple[bool, View]:
    table = numbers[0, 0]
    if not bool((numbers == table).all()):
        return False, None
    if table.ndim == 1:
        span = Span(int(table[0]), len(table))
        same = bool((table == span.start + torch.arange(span.width)).all())
        return same, span if same else None
    if table.ndim != 2:
        return False, None
    count, width = table.shape
    start = int(table[0, 0])
    stride = int(table[1, 0]) - start if count > 1 else width
    expected = start + stride * torch.arange(count)[:, None] + torch.arange(width)
    same = stride >= width and bool((table == expected).all())
    return same, Columns(start, count, stride, width) if same else None
