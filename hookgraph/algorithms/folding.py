"""Single entries of an axis, such as heads that were asked for one by one, put together to be drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location


def folded(
    effects: Mapping[Location, Float[Tensor, "..."]], axes: Mapping[Location, tuple[Dimension, ...]]
) -> tuple[dict[Location, Tensor], dict[Location, tuple[Dimension, ...]]]:
    """Single entries that differ in one axis, as one tensor along it for each layer; NaN where there is none.

    Args:
        effects: numbers by location.
        axes: the axes that they still have.

    Returns:
        The same for what is drawn.
    """
    alike: dict[tuple[str, ...], list[Location]] = {}
    for location in effects:
        points = [dim for dim, part in location.index if isinstance(part, int)]
        if points and not axes[location]:
            alike.setdefault((kind_of(_without(location, points)), *points), []).append(location)
    along: dict[Location, tuple[Location, Dimension, list[int]]] = {}
    for (_, *points), where in alike.items():
        entries = {Dimension(dim): sorted({_entry(x, Dimension(dim)) for x in where}) for dim in points}
        varying = [dim for dim, found in entries.items() if len(found) > 1]
        if len(varying) == 1:
            found = {x: _joined(x, varying[0], entries[varying[0]]) for x in where}
            if effects.keys().isdisjoint(found.values()):
                along.update({x: (y, varying[0], entries[varying[0]]) for x, y in found.items()})
    values: dict[Location, Tensor] = {}
    left: dict[Location, tuple[Dimension, ...]] = {}
    for location, value in effects.items():
        if location not in along:
            values[location], left[location] = value, axes[location]
            continue
        joined, axis, found = along[location]
        row = values.setdefault(joined, torch.full((len(found),), torch.nan))
        row[found.index(_entry(location, axis))] = value
        left[joined] = (axis,)
    return values, left


def _entry(location: Location, axis: Dimension) -> int:
    """The one entry of an axis that a location is a part of."""
    return next(part for dim, part in location.index if dim == axis and isinstance(part, int))


def _joined(location: Location, axis: Dimension, entries: Sequence[int]) -> Location:
    """A location with these entries of an axis in place of one; with all if they count from the first."""
    whole = _without(location, [axis])
    return whole if list(entries) == list(range(len(entries))) else whole.at(**{axis.value: entries})


def _without(location: Location, dims: Sequence[Dimension]) -> Location:
    """All of a location along some axes."""
    return replace(location, index=tuple((dim, part) for dim, part in location.index if dim not in dims))


def kind_of(location: Location) -> str:
    """What the locations of one map have in common: all but the layer."""
    name = str(location)
    return name if location.layer is None else name.replace(f"[{location.layer}]", "", 1)
