"""Which nodes can act on which directly, and what is held constant in between.

Direct is what does not pass through another site of the analysis: the gradient is stopped at each of those
between the two ends, which the causal order of the ontology tells. A site that is the stream itself lets
nothing past it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.streams import RESIDUALS, UPDATES
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location

_ROUNDING = 1e-4
"""What differs by no more of its size is the same up to rounding."""


@final
@dataclass(frozen=True)
class Route:
    """A way from one carrier to a later one, past everything in between.

    Args:
        start: what carries the nodes that act.
        end: what carries those that are acted upon.
        stops: where gradients are stopped.
    """

    start: Location
    end: Location
    stops: tuple[Location, ...]


def routes(
    starts: Iterable[Location], ends: Iterable[Location], sites: Iterable[Location]
) -> tuple[Route, ...]:
    """Every way from a start to an end that no site of the stream blocks, those to one end together."""
    first, last, known = (sorted(set(x), key=lambda x: x.order) for x in (starts, ends, sites))
    found: list[Route] = []
    for start, end in ((start, end) for end in last for start in first):
        if start.precedes(end):
            between = [x for x in known if start.precedes(x) and x.precedes(end)]
            if not any(blocks(x, start) for x in between):
                found.append(Route(start, end, tuple(between)))
    return tuple(found)


def blocks(site: Location, start: Location) -> bool:
    """Whether everything that comes of `start`, which precedes it, goes through `site`."""
    return site.type in RESIDUALS and site.type.stack == start.type.stack


def may_be_identity(route: Route, updates: Sequence[Location]) -> bool:
    """Whether by the ontology only the stream itself leads from start to end.

    That is where what starts is of the stream or is added to it, what ends is the stream, and every other
    update in between is stopped.
    """
    start, end = route.start, route.end
    if start.type not in RESIDUALS | UPDATES or end.type not in RESIDUALS:
        return False
    if start.type.stack != end.type.stack or start.type.dims != end.type.dims:
        return False
    return all(x in route.stops for x in _between(updates, start, end))


def is_sum(run: Run, route: Route, residuals: Sequence[Location], updates: Sequence[Location]) -> bool:
    """Whether the stream at the end is, in a run, its beginning plus the updates between, nothing scaled."""
    before = [x for x in residuals if not route.start.precedes(x)]
    if not before:
        return False
    first = route.start if route.start.type in RESIDUALS else before[-1]
    added = _between(updates, first, route.end)
    total: Float[Tensor, "..."] = torch.stack([run[x] for x in (first, *added)]).sum(0)
    gap, size = (total - run[route.end]).norm(), run[route.end].norm()
    return bool(gap <= _ROUNDING * size)


def summed(route: Route, residuals: Sequence[Location], updates: Sequence[Location]) -> list[Location]:
    """What `is_sum` needs of a run."""
    before = [x for x in residuals if not route.start.precedes(x)]
    if not before:
        return []
    first = route.start if route.start.type in RESIDUALS else before[-1]
    return [first, *_between(updates, first, route.end), route.end]


def _between(places: Sequence[Location], start: Location, end: Location) -> list[Location]:
    return [x for x in places if start.precedes(x) and x.precedes(end)]
