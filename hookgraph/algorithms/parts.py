"""Nodes of effects as parts of their locations, one or many, in the locations' own coordinates."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int
from torch import Tensor

from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

Column: TypeAlias = list[Any] | Int[np.ndarray, "..."]


def part_of(location: Location, index: Mapping[Dimension, int], shape: Mapping[Dimension, int]) -> Location:
    """A node as a part of its location, in the location's own coordinates.

    An effect over a location that was indexed by a list or a slice counts from 0 within that choice.

    Args:
        location: what the effect is over.
        index: the node, counted within the effect.
        shape: how many entries the effect has along each axis.
    """
    chosen = dict(location.index)
    return location.at(**{d.value: _absolute(chosen.get(d), i, shape[d]) for d, i in index.items()})


def parts_of(
    location: Location, dims: Sequence[Dimension], shape: Sequence[int], points: Int[Tensor, "..."]
) -> Iterator[Location]:
    """Many nodes of an effect as parts of its location, as `part_of` gives them one by one.

    Args:
        location: what the effect is over.
        dims: its axes.
        shape: how many entries it has along each of them.
        points: the nodes, a row each, counted within the effect.
    """
    told = [i for i, d in enumerate(dims) if d not in location.type.joint]
    columns = [_entries(location, dims[i], shape[i])[points[:, i].cpu().numpy()].tolist() for i in told]
    return location.entries([dims[i] for i in told], columns, len(points))


def index_columns(location: Location, dims: Sequence[Dimension], shape: Sequence[int]) -> dict[str, Column]:
    """The index of every node of an effect, in order: a column for each axis by which a node is told."""
    told = {d: i for i, d in enumerate(dims) if d not in location.type.joint}
    count = int(np.prod(shape))
    columns: dict[str, Column] = {}
    for dim, part in location.at(**dict.fromkeys((d.value for d in told), 0)).index:
        if dim not in told:
            columns[dim.value] = [part] * count
            continue
        along = [1] * len(shape)
        along[told[dim]] = -1
        entries = _entries(location, dim, shape[told[dim]]).reshape(along)
        columns[dim.value] = np.broadcast_to(entries, shape).ravel()
    return columns


def _entries(location: Location, dim: Dimension, count: int) -> Int[np.ndarray, "..."]:
    """The numbers, in the whole axis, of the `count` entries that an effect has along it."""
    part = dict(location.index).get(dim)
    return np.array([_absolute(part, i, count) for i in range(count)], dtype=np.int64)


def _absolute(part: object, i: int, count: int) -> int:
    """The i-th of the `count` entries that a part selects."""
    if isinstance(part, tuple):
        return part[i]
    if not isinstance(part, slice):
        return i
    start, stop, step = part.start or 0, part.stop, part.step or 1
    if start < 0 and (stop is None or stop < 0) and count < len(range(start, stop or 0, step)):
        # It begins before the first entry, so with that one; in single steps it is counted from its end.
        start = 0 if step > 1 else (stop or 0) - count
    return start + i * step
