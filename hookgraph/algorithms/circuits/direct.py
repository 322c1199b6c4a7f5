"""`edges`: the direct effect of each node on the metric through each later one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, final, get_args

from hookgraph.algorithms.circuits.blocks import Block
from hookgraph.algorithms.circuits.nodes import Ends, Nodes, carrier, nodes_of, places_of
from hookgraph.algorithms.circuits.pulling import Sources, Targets, Way, weights
from hookgraph.algorithms.circuits.results import Aggregation, Edges, Pair, aggregated
from hookgraph.algorithms.circuits.routes import Route, is_sum, may_be_identity, routes, summed
from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.effects.quadrature import Quadrature
from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.streams import RESIDUALS, updates
from hookgraph.errors import HookGraphError, nearest
from hookgraph.graph.abstract import Inputs, Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location

EdgeMethod: TypeAlias = Literal["attrib", "ig", "ig_inputs", "relp"]
"""How the gradient at a node is taken, as in `patching_effect`."""


def edges(
    graph: HookGraph,
    clean: Inputs,
    corrupt: Inputs | None,
    metric: Metric,
    source: Ends,
    target: Ends,
    *,
    method: EdgeMethod = "attrib",
    steps: int = 10,
    quadrature: Quadrature = "gauss-legendre",
    node_threshold: float = 0.0,
    edge_threshold: float = 0.0,
    aggregation: Aggregation = "none",
    joint: Sequence[str] = (),
    stop: Sequence[Location] = (),
    progress: bool | None = None,
) -> Edges:
    """What each source node does to the metric through each target node, and through no other in between.

    weight(u -> v) = [Σ over v's own coordinates of dm/dv · dv/du] · (corrupt - clean at u)

    where dm/dv is the gradient by `method`, and dv/du is taken in the clean run with gradients stopped at
    every other site of sources, targets and `stop` between the two. Nodes of a dictionary are read as
    functions of what their site holds, and go on as what they add to it; an error is one node per position,
    on both ends. Between two sites only the layers between them are executed; where by the ontology only the
    stream leads from one to the other, none are.

    Args:
        graph: the hooked model, with the subgraphs whose nodes are meant.
        clean: what is run.
        corrupt: as many tokens with the same mask; None stands for zero in every node.
        metric: logits -> one number per example.
        source: locations, or subgraphs: their latents and errors.
        target: the same, of what lies behind.
        method: how the gradient at a target is taken.
        steps: points of the path integral.
        quadrature: its rule.
        node_threshold: nodes with a smaller or equal |effect| in an example are left out, on both ends.
        edge_threshold: edges with a smaller or equal |weight|, after aggregation, are left out.
        aggregation: `none` keeps positions and takes the mean over examples, `sum` adds positions up too,
            `examples` keeps both.
        joint: axes along which values are one node, such as `d_head` of heads.
        stop: further locations that no edge passes through.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        HookGraphError: an unknown option, no way from a source to a target, or hooks inside the subgraphs.
        UnknownLocationError: the graph has no such location.
        SubgraphError: a subgraph does not tell how its nodes change with its site.
        ShapeMismatchError: clean and corrupt differ in shape or mask.
        MetricError: the metric is not one finite number per example, or does not depend on a location.

    Source: Marks et al., "Sparse feature circuits", arXiv:2403.19647.
    """
    check_options(method, aggregation)
    starts, ends = places_of(graph, source), places_of(graph, target)
    sites = {carrier(x) for x in (*starts, *ends)} | {graph.check(x).whole for x in stop}
    if not routes(map(carrier, starts), map(carrier, ends), sites):
        raise HookGraphError(
            f"nothing leads from {starts[0]} to {ends[-1]} directly: sources come before targets, with no "
            "site of the stream in between"
        )
    places = list(dict.fromkeys([*starts, *ends]))
    effect = patching_effect(
        graph, clean, corrupt, metric, places, method, steps=steps, quadrature=quadrature, progress=progress
    )
    work = DirectEdges.of(graph, clean, effect, places, sites, joint, node_threshold)
    found = work.between(starts, ends, progress)
    examples = len(next(iter(effect.effects.values())))
    blocks = {k: aggregated(v, aggregation, examples).kept(edge_threshold) for k, v in found.items()}
    return Edges(blocks, aggregation, examples, effect.convention, graph.binding.metadata)


def check_options(method: str, aggregation: str) -> None:
    """Refuse unknown ones.

    Raises:
        HookGraphError: naming it, and near ones.
    """
    for name, value, known in (
        ("method", method, get_args(EdgeMethod)),
        ("aggregation", aggregation, get_args(Aggregation)),
    ):
        if value not in known:
            raise HookGraphError(f"{name}={value!r} is unknown: {nearest(value, known)}")


@final
@dataclass(frozen=True, eq=False)
class DirectEdges:
    """Everything that edges between some places are made of.

    Args:
        graph: with the subgraphs.
        bare: without those whose nodes are meant: downstream values are read, not spliced.
        base: the clean run, with what carries nodes, and the boundaries at which replays begin.
        sites: at which gradients are stopped.
        targets: the nodes of each place with their gradients.
        sources: the same with their changes.
    """

    graph: HookGraph
    bare: HookGraph
    inputs: Prepared
    base: Run
    sites: frozenset[Location]
    targets: Mapping[Location, Nodes]
    sources: Mapping[Location, Nodes]

    @staticmethod
    def of(
        graph: HookGraph,
        clean: Inputs,
        effect: PatchingEffect,
        places: Sequence[Location],
        sites: set[Location],
        joint: Sequence[str],
        threshold: float,
    ) -> "DirectEdges":
        """One run of the clean inputs, and the nodes that count.

        Raises:
            HookGraphError: there are hooks inside the subgraphs.
        """
        bare = _bare(graph, places)
        carriers = list(dict.fromkeys(map(carrier, places)))
        entries = [x for x in map(bare.entry, carriers) if x is not None]
        residuals = _residuals(graph)
        known = [
            y
            for r in routes(carriers, carriers, sites)
            if may_be_identity(r, updates(graph))
            for y in summed(r, residuals, updates(graph))
        ]
        inputs = graph.binding.prepare(clean)
        base = graph.run(inputs, save=list(dict.fromkeys([*entries, *carriers, *known])))
        sources, targets = (
            {x: nodes_of(effect, x, threshold, joint, changes=changes) for x in places}
            for changes in (True, False)
        )
        return DirectEdges(graph, bare, inputs, base, frozenset(sites), targets, sources)

    def between(
        self, starts: Sequence[Location], ends: Sequence[Location], progress: bool | None = None
    ) -> dict[Pair, Block]:
        """The edges from some places to others, per example."""
        found: dict[Pair, Block] = {}
        ways = routes(map(carrier, starts), map(carrier, ends), self.sites)
        pulled: dict[Location, Targets] = {}
        pushed: dict[Location, Sources] = {}
        with Progress("edges", len(ways), shown=progress) as bar:
            for route in ways:
                way = self._way(route)
                origins = [x for x in starts if carrier(x) == route.start]
                for place in origins:
                    if place not in pushed:
                        pushed[place] = Sources.of(self.graph, self.sources[place], self.base[route.start])
                for place in (x for x in ends if carrier(x) == route.end):
                    if place not in pulled:
                        pulled[place] = Targets.of(self.graph, self.targets[place], self.base[route.end])
                    blocks = weights(way, pulled[place], [pushed[x] for x in origins])
                    found.update(((x, place), b) for x, b in zip(origins, blocks, strict=True))
                bar.advance()
        return found

    def _way(self, route: Route) -> Way:
        """The pass from one carrier to the other, nothing executed before or behind."""
        residuals, written = _residuals(self.graph), updates(self.graph)
        if may_be_identity(route, written) and is_sum(self.base, route, residuals, written):
            return Way(self.base[route.start], self.base[route.end], identity=True)
        graph = self.bare
        for site in route.stops:
            graph = graph.stop_gradient(site)
        entry, save = self.bare.entry(route.start), [route.start, route.end]
        with graph.binding.frozen():
            if entry is None:
                run = graph.run(self.inputs, save=save, grad=True)
            else:
                run = graph.replay(self.base, entry, save=save, grad=True)
        return Way(run[route.start], run[route.end])


def _residuals(graph: HookGraph) -> list[Location]:
    return [x for x in graph.locations if x.type in RESIDUALS and x.site is None]


def _bare(graph: HookGraph, places: Sequence[Location]) -> HookGraph:
    """The graph without the subgraphs of some places.

    Raises:
        HookGraphError: hooks inside them would be lost.
    """
    names = {(x.site, x.subgraph) for x in places if x.site is not None}
    for location, _ in graph.registrations:
        if (location.site, location.subgraph) in names:
            raise HookGraphError(
                f"{location} is hooked: edges are those of the model as it is, so leave hooks inside the "
                "subgraphs out"
            )
    left = tuple(s for s in graph.subgraphs if not any((x.site, x.subgraph) in names for x in s.locations))
    return replace(graph, subgraphs=left)
