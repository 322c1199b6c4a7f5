"""What is attributed, prepared: places, the sites that they form, and their clean and corrupt values."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.copies import finite_metric, looked_at
from hookgraph.algorithms.pairs import prepare_pair
from hookgraph.errors import HookGraphError, LocationError, nearest
from hookgraph.graph.abstract import AbstractSubgraph, Inputs, Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.graph.run import Run
from hookgraph.hooks.masking import masked_cells
from hookgraph.ontology.autoencoder import ERROR, LATENTS
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.ontology.passes import PassType

Values = Mapping[Location, Float[Tensor, "..."]]
Instead = Callable[[Location, Tensor], Tensor]
"""What stands in for a value at a location."""


def chosen_places(graph: HookGraph, at: Sequence[Location]) -> list[Location]:
    """The places to attribute, each once.

    Raises:
        HookGraphError: they are no list, there is none, or one is a gradient, a part of the batch, or a slice
            of which one end is counted from the end of the axis and the other is not.
        UnknownLocationError: the graph has no such location.
    """
    one: object = at  # users pass a single one, or its name
    if not isinstance(one, Iterable | Location):
        raise HookGraphError(f"`at` names the locations to patch, and {one!r} is no list of them")
    given: Sequence[Any] = [one] if isinstance(one, Location | str) else at
    places: list[Location] = list(dict.fromkeys(given))
    if not places:
        raise HookGraphError("nothing to patch: `at` names no location")
    for place in places:
        graph.check(place)
        if place.pass_type is PassType.BACKWARD:
            raise HookGraphError(f"{place} is a gradient: name the activation")
        if any(dim == Dimension.BATCH for dim, _ in place.index):
            raise HookGraphError(f"{place} is a part of the batch: give those examples only")
        for dim, part in place.index:
            if isinstance(part, slice) and (part.start or 0) < 0 <= (-1 if part.stop is None else part.stop):
                raise HookGraphError(
                    f"{place}: {dim} is counted from the end and from the beginning, so nodes cannot be told "
                    "apart by number: give both ends alike, or a list"
                )
    return places


def axes_of(places: Sequence[Location], over: Sequence[str]) -> tuple[Dimension, ...]:
    """Axes by name.

    Raises:
        LocationError: no place has one of them, or it is the batch.
    """
    names = (over,) if isinstance(over, str) else tuple(over)
    known = {d.value for place in places for d in place.dims} - {Dimension.BATCH.value}
    for name in names:
        if name not in known:
            raise LocationError(f"no location has an axis {name!r}: {nearest(name, known)}")
    return tuple(Dimension(name) for name in names)


def joint_axes(joint: Sequence[str]) -> tuple[str, ...]:
    """Axes by name, also those that only some places have.

    Raises:
        LocationError: there is no such axis, or it is the batch.
    """
    names = (joint,) if isinstance(joint, str) else tuple(joint)
    known = {d.value for d in Dimension} - {Dimension.BATCH.value}
    for name in names:
        if name not in known:
            raise LocationError(f"no joint axis is called {name!r}: {nearest(name, known)}")
    return names


@final
@dataclass(frozen=True, eq=False)
class Contrast:
    """A clean and a corrupt run, seen at some places. Without corrupt inputs, zero or a mean stands in.

    Args:
        graph: the hooked model.
        metric: what is measured.
        places: what is attributed.
        inputs: the clean inputs, as the model takes them.
        other: the corrupt ones.
        base: the clean run, with the boundaries at which replays begin.
        clean: the values there in the clean run.
        corrupt: and in the corrupt run.
        total: m(corrupt) - m(clean) per example.
        entries: the boundary before each place, if the clean run kept it.
        retained: the clean inputs, if their run retained what the model remembers of each position.
    """

    graph: HookGraph
    metric: Metric
    places: Sequence[Location]
    inputs: Prepared
    other: Prepared | None
    base: Run
    clean: Values
    corrupt: Values
    total: Float[Tensor, " batch"] | None
    entries: Mapping[Location, Location | None] = field(default_factory=dict[Location, "Location | None"])
    retained: Prepared | None = None

    @staticmethod
    def of(
        graph: HookGraph,
        clean: Inputs,
        corrupt: Inputs | None,
        metric: Metric,
        places: Sequence[Location],
        *,
        replays: bool = False,
        retains: bool = False,
        totals: bool = True,
        instead: Instead | None = None,
    ) -> "Contrast":
        """Run both inputs.

        Args:
            graph: the hooked model.
            clean: the clean inputs.
            corrupt: the corrupt ones, or None.
            metric: what is measured.
            places: what is attributed.
            replays: whether the clean run keeps what passes that move places begin with: the boundary before
                each, and where what goes on from them is.
            retains: whether it keeps what the model remembers of each position, for passes over late ones.
            totals: whether to measure the corrupt run.
            instead: what stands in for a clean value, without corrupt inputs; by default zero.

        Raises:
            HookGraphError: the model draws random numbers.
            ShapeMismatchError: clean and corrupt differ in shape or mask.
            MetricError: the metric is not a finite number, or does not depend on a place.
        """
        pair = prepare_pair(graph, clean, corrupt)
        graph = _looked_at(graph, places)
        entries = {place: graph.entry(place) if replays else None for place in places}
        kept = [*entries.values(), *(_carrier_of(graph, place) for place in places)] if replays else []
        retained = graph.retaining(pair[0]) if retains else None
        save = [*filter(None, kept), *places]
        base = graph.run(retained or pair[0], save=save, metric=metric, logits=False)
        found = _seen(graph, pair, metric, places, base, instead, totals=totals)
        return replace(found, entries=entries, retained=retained)

    @staticmethod
    def with_gradients(
        graph: HookGraph,
        clean: Inputs,
        corrupt: Inputs | None,
        metric: Metric,
        places: Sequence[Location],
        instead: Instead | None = None,
    ) -> "Contrast":
        """Run both inputs; the clean run keeps the gradient at each place. For the rest see `of`."""
        pair = prepare_pair(graph, clean, corrupt)
        graph = _looked_at(graph, places)
        wanted = [*places, *(p.grad for p in places)]
        base = graph.run(pair[0], save=wanted, metric=metric, logits=False)
        return _seen(graph, pair, metric, places, base, instead)

    @staticmethod
    def with_entries(
        graph: HookGraph,
        clean: Inputs,
        corrupt: Inputs | None,
        metric: Metric,
        places: Sequence[Location],
        instead: Instead | None = None,
    ) -> "Contrast":
        """Run both inputs; the clean run keeps the boundary before each place, from which to replay."""
        return Contrast.of(graph, clean, corrupt, metric, places, replays=True, instead=instead)

    @staticmethod
    def for_patches(
        graph: HookGraph,
        clean: Inputs,
        corrupt: Inputs | None,
        metric: Metric,
        places: Sequence[Location],
        instead: Instead | None = None,
    ) -> "Contrast":
        """Run both inputs, to patch parts of the places from the latest point on: their whole locations are
        seen, too, and what the model remembers of each position is kept.
        """
        seen = list(dict.fromkeys([*places, *(p.whole for p in places)]))
        found = Contrast.of(graph, clean, corrupt, metric, seen, replays=True, retains=True, instead=instead)
        return replace(found, places=places)

    @property
    def measured(self) -> Float[Tensor, " batch"]:
        """The metric of the clean run."""
        return finite_metric(self.base)

    @cached_property
    def deltas(self) -> dict[Location, Float[Tensor, "..."]]:
        """corrupt - clean at each place; 0 for scores that are masked, which no patch is to unmask."""
        return {place: _difference(place, self.clean[place], self.corrupt[place]) for place in self.places}

    def sites(self) -> list[list[Location]]:
        """The places that are moved together: latents of a dictionary and its error; any other one alone."""
        found: dict[object, list[Location]] = {}
        seen = Counter[tuple[object, ...]]()
        for place in self.places:
            kind = (place.site, place.subgraph, place.type.name)
            # Parts of latents beside all of them are moved apart: nothing is moved twice.
            together = (*self._dictionary(place), seen[kind]) if place.type in (LATENTS, ERROR) else place
            seen[kind] += 1
            found.setdefault(together, []).append(place)
        return list(found.values())

    def _dictionary(self, place: Location) -> tuple[object, ...]:
        """What a latent or an error belongs to: a dictionary, of which the error may stand elsewhere; of one
        with several sets of latents those at one site.
        """
        owner = subgraph_of(self.graph, place)
        return (owner.name, *owner.sites) if _is_single(owner) else (place.subgraph, place.site)

    def entry(self, site: Sequence[Location]) -> Location | None:
        """The boundary before a site."""
        found = [self.entries.get(place) for place in site]
        return None if None in found else min((x for x in found if x), key=lambda x: x.order)

    def carrier(self, site: Sequence[Location]) -> Location | None:
        """Where what goes on moves along a line if the places of a site do: the location at which their
        dictionary stands. None where that is not known, or the clean run did not keep it.
        """
        found = {_carrier_of(self.graph, place) for place in site}
        carrier = found.pop() if len(found) == 1 else None
        return carrier if carrier in self.base else None


def _carrier_of(graph: HookGraph, place: Location) -> Location | None:
    """The site of the dictionary in which a place lies, if what goes on from there moves along a line where
    the values at the place do, and nothing else happens there; None otherwise.
    """
    site = place.site
    if site is None or site.site is not None or place != place.whole:
        return None
    here = [s for s in graph.subgraphs if any(x.root == site for x in s.sites)]
    hooked = any(x.activation.root == site for x, _ in graph.registrations)
    if hooked or any(s.acts for s in here):
        return None
    return site if subgraph_of(graph, place).is_linear(place) else None


def subgraph_of(graph: HookGraph, place: Location) -> AbstractSubgraph:
    """The subgraph that brings a location into being."""
    return next(s for s in graph.subgraphs if place.whole in s.locations)


def _is_single(subgraph: AbstractSubgraph) -> bool:
    return sum(x.type == LATENTS for x in subgraph.locations) == 1


def _looked_at(graph: HookGraph, places: Sequence[Location]) -> HookGraph:
    """The graph of which every pass computes attention as the clean one does, which looks into it."""
    for place in dict.fromkeys(p.whole for p in places if Dimension.KEY_POS in p.type.dims):
        graph = graph.hook(place, looked_at)
    return graph


def _seen(
    graph: HookGraph,
    pair: tuple[Prepared, Prepared | None],
    metric: Metric,
    places: Sequence[Location],
    base: Run,
    instead: Instead | None,
    *,
    totals: bool = True,
) -> Contrast:
    """The contrast of a clean run with the corrupt inputs, or with what stands in for them."""
    first, second = pair
    base = replace(base, inputs=first)
    measured, total = finite_metric(base), None
    if second is None:
        stand_in = instead or (lambda _, value: torch.zeros_like(value))
        corrupt: Values = {place: stand_in(place, base[place]) for place in places}
    else:
        run = graph.run(second, save=places, metric=metric if totals else None, logits=False)
        corrupt, total = run, finite_metric(run) - measured if totals else None
    clean = {place: base[place] for place in places}
    return Contrast(graph, metric, places, first, second, base, clean, corrupt, total)


def _difference(place: Location, clean: Tensor, corrupt: Tensor) -> Tensor:
    delta = corrupt - clean
    if not place.type.name.endswith("scores"):
        return delta
    return delta.masked_fill(masked_cells(clean), 0.0)


def contracted(place: Location, effect: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """An effect summed along the axes on which the place is one node, which stay with size 1."""
    axes = [i for i, dim in enumerate(place.dims) if dim in place.type.joint]
    return effect.sum(axes, keepdim=True) if axes else effect
