"""Re-execute only what lies after a location of an earlier run."""

from collections.abc import Iterable, Sequence
from typing import Final

from jaxtyping import Shaped
from torch import Tensor

from hookgraph.errors import LocationError, ShapeMismatchError, SubgraphError
from hookgraph.graph.abstract import AbstractBinding, AbstractSubgraph, Start
from hookgraph.hooks.taps import Taps
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import RESID_POST, RESID_PRE, STREAMS_POST, STREAMS_PRE

_BOUNDARIES: Final = {RESID_PRE.name: 0, STREAMS_PRE.name: 0, RESID_POST.name: 1, STREAMS_POST.name: 1}
"""How many of its layer lie before a location between blocks."""


def start_at(
    after: Location,
    value: Shaped[Tensor, "batch pos ..."],
    batch: int,
    before: Shaped[Tensor, "..."] | None = None,
) -> tuple[Start, int]:
    """Where a replay from `after` enters the model, and how often the batch of inputs is repeated.

    Args:
        after: where it starts.
        value: what enters there.
        batch: of the inputs.
        before: what was there before, if that is known.

    Raises:
        LocationError: the location is not a boundary between blocks.
        ShapeMismatchError: the value's batch is no multiple of the inputs', or its shape or dtype is not that
            of what was there before.
    """
    block = block_after(after)
    if block is None:
        raise LocationError(
            f"a replay starts between blocks, at a whole resid.pre or resid.post, not at {after}: "
            f"save resid.pre[{after.root.layer or 0}] in the first run and start there"
        )
    copies, rest = divmod(value.shape[0], batch)
    if rest or not copies:
        raise ShapeMismatchError(
            f"the value at {after} has batch {value.shape[0]}, the inputs have {batch}: "
            "a replay's batch is a multiple of the inputs', repeated as a whole"
        )
    if before is not None and (value.shape[1:], value.dtype) != (before.shape[1:], before.dtype):
        given, had = (f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (value, before))
        raise ShapeMismatchError(
            f"the value for {after} is {given}, and the earlier run had {had} there: positions, width and "
            "dtype stay as they were"
        )
    return Start(after.type.stack, block, value, after), copies


def block_after(after: Location) -> int | None:
    """The number of the layer that a replay from a location runs first; None if that is no boundary."""
    boundary = _BOUNDARIES.get(after.type.name)
    if boundary is None or after.layer is None or after.site is not None or after != after.whole:
        return None
    return after.layer + boundary


def can_start(binding: AbstractBinding, after: Location) -> bool:
    """Whether a replay can start at a location: a boundary between blocks where the model can be entered."""
    block = block_after(after)
    return block is not None and not binding.why_closed(after.type.stack, block, after)


def taps_from(after: Location, taps: Taps) -> tuple[Taps, list[Location]]:
    """The taps that a replay from `after` reaches, and the locations of those that it does not."""
    reached = {k: v for k, v in taps.items() if not k.root.precedes(after)}
    return reached, [k for k in taps if k not in reached]


def check_entry(after: Location, subgraphs: Sequence[AbstractSubgraph]) -> None:
    """Refuse a replay that would reach some sites of a subgraph and not the others.

    Raises:
        SubgraphError: naming the subgraph, and what it would not see.
    """
    for subgraph in subgraphs:
        missed = _missed(subgraph, after)
        if missed:
            raise SubgraphError(
                f"a replay from {after} would reach subgraph {subgraph.name!r} without {missed[0]}, which it "
                "reads or writes too: start before that"
            )


def latest_entry(
    location: Location, entries: Iterable[Location], subgraphs: Sequence[AbstractSubgraph]
) -> Location | None:
    """The last entry from which a replay reaches a location, and subgraphs whole or not at all."""
    reaching = (x for x in entries if not location.root.precedes(x))
    whole = [x for x in reaching if not any(_missed(s, x) for s in subgraphs)]
    return max(whole, key=lambda x: x.order, default=None)


def _missed(subgraph: AbstractSubgraph, after: Location) -> list[Location]:
    """The sites that a replay does not reach, of a subgraph of which it reaches others."""
    missed = [site for site in subgraph.sites if site.root.precedes(after)]
    return missed if len(missed) < len(subgraph.sites) else []
