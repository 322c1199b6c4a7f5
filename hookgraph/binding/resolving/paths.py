"""Follow the residual stream through a layer: additions, scalings, casts, norms, and parts of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

from hookgraph.binding.data.layouts import Grid
from hookgraph.binding.resolving.norms import Norm, find_norm
from hookgraph.binding.resolving.parts import is_put_together, part_of
from hookgraph.binding.resolving.shares import is_mask, is_weight
from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import ALIASES, Value

STREAM_AXES: Final = 4
"""Of several residual streams: batch, positions, streams, features."""


@final
@dataclass(frozen=True, slots=True)
class Step:
    """One operation of the stream: `add` an update, `shift` by a number, `scale`, `norm`, `cast`, `clamp`,
    `mask`, `mix`, or a `gate` that was computed from an activation.
    """

    kind: str
    value: Value
    base: Value
    update: Value | None = None
    norm: Norm | None = None
    partial: bool = False
    """Whether what is added is added at some positions only."""


@final
class PathFinder:
    """Follows the residual stream backwards from a value to the block's input.

    Args:
        trace: the pass.
        call: the layer.
        entering: the block's input.
        grid: how the stream lies.
        begins: whether it begins with the first update.
        gated: whether it may be multiplied by what was computed from an activation.
    """

    def __init__(
        self,
        trace: Trace,
        call: Call,
        entering: Value,
        grid: Grid,
        *,
        begins: bool = False,
        gated: bool = False,
    ) -> None:
        self._trace, self._call, self._entering, self._grid = trace, call, entering, grid
        self._begins, self._gated = begins, gated
        self._found: dict[Value, list[Step] | None] = {}

    @property
    def ends(self) -> list[Value]:
        """Where a search led no further, of what was computed inside the layer, the last computed first."""
        dead = {v for v, steps in self._found.items() if steps is None}
        last = [v for v in dead if dead.isdisjoint(v.inputs)]
        return sorted(last, key=lambda v: v.number, reverse=True)

    def path(self, value: Value) -> list[Step] | None:
        """The steps from the block's input to `value`, or None if the stream does not reach it."""
        if value is self._entering:
            return []
        if value.number < self._call.first or value.is_source:
            return None
        if value not in self._found:
            self._found[value] = None
            self._found[value] = self._through_norm(value) or self._through_operation(value)
        return self._found[value]

    def _through_norm(self, value: Value) -> list[Step] | None:
        for call in self._trace.producers.get(value, ()):
            norm = find_norm(call, self._grid.layout)
            before = self.path(norm.input) if norm is not None else None
            if norm is not None and before is not None:
                return [*before, Step("norm", value, norm.input, norm=norm)]
        return None

    def _through_operation(self, value: Value) -> list[Step] | None:
        operands = value.inputs
        if value.op in ALIASES and operands:
            if operands[0].tensor.numel() != value.tensor.numel():
                return None
            before = self.path(operands[0])
            if before is None or operands[0].tensor.dtype == value.tensor.dtype:
                return before
            return [*before, Step("cast", value, operands[0])]
        if value.op == "add" and len(operands) == 2:
            return self._through_addition(value)
        if value.op in ("add", "sub") and len(operands) == 1:
            before = self.path(operands[0])
            moved = before is not None and any(value.scalars)
            return [*before, Step("shift", value, operands[0])] if before is not None and moved else before
        if value.op == "clamp" and all(map(is_weight, operands[1:])):
            before = self.path(operands[0])
            return None if before is None else [*before, Step("clamp", value, operands[0])]
        if value.op in ("cat", "index_put") and operands:
            return self._through_parts(value)
        masks = [v for v in operands if is_mask(v)]
        if value.op == "mul" and len(operands) - len(masks) == 1:
            masked = next(v for v in operands if v not in masks)
            before = self.path(masked)
            return None if before is None else [*before, Step("mask", value, masked)]
        if value.op in ("mul", "div") and operands:
            return self._through_factor(value)
        if value.op == "bmm" and self._entering.tensor.ndim == STREAM_AXES:
            mixed = operands[1]
            before = self.path(mixed) if mixed.tensor.numel() == value.tensor.numel() else None
            return None if before is None else [*before, Step("mix", value, mixed)]
        return None

    def _through_addition(self, value: Value) -> list[Step] | None:
        left, right = value.inputs
        if self._begins:
            by_left, by_right = self._beginning(left, right), self._beginning(right, left)
        else:
            by_left, by_right = self.path(left), self.path(right)
        # Both operands may come from the stream, as when a norm of it is added: the longer path wins.
        if by_left is not None and (by_right is None or len(by_left) >= len(by_right)):
            return [*by_left, Step("add", value, left, right)]
        if by_right is not None:
            return [*by_right, Step("add", value, right, left)]
        return None

    def _through_factor(self, value: Value) -> list[Step] | None:
        others = [v for v in value.inputs if not is_weight(v)]
        if value.op == "div" and is_weight(value.inputs[0]):
            return None
        if len(others) == 1:
            before = self.path(others[0])
            return None if before is None else [*before, Step("scale", value, others[0])]
        if not self._gated or value.op != "mul":
            return None
        found = [(before, v) for v in others if (before := self.path(v)) is not None]
        before, base = max(found, key=lambda pair: len(pair[0]), default=(None, value))
        return None if before is None else [*before, Step("gate", value, base)]

    def _through_parts(self, value: Value) -> list[Step] | None:
        """Through positions of the stream put together again, or written back, after additions to some."""
        if value.op == "cat":
            found = [part_of(v, self._entering.tensor.numel()) for v in value.inputs]
        else:
            found = [part_of(value.inputs[-1], self._entering.tensor.numel())]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found) or any(part.whole is not parts[0].whole for part in parts):
            return None
        whole = parts[0].whole
        before = self.path(whole) if is_put_together(value, parts) else None
        added = [Step("add", value, whole, u, partial=True) for part in parts for u in part.added]
        return [*before, *added] if before is not None and added else None

    def _beginning(self, value: Value, added: Value) -> list[Step] | None:
        """The stream begins with the first of two updates, which the second was computed from."""
        inside = value.number >= self._call.first and value.tensor.shape == added.tensor.shape
        first = inside and value in set(cone_of(added, set(), self._call.first))
        return [Step("add", value, value, value)] if first else None


def cone_of(value: Value, stream: set[Value], first: int) -> Iterator[Value]:
    """What a value was computed from inside a layer, itself included, back to the stream."""
    seen: set[Value] = set()
    waiting = [value]
    while waiting:
        here = waiting.pop()
        if here in seen or here in stream or here.is_source or here.number < first:
            continue
        seen.add(here)
        yield here
        waiting.extend(here.inputs)
