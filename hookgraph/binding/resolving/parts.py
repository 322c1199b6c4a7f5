"""A stream that is taken apart by positions, added to in parts, and put together again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch

from hookgraph.binding.tracing.values import ALIASES, Value

_TAKING: Final = frozenset({"slice", "select", "split", "split_with_sizes", "unbind", "chunk", "index"})
"""Operations that take some positions of a tensor."""


@final
@dataclass(frozen=True, slots=True)
class Part:
    """Some positions of the stream, with what was added to them.

    Args:
        whole: the stream that they were taken from.
        taken: as they were taken.
        added: what was added since.
    """

    whole: Value
    taken: Value
    added: tuple[Value, ...] = ()


def part_of(value: Value, size: int) -> Part | None:
    """What a value is of a stream that has `size` elements, if it is a part of one."""
    if not value.inputs:
        return None
    source = value.inputs[0]
    some = value.op == "index" or value.tensor.numel() < size  # a mask may choose all of them
    if value.op in _TAKING and source.tensor.numel() == size and some:
        return Part(source, value)
    if value.op in ALIASES and source.tensor.numel() == value.tensor.numel():
        return part_of(source, size)
    if value.op == "add" and len(value.inputs) == 2:
        for base, update in (value.inputs, value.inputs[::-1]):
            part = part_of(base, size) if base.tensor.shape == value.tensor.shape else None
            if part is not None:
                return Part(part.whole, part.taken, (*part.added, update))
    return None


def is_put_together(value: Value, parts: Sequence[Part]) -> bool:
    """Whether parts come back to where they were taken from: as many, in their order."""
    whole = parts[0].whole
    if value.op == "index_put":
        return value.inputs[0] is whole and value.inputs[1:-1] == parts[0].taken.inputs[1:]
    axis = int(value.scalars[0]) if value.scalars else 0
    pieces = [p.taken.tensor.reshape(v.tensor.shape) for p, v in zip(parts, value.inputs, strict=True)]
    return torch.equal(torch.cat(pieces, axis), whole.tensor)
