"""`discover_circuit`: the nodes that matter and the edges between them, over a stream of pairs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import final

import torch

from hookgraph.algorithms.batches import Batch, PairBatch, batches
from hookgraph.algorithms.circuits.ablating import Ablation, StandIn, means_of
from hookgraph.algorithms.circuits.blocks import Block
from hookgraph.algorithms.circuits.circuit import Circuit, only
from hookgraph.algorithms.circuits.direct import DirectEdges, EdgeMethod, check_options
from hookgraph.algorithms.circuits.nodes import Ends, carrier, nodes_of, places_of
from hookgraph.algorithms.circuits.results import Aggregation, Edges, Pair, aggregated, node_at
from hookgraph.algorithms.circuits.routes import blocks
from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.effects.quadrature import Quadrature
from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.interventions.statistics import AblationStatistics
from hookgraph.algorithms.progress import Progress
from hookgraph.errors import HookGraphError, MetricError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import LOGITS


def discover_circuit(
    graph: HookGraph,
    pairs: Iterable[Batch],
    metric: Metric | None,
    at: Ends,
    *,
    node_threshold: float = 0.1,
    edge_threshold: float = 0.01,
    aggregation: Aggregation = "sum",
    method: EdgeMethod = "ig",
    steps: int = 10,
    quadrature: Quadrature = "gauss-legendre",
    joint: Sequence[str] = (),
    ablation: Ablation = "corrupt",
    statistics: AblationStatistics | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Circuit:
    """The nodes whose effect exceeds a threshold, and the direct effects between them.

    For each batch of pairs: the effect of every node; the edges between those of |effect| > node_threshold
    in their own example, as `edges` states them; the edges to the metric. Then both are aggregated, and what
    exceeds the thresholds is kept. Batches stream through, except where means are to be taken of them first:
    what is kept does not grow with them.

    Args:
        graph: the hooked model, with the subgraphs whose nodes are meant.
        pairs: batches (clean, corrupt), or (clean, corrupt, metric) where answers differ.
        metric: logits -> one number per example.
        at: subgraphs and locations; nodes of raw locations are their coordinates, less the joint axes.
        node_threshold: of |effect|.
        edge_threshold: of |weight|, after aggregation; `math.inf` for nodes alone, which saves the time.
        aggregation: `sum` adds up the positions, `none` keeps them; both are means over examples.
        method: how gradients are taken.
        steps: points of the path integral.
        quadrature: its rule.
        joint: axes along which values are one node, such as `d_head`.
        ablation: what a node's value is compared to: `corrupt`, its value in the corrupt input, or zero where
            there is none; `mean`, `zero` and `resample` as `faithfulness` has them.
        statistics: means to use, from `mean_activations` of the places.
        seed: of the permutation of `resample`.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        HookGraphError: an unknown option, no nodes to look at, or one example to resample.
        InputError: there are no pairs.
        SubgraphError: a subgraph does not tell how its nodes change with its site.
        MetricError: nothing is measured, or not one finite number per example.

    Source: Marks et al., "Sparse feature circuits", arXiv:2403.19647.
    """
    check_options(method, aggregation)
    if aggregation == "examples":
        raise HookGraphError("a circuit is that of many examples: aggregation='sum' or 'none'")
    places = places_of(graph, at)
    stream: Iterable[PairBatch] = batches(pairs, metric)
    if ablation == "mean" and statistics is None:
        stream = every = list(stream)
        statistics = means_of(graph, [batch.clean for batch in every], places)
    settings = _Settings(
        graph,
        places,
        node_threshold,
        edge_threshold,
        aggregation,
        method,
        steps,
        quadrature,
        tuple(joint),
        StandIn.of(graph, [], places, ablation, statistics, seed),
    )
    parts: list[_Part] = []
    with Progress("circuit", None, shown=progress) as bar:
        for batch in stream:
            part = settings.part(batch)
            parts = [_Part.merged([*parts, part])]
            bar.advance()
    found = parts[0]
    nodes = {k: v for k, v in found.nodes.items() if abs(v) > node_threshold}
    return Circuit(nodes, only(found.edges.threshold(edge_threshold), nodes), tuple(places))


@final
@dataclass(frozen=True, eq=False)
class _Part:
    """What one or several batches tell."""

    nodes: dict[Location, float]
    edges: Edges

    @staticmethod
    def merged(parts: Sequence["_Part"]) -> "_Part":
        total = sum(p.edges.examples for p in parts)
        nodes: dict[Location, float] = {}
        for part in parts:
            for node, effect in part.nodes.items():
                nodes[node] = nodes.get(node, 0.0) + effect * part.edges.examples / total
        return _Part(nodes, Edges.merged([p.edges for p in parts]))


@final
@dataclass(frozen=True, eq=False)
class _Settings:
    """What is looked at, and how."""

    graph: HookGraph
    places: Sequence[Location]
    threshold: float
    least: float
    aggregation: Aggregation
    method: EdgeMethod
    steps: int
    quadrature: Quadrature
    joint: tuple[str, ...]
    stand_in: StandIn
    sites: frozenset[Location] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", frozenset(map(carrier, self.places)))

    def part(self, batch: PairBatch) -> _Part:
        """Nodes and edges of one batch."""
        effect = self._effect(self.graph, batch, self.places, self.method)
        examples = len(next(iter(effect.effects.values())))
        found: dict[Pair, Block] = {}
        if self.least != inf:
            work = DirectEdges.of(
                self.graph, batch.clean, effect, self.places, set(self.sites), self.joint, self.threshold
            )
            found = {
                **work.between(self.places, self.places, progress=False),
                **self._to_metric(batch, effect),
            }
        kept = {k: aggregated(v, self.aggregation, examples) for k, v in found.items()}
        how = effect.convention
        if self.stand_in.ablation == "resample":
            how = replace(how, ablation="resample")
        edges = Edges(kept, self.aggregation, examples, how, self.graph.binding.metadata)
        return _Part(self._nodes(effect, examples), edges)

    def _effect(
        self, graph: HookGraph, batch: PairBatch, places: Sequence[Location], method: EdgeMethod
    ) -> PatchingEffect:
        other = self.stand_in
        # Without corrupt inputs, zero stands in.
        corrupt = (
            None if other.ablation == "corrupt" and batch.corrupt is None else other.inputs(graph, batch)
        )
        return patching_effect(
            graph, batch.clean, corrupt, batch.metric, places, method,
            steps=self.steps, quadrature=self.quadrature, statistics=other.statistics, progress=False,
        )  # fmt: skip

    def _nodes(self, effect: PatchingEffect, examples: int) -> dict[Location, float]:
        """The effect of every node, aggregated."""
        found: dict[Location, float] = {}
        for place in self.places:
            nodes = nodes_of(effect, place, 0.0, self.joint, changes=True)
            single = Block(nodes.dims, (), nodes.index, nodes.index[:, :0], nodes.effect)
            total = aggregated(single, self.aggregation, examples)
            for row, value in zip(total.source.tolist(), total.values.tolist(), strict=True):
                found[node_at(place, total.source_dims, row)] = value
        return found

    def _to_metric(self, batch: PairBatch, effect: PatchingEffect) -> dict[Pair, Block]:
        """The direct effect on the metric, from every place that no later site of the stream cuts off.

        Where no site follows, it is the node's effect itself.
        """
        found: dict[Pair, Block] = {}
        for place in self.places:
            behind = [x for x in self.sites if carrier(place).precedes(x)]
            if any(blocks(x, carrier(place)) for x in behind):
                continue
            direct: PatchingEffect | None = effect
            if behind:
                graph = self.graph
                for site in behind:
                    graph = graph.hook(site.grad, torch.zeros_like)
                direct = self._direct(graph, batch, place)
            if direct is not None:
                found[place, LOGITS] = self._block(direct, effect, place)
        return found

    def _direct(self, graph: HookGraph, batch: PairBatch, place: Location) -> PatchingEffect | None:
        """Effects past later sites; None where nothing leads past them."""
        try:
            return self._effect(graph, batch, [place], "attrib")
        except MetricError:
            return None

    def _block(self, direct: PatchingEffect, effect: PatchingEffect, place: Location) -> Block:
        counted = nodes_of(effect, place, self.threshold, self.joint, changes=True)
        axes = [i for i, d in enumerate(place.dims) if d in counted.joint]
        each = direct.effects[place].sum(axes) if axes else direct.effects[place]
        return Block(counted.dims, (), counted.index, counted.index[:, :0], each[tuple(counted.index.T)])
