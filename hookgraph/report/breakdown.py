"""What of a result is shown: its units such as heads, its places in the stream, its sums, its names."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.graph.conformance import ConformanceReport
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType

UNITS: Final = (
    Dimension.HEAD,
    Dimension.KV_HEAD,
    Dimension.EXPERT,
    Dimension.LATENT,
    Dimension.D_MLP,
)
"""Axes whose entries are nodes of their own; over all others effects are summed."""


def is_stream(location: Location) -> bool:
    """Whether this is the residual stream itself: all information is there, so one asks where."""
    return location.type.name == "embed" or location.type.name.startswith("resid.")


def units(effect: PatchingEffect) -> PatchingEffect | None:
    """The effect of each head, neuron, latent or else whole layer; None if there is only the stream."""
    return _part(effect, (x for x in effect.effects if not is_stream(x)), UNITS)


def places(effect: PatchingEffect) -> PatchingEffect | None:
    """The effect of the residual stream at each position; None if it was not asked for."""
    return _part(effect, (x for x in effect.effects if is_stream(x)), (Dimension.POS,))


def only(effect: PatchingEffect, kind: LocationType) -> PatchingEffect:
    """The effects at locations of one type."""
    chosen = {x: e for x, e in effect.effects.items() if x.type == kind}
    return replace(effect, effects=Attribution(chosen, effect.reduced))


def by_type(effect: PatchingEffect) -> dict[str, PatchingEffect]:
    """The effects of each type of location, by its name."""
    types = dict.fromkeys(x.type for x in effect.effects)
    return {kind.qualified_name: only(effect, kind) for kind in types}


def total(effect: PatchingEffect) -> float:
    """The mean total effect; 0 where there is no corrupt input."""
    return 0.0 if effect.total_effect is None else float(effect.total_effect.mean())


def node_name(location: Location, tokens: Sequence[str] = ()) -> str:
    """A node as text, with the token at its position if tokens are given."""
    pos = dict(location.index).get(Dimension.POS)
    known = isinstance(pos, int) and -len(tokens) <= pos < len(tokens)
    return f"{location} “{tokens[pos]}”" if known and isinstance(pos, int) else str(location)


def verdict(report: ConformanceReport) -> str:
    """What the checks of a report come to, in one sentence."""
    checked = len({(p.location, p.invariant) for p in report.proofs})
    outcome = "all hold" if report.ok else f"{len(report.failures)} fail"
    where = f" on {report.metadata['proven on']}" if "proven on" in report.metadata else ""
    return f"{len(report.mechanisms)} locations, {checked} invariants checked{where}: {outcome}"


def reduced(effect: PatchingEffect, keep: Iterable[Dimension]) -> PatchingEffect:
    """The effects summed over every axis but those to keep; over the batch, their mean."""
    kept = {Dimension.BATCH, *keep}
    left = dict.fromkeys(d for x in effect.effects for d in effect.dims(x))
    gone = [d for d in left if d not in kept]
    effect = effect.sum(*gone) if gone else effect
    return effect.mean(Dimension.BATCH) if Dimension.BATCH in left else effect


def _part(
    effect: PatchingEffect, chosen: Iterable[Location], keep: Iterable[Dimension]
) -> PatchingEffect | None:
    effects = {x: effect.effects[x] for x in chosen}
    part = replace(effect, effects=Attribution(effects, effect.reduced))
    return reduced(part, keep) if effects else None
