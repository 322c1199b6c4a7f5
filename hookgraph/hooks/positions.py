"""Positions that hold across passes: which columns of a pass's tensor a position of the sequence is.

While decoding, a pass holds only the newest positions; in a batch padded on the left, position 0 of each
row stands in a column of its own. Locations name positions, tensors have columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from hookgraph.errors import LocationError
from hookgraph.hooks.editing import Hook, apply_hook
from hookgraph.hooks.gradients import hook_gradient
from hookgraph.hooks.slicing import read
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.indices import Index
from hookgraph.ontology.locations import MAIN_STACK, Location
from hookgraph.ontology.transformer import TRANSFORMER_STACKS

_ALONG = (Dimension.POS, Dimension.KEY_POS)
KEYS_ELSEWHERE = frozenset(
    kind
    for stack in TRANSFORMER_STACKS
    for types in (stack.cross_attention,)
    for kind in (types.k, types.v, types.scores, types.pattern)
)
"""Types whose keys are positions of another stack."""


@final
@dataclass(frozen=True, slots=True)
class Span:
    """Which positions of its sequences a pass holds: column c of row r is position past + c - padding[r].

    Args:
        past: how many columns earlier passes held, padding included.
        length: how many columns this pass holds.
        padding: how many columns of padding stand before the first token of each row; one number if all
            rows have as many.
        ends: how many columns of this pass stand before the padding behind the last token of each row; empty
            where there is none.
    """

    past: int = 0
    length: int = 0
    padding: tuple[int, ...] = (0,)
    ends: tuple[int, ...] = ()


@final
@dataclass(slots=True)
class Place:
    """Where the present pass lies in its sequences; a binding keeps it up to date from pass to pass.

    Args:
        spans: by stack; a stack that is not named starts at position 0, without padding.
        step: how many passes of this generation came before.
        alone: whether there is one pass only, so that a position which it does not hold is an error.
    """

    spans: dict[str, Span] = field(default_factory=dict[str, Span])
    step: int = 0
    alone: bool = False


def is_placed(location: Location) -> bool:
    """Whether it depends on the place of the pass what `location` names."""
    return any(dim in _ALONG or dim is Dimension.STEP for dim, _ in location.index)


def read_at(location: Location, value: Shaped[Tensor, "..."], place: Place) -> Shaped[Tensor, "..."] | None:
    """The part of `value` that `location` names in this pass; None if the pass does not hold it.

    Raises:
        LocationError: as for `read`; or some rows only hold it.
    """
    found = read_by_row(location, value, place)
    if found is None:
        return None
    part, held = found
    if not bool(held.all()):
        raise LocationError(f"{location}: in this pass some rows hold these positions, others do not")
    return part


def read_by_row(
    location: Location, value: Shaped[Tensor, "..."], place: Place
) -> tuple[Shaped[Tensor, "..."], Bool[Tensor, " batch"]] | None:
    """The part of `value` that `location` names in this pass, and which rows hold all of it; in the others
    stands something else. None if the pass holds nothing of it.
    """
    part = _part(location, value, place)
    if part is None:
        return None
    held = torch.ones(len(value), dtype=torch.bool, device=value.device)
    for axis, rows in part.rows:
        value, held = rows.take(value, axis), held & rows.held.all(1)
    return read(part.location, value), held


@final
@dataclass(frozen=True, eq=False, slots=True)
class ByPosition:
    """A hook that is also told which positions it is given: `fn(value, positions)`, -1 where a row has none.

    Register it at `.at(pos=slice(0, None))`, all positions that a pass holds.
    """

    fn: Callable[[Tensor, Int[Tensor, "batch pos"]], Tensor | None]
    positions: Int[Tensor, "batch pos"] | None = None
    """None where a pass begins at position 0 and has no padding."""

    def __call__(self, value: Shaped[Tensor, "batch pos ..."]) -> Shaped[Tensor, "batch pos ..."] | None:
        """What `fn` returns."""
        batch, size = value.shape[:2]
        plain = torch.arange(size, device=value.device).expand(batch, size)
        return self.fn(value, plain if self.positions is None else self.positions)


@final
@dataclass(frozen=True, slots=True)
class Placed:
    """A hook on a part, as a hook on the whole activation that finds the part in each pass.

    In a pass that holds nothing of the part the hook is not called. Where only some rows of a batch hold
    it, the hook is given all rows, and what it returns for the others is not used.
    """

    location: Location
    hook: Hook
    place: Place

    def __call__(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """`value` after the hook; `value` itself if unchanged."""
        part = _part(self.location, value, self.place)
        if part is None:
            return value
        hook = self.hook
        if isinstance(hook, ByPosition):
            hook = ByPosition(hook.fn, self._positions(part, value))
        return part.apply(hook, value)

    def _positions(self, part: "_Part", value: Tensor) -> Int[Tensor, "batch pos"]:
        """Which positions the columns of a part are; -1 where a row has no token there."""
        along = self.location.type.dims.index(Dimension.POS)
        batch, size = len(value), value.shape[along]
        span = self.place.spans.get(self.location.root.type.stack, Span())
        shifts = torch.tensor(_shifts(self.location, Dimension.POS, span, size), device=value.device)
        columns = torch.arange(size, device=value.device)
        found = (columns - shifts[:, None]).expand(batch, size)
        if span.ends:
            ends = torch.tensor(span.ends, device=value.device)[:, None] - max(0, span.length - size)
            found = torch.where(columns < ends, found, -1)
        for axis, rows in part.rows:
            if axis == along:
                found = torch.where(rows.held, rows.take(found, 1), -1)
        return found[:, dict(part.location.index).get(Dimension.POS, slice(None))]


@final
@dataclass(frozen=True, slots=True)
class PlacedGradient:
    """A gradient hook on a part, as a forward hook that finds the part in the pass it is called in."""

    location: Location
    hook: Hook
    place: Place

    def __call__(self, value: Shaped[Tensor, "..."]) -> None:
        """Hook the gradient of `value`."""
        part = _part(self.location, value, self.place)
        if part is not None:
            hook = self.hook
            hook_gradient(value, ((self.location.whole, lambda gradient: part.apply(hook, gradient)),))


@final
@dataclass(frozen=True, slots=True)
class _Rows:
    """Columns that differ from row to row; what a row does not hold is filled with its nearest column."""

    columns: Int[Tensor, "batch pos"]
    held: Bool[Tensor, "batch pos"]

    def take(self, value: Tensor, axis: int) -> Tensor:
        """The columns of each row, along `axis`."""
        rows = torch.arange(len(value), device=value.device)[:, None]
        return value.movedim(axis, 1)[rows, self.columns].movedim(1, axis)

    def put(self, value: Tensor, axis: int, new: Tensor) -> Tensor:
        """A copy of `value` with the columns that are held replaced."""
        row, chosen = self.held.nonzero(as_tuple=True)
        result = value.clone()
        result.movedim(axis, 1)[row, self.columns[row, chosen]] = new.movedim(axis, 1)[row, chosen]
        return result


@final
@dataclass(frozen=True, slots=True)
class _Part:
    """A location in the columns of one pass, after `rows` were taken along their axes."""

    location: Location
    name: Location
    """What the user calls it."""
    rows: tuple[tuple[int, _Rows], ...] = ()

    def apply(self, hook: Hook, value: Tensor) -> Tensor:
        """`value` after `hook` was given this part; `value` itself if unchanged."""
        stages = [value]
        for axis, rows in self.rows:
            stages.append(rows.take(stages[-1], axis))
        new = apply_hook(self.location, hook, stages[-1], name=self.name)
        if new is stages[-1]:
            return value
        for (axis, rows), before in zip(reversed(self.rows), reversed(stages[:-1]), strict=True):
            new = rows.put(before, axis, new)
        return new


def _part(location: Location, value: Tensor, place: Place) -> _Part | None:
    """What `location` names in this pass; None if the pass holds nothing of it."""
    stack = location.root.type.stack
    chosen = dict(location.index)
    steps = chosen.pop(Dimension.STEP, None)
    if steps is not None and not _includes(steps, place.step if stack == MAIN_STACK else 0):
        return None
    rows: list[tuple[int, _Rows]] = []
    span = place.spans.get(stack, Span())
    for axis, dim in enumerate(location.type.dims):
        if dim not in _ALONG or dim not in chosen or axis >= value.ndim:
            continue
        size = value.shape[axis]
        shifts = _shifts(location, dim, span, size)
        if len(set(shifts)) == 1:
            found = _columns(chosen[dim], size, shifts[0], alone=place.alone, location=location)
            if found is None:
                return None
            chosen[dim] = found
            continue
        by_row = _columns_by_row(chosen[dim], size, shifts, value.device, location)
        if by_row is None:
            continue
        if place.alone and not isinstance(chosen[dim], slice) and not bool(by_row.held.all()):
            row = int((~by_row.held).any(1).nonzero()[0])
            raise LocationError(
                f"{location} is out of range: row {row} holds {_held(str(dim), size, shifts[row])}"
            )
        if not bool(by_row.held.any()):
            return None
        rows.append((axis, by_row))
        chosen[dim] = 0 if isinstance(chosen[dim], int) else slice(None)
    return _Part(location.whole.at(**{d.value: i for d, i in chosen.items()}), location, tuple(rows))


def _includes(steps: Index, step: int) -> bool:
    if isinstance(steps, slice):
        return step in range(
            steps.start or 0, step + 1 if steps.stop is None else steps.stop, steps.step or 1
        )
    return step == steps if isinstance(steps, int) else step in steps


def _shifts(location: Location, dim: Dimension, span: Span, size: int) -> tuple[int, ...]:
    """Column minus position, by row. Keys go back to the start of the sequence, or as far as a window.

    Where a tensor holds fewer columns than the pass, these are the last ones: `generate()` asks for the
    logits of no others.
    """
    if dim is Dimension.KEY_POS and location.type in KEYS_ELSEWHERE:
        return (0,)
    if dim is Dimension.KEY_POS:
        gone = max(0, span.past + span.length - size)
        return tuple(padding - gone for padding in span.padding)
    left_out = max(0, span.length - size)
    return tuple(padding - span.past - left_out for padding in span.padding)


def _columns(index: Index, size: int, shift: int, *, alone: bool, location: Location) -> Index | None:
    """The columns of positions where all rows are alike; None if the pass holds none of them."""
    if isinstance(index, slice):
        found = _sliced(index, size, shift)
        return found if alone or len(range(*found.indices(size))) else None
    asked = (index,) if isinstance(index, int) else index
    columns = [i + shift if i >= 0 else i for i in asked]
    held = [c for c, i in zip(columns, asked, strict=True) if (0 if i >= 0 else -size) <= c < size]
    if alone and len(held) < len(columns):
        raise LocationError(f"{location} is out of range: this pass holds {_held('positions', size, shift)}")
    if not held:
        return None
    return held[0] if isinstance(index, int) else tuple(held)


def _held(name: str, size: int, shift: int) -> str:
    """Which positions there are, in words."""
    first, last = max(0, -shift), size - 1 - shift
    return (
        f"{name} {first} to {last}" if first <= last else f"no {name}, as its mask says that all is padding"
    )


def _sliced(index: slice, size: int, shift: int) -> slice:
    if index.start is None and (index.stop is None or index.stop < 0):
        return index
    start, stop, step = index.start, index.stop, index.step or 1
    if start is None and stop is not None and stop >= 0:
        start = 0
    if start is not None and start >= 0:
        start = start + shift if start + shift >= 0 else (start + shift) % step
    if stop is not None and stop >= 0:
        stop = max(0, stop + shift)
    return slice(start, stop, index.step)


def _columns_by_row(
    index: Index, size: int, shifts: tuple[int, ...], device: torch.device, location: Location
) -> _Rows | None:
    """The columns of positions where rows are padded differently; None if they are alike all the same."""
    offset = torch.tensor(shifts, device=device)[:, None]
    if isinstance(index, slice):
        start, stop, step = index.start, index.stop, index.step or 1
        if start is None and (stop is None or stop < 0):
            return None
        if start is not None and start < 0:
            if stop is None or stop < 0:
                return None
            raise LocationError(
                f"{location}: rows are padded differently; start at a position, not at the end"
            )
        last = size - min(shifts) if stop is None or stop < 0 else stop
        positions = torch.arange(start or 0, max(last, start or 0), step, device=device)[None]
        columns = positions + offset
        held = (columns >= 0) & (columns < (size + stop if stop is not None and stop < 0 else size))
    else:
        asked = torch.tensor((index,) if isinstance(index, int) else index, device=device)[None]
        columns = torch.where(asked >= 0, asked + offset, asked + size)
        held = (columns >= 0) & (columns < size)
    return _Rows(columns.clamp(0, size - 1), held)
