"""Circuits as drawings: for networkx, for graphviz, and as a figure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from hookgraph.algorithms import plotting
from hookgraph.algorithms.circuits.results import Edge
from hookgraph.algorithms.plotting import LIGHT
from hookgraph.errors import HookGraphError
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

_CROWDED = 100

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import networkx


def networkx_of(nodes: Mapping[Location, float], edges: Iterable[Edge]) -> "networkx.DiGraph[str]":
    """A directed graph.

    Raises:
        HookGraphError: networkx is not installed.
    """
    try:
        import networkx as nx
    except ImportError as error:
        raise HookGraphError("this needs networkx: pip install 'hookgraph[graph]'") from error
    graph: networkx.DiGraph[str] = nx.DiGraph()
    for node, effect in nodes.items():
        graph.add_node(str(node), location=node, layer=node.root.layer, effect=effect)
    for edge in edges:
        for end in (edge.source, edge.target):
            if str(end) not in graph:
                graph.add_node(str(end), location=end, layer=end.root.layer, effect=None)
        graph.add_edge(str(edge.source), str(edge.target), weight=edge.weight)
    return graph


def dot_of(nodes: Mapping[Location, float], edges: Sequence[Edge]) -> str:
    """A drawing in graphviz' language."""
    largest, strongest = _largest(nodes.values()), _largest(e.weight for e in edges)
    lines = [
        "digraph circuit {",
        '  rankdir=BT; node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=10];',
    ]
    for rank, members in enumerate(_ranks(nodes, edges)):
        lines.append(f"  subgraph rank_{rank} {{ rank=same;")
        for node in members:
            effect = nodes.get(node, 0.0)
            shown = f"{label(node)}\\n{effect:+.3f}" if node in nodes else label(node)
            style = f'label="{shown}", fillcolor="{_shade(effect, largest)}", tooltip="{node}"'
            lines.append(f'    "{node}" [{style}];')
        lines.append("  }")
    for edge in edges:
        width = 0.3 + 3.0 * abs(edge.weight) / strongest
        colour = LIGHT.positive[1] if edge.weight > 0 else LIGHT.negative[1]
        style = f'penwidth={width:.2f}, color="{colour}", tooltip="{edge.weight:+.4f}"'
        lines.append(f'  "{edge.source}" -> "{edge.target}" [{style}];')
    return "\n".join([*lines, "}"]) + "\n"


def figure_of(nodes: Mapping[Location, float], edges: Sequence[Edge]) -> "matplotlib.figure.Figure":
    """A figure: a row per location that nodes are at, in causal order from bottom to top.

    Of very many nodes those are drawn that edges join.

    Raises:
        HookGraphError: matplotlib is not installed, or there is nothing to draw.
    """
    if len(nodes) > _CROWDED and edges:
        joined = {end for edge in edges for end in (edge.source, edge.target)}
        nodes = {node: effect for node, effect in nodes.items() if node in joined}
    ranks = _ranks(nodes, edges)
    if not ranks:
        raise HookGraphError("there is nothing to draw: this circuit has no nodes")
    figure = plotting.new_figure()
    widest = max(map(len, ranks))
    figure.set_size_inches(min(16.0, 2.0 + 1.1 * widest), 1.0 + 0.75 * len(ranks))
    axes = figure.subplots()
    places = {
        node: ((i + 0.5) / len(members) * widest, float(row))
        for row, members in enumerate(ranks)
        for i, node in enumerate(members)
    }
    _draw(axes, nodes, edges, places)
    axes.set_yticks(range(len(ranks)), [_row_name(members) for members in ranks])
    axes.set_xticks([])
    axes.set_ylim(-0.6, len(ranks) - 0.4)
    axes.set_xlim(0, widest)
    axes.tick_params(length=0, labelsize=8, labelcolor=LIGHT.muted)
    axes.spines[:].set_visible(False)
    return figure


def _draw(
    axes: "matplotlib.axes.Axes",
    nodes: Mapping[Location, float],
    edges: Sequence[Edge],
    places: Mapping[Location, tuple[float, float]],
) -> None:
    largest, strongest = _largest(nodes.values()), _largest(e.weight for e in edges)
    for edge in sorted(edges, key=lambda e: abs(e.weight)):
        (x0, y0), (x1, y1) = places[edge.source], places[edge.target]
        share = abs(edge.weight) / strongest
        colour = LIGHT.positive[1] if edge.weight > 0 else LIGHT.negative[1]
        axes.plot(
            [x0, x1], [y0, y1], color=colour, linewidth=0.3 + 2.7 * share, alpha=0.25 + 0.6 * share, zorder=1
        )
    for node, (x, y) in places.items():
        box = {
            "boxstyle": "round,pad=0.25",
            "fc": _shade(nodes.get(node, 0.0), largest),
            "ec": LIGHT.muted,
            "lw": 0.5,
        }
        axes.text(
            x, y, _short(node), ha="center", va="center", fontsize=7, color=LIGHT.ink, bbox=box, zorder=2
        )


def label(node: Location) -> str:
    """A node's name, quotes and backslashes safe."""
    return str(node).replace("\\", "\\\\").replace('"', '\\"')


def told(edge: Edge) -> str:
    """An edge in a line."""
    return f"{edge.weight:+.4f}  {edge.source} -> {edge.target}"


def _short(node: Location) -> str:
    index = [str(i) if d != Dimension.POS else f"@{i}" for d, i in node.index]
    return " ".join(index) or (node.type.name if node.site is not None else str(node))


def _row_name(members: Sequence[Location]) -> str:
    return str(members[0].whole) if members[0].site is None else f"{members[0].site}"


def _ranks(nodes: Mapping[Location, float], edges: Sequence[Edge]) -> list[list[Location]]:
    """The nodes of each site, in causal order: those of latents and of the error stand together."""
    every = dict.fromkeys([*nodes, *(e for edge in edges for e in (edge.source, edge.target))])
    ranks: dict[Location, list[Location]] = {}
    for node in every:
        ranks.setdefault(node.site or node.whole, []).append(node)
    ordered = sorted(ranks.items(), key=lambda item: item[0].order)
    return [sorted(members, key=lambda x: (x.order, str(x))) for _, members in ordered]


def _shade(effect: float, largest: float) -> str:
    """From the surface's colour to that of the sign."""
    if not effect:
        return LIGHT.surface
    share = min(1.0, abs(effect) / largest)
    strong = LIGHT.positive[0] if effect > 0 else LIGHT.negative[0]
    mixed = [round(a + (b - a) * share) for a, b in zip(_rgb(LIGHT.surface), _rgb(strong), strict=True)]
    return "#" + "".join(f"{c:02x}" for c in mixed)


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _largest(numbers: Iterable[float]) -> float:
    return max((abs(n) for n in numbers), default=0.0) or 1.0
