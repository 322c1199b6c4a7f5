"""The nodes of a location that count, and what carries them through the model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.sites import chosen_places
from hookgraph.errors import HookGraphError
from hookgraph.graph.abstract import AbstractSubgraph
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.autoencoder import LATENTS_PRE, RECONSTRUCTION
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

Ends: TypeAlias = Location | AbstractSubgraph | Sequence[Location | AbstractSubgraph]
"""What edges start from, or lead to. A subgraph stands for the nodes that it divides its site into."""


def places_of(graph: HookGraph, ends: Ends) -> list[Location]:
    """The locations whose nodes are meant, each once, in causal order.

    Raises:
        HookGraphError: there is none, or one is a gradient, a part, or inside a nested subgraph.
        UnknownLocationError: the graph has no such location.
    """
    given = [ends] if isinstance(ends, Location | AbstractSubgraph) else list(ends)
    found: list[Location] = []
    for end in given:
        found += [end] if isinstance(end, Location) else _divided(end.locations)
    places = chosen_places(graph, found)
    for place in places:
        if place.index:
            raise HookGraphError(f"{place} is a part: edges are between nodes of whole locations")
        if place.site is not None and place.site.site is not None:
            raise HookGraphError(f"{place} is inside a nested subgraph: take edges of the outer one")
    return sorted(places, key=lambda x: x.order)


def _divided(locations: Iterable[Location]) -> list[Location]:
    """Those that together are the value of the site: latents and error, not what leads to them."""
    return [x for x in locations if x.type not in (LATENTS_PRE, RECONSTRUCTION)]


def carrier(place: Location) -> Location:
    """What the model itself goes on with: the site of a subgraph's location, else the location itself."""
    return place if place.site is None else place.site


@final
@dataclass(frozen=True, eq=False)
class Nodes:
    """Some nodes of a location.

    Args:
        place: the location.
        dims: the axes that tell its nodes apart, the batch first.
        joint: the other ones.
        index: of each node, by those axes.
        effect: of each node, on its own example.
        values: of each node what is asked of it, its gradient or its change, over the joint axes.
    """

    place: Location
    dims: tuple[Dimension, ...]
    joint: tuple[Dimension, ...]
    index: Int[Tensor, "..."]
    effect: Float[Tensor, "..."]
    values: Float[Tensor, "..."]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def chosen(self) -> Int[Tensor, "..."] | None:
        """The last axis of each node of a subgraph; None where all of it is one node."""
        return self.index[:, 2] if len(self.dims) > 2 else None

    def along(self, value: Shaped[Tensor, "..."], *, leading: int = 0) -> Shaped[Tensor, "..."]:
        """A tensor over the location's axes, with the joint ones moved behind the others, as a view."""
        dims = self.place.dims
        order = [dims.index(d) + leading for d in (*self.dims, *self.joint)]
        return value.permute(*range(leading), *order)


def nodes_of(
    effect: PatchingEffect, place: Location, threshold: float, joint: Sequence[str], *, changes: bool
) -> Nodes:
    """The nodes with |effect| > threshold, with their change, or else their gradient.

    Raises:
        HookGraphError: nodes of several examples would be one, or those of a subgraph of several positions.
    """
    together = tuple(d for d in place.dims if d in place.type.joint or d in joint)
    dims = tuple(d for d in place.dims if d not in together)
    if place.dims[0] != Dimension.BATCH or Dimension.BATCH in together:
        raise HookGraphError(f"{place} has no axis per example: edges are those of each example")
    if place.site is not None and dims[:2] != (Dimension.BATCH, Dimension.POS):
        raise HookGraphError(f"{place}: the nodes of a subgraph are told apart by position, pos is not joint")
    axes = [i for i, d in enumerate(place.dims) if d in together]
    each = effect.effects[place].sum(axes) if axes else effect.effects[place]
    index = (each.abs() > threshold).nonzero()
    group = effect.deltas if changes else effect.grads
    nodes = Nodes(place, dims, together, index, each[tuple(index.T)], each)
    return replace(nodes, values=nodes.along(group[place])[tuple(index.T)])


def grouped(nodes: Nodes, columns: int) -> Int[Tensor, "..."]:
    """Which group each node belongs to: those of one example, or (columns = 2) of one position of it.

    Groups are numbered by the first columns of their index, row by row.
    """
    if not len(nodes):
        return torch.zeros(0, dtype=torch.long)
    return nodes.index[:, 0] if columns == 1 else nodes.index[:, 0] * _POSITIONS + nodes.index[:, 1]


_POSITIONS = 1 << 32
"""More positions than any sequence has."""


def lanes(groups: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """A number for each node, different within its group: nodes of one number are differentiated together."""
    order = torch.argsort(groups, stable=True)
    ordered = groups[order]
    first = torch.searchsorted(ordered, ordered)
    ranks = torch.arange(len(groups), device=groups.device) - first
    return torch.empty_like(ranks).scatter(0, order, ranks)
