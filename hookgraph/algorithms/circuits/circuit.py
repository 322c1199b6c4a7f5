"""`Circuit`: the nodes that matter, the edges between them, and those to the metric."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch

from hookgraph.algorithms.circuits import drawing
from hookgraph.algorithms.circuits.results import Edge, Edges
from hookgraph.algorithms.ranking import Node, Ranking
from hookgraph.errors import HookGraphError
from hookgraph.graph import storage
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import LOGITS

if TYPE_CHECKING:
    import matplotlib.figure
    import networkx
    import pandas

_KIND = "circuit"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Nodes with their effects, edges with their weights. `logits` stands for the metric.

    Args:
        nodes: each a part of a location, with its effect.
        edges: between them, and from them to the logits.
        places: every location that was looked at, whether nodes of it are in the circuit or not.
    """

    nodes: Mapping[Location, float]
    edges: Edges
    places: tuple[Location, ...]

    @property
    def metadata(self) -> Mapping[str, str]:
        """The model's name, revision and dtype."""
        return self.edges.metadata

    def top(self, k: int = 10) -> Ranking:
        """The k nodes with the largest |effect|."""
        ordered = sorted(self.nodes.items(), key=lambda item: -abs(item[1]))
        return Ranking(tuple(Node(node, effect) for node, effect in ordered[:k]))

    def threshold(self, nodes: float = 0.0, edges: float = 0.0) -> "Circuit":
        """The circuit of the nodes with |effect| and the edges with |weight| above thresholds."""
        return self.within(node for node, effect in self.nodes.items() if abs(effect) > nodes).cut(edges)

    def largest(self, k: int) -> "Circuit":
        """The circuit of the k nodes with the largest |effect|."""
        return self.within(node.location for node in self.top(k))

    def within(self, nodes: Iterable[Location]) -> "Circuit":
        """The circuit of some of the nodes, with the edges between them.

        Raises:
            HookGraphError: one is not in the circuit.
        """
        chosen = dict.fromkeys(nodes)
        for node in chosen:
            if node not in self.nodes:
                raise HookGraphError(f"{node} is not in this circuit of {len(self.nodes)} nodes")
        kept = {node: effect for node, effect in self.nodes.items() if node in chosen}
        return replace(self, nodes=kept, edges=only(self.edges, kept))

    def cut(self, least: float) -> "Circuit":
        """The circuit without the edges with |weight| <= least."""
        return replace(self, edges=self.edges.threshold(least))

    def to_networkx(self) -> "networkx.DiGraph[str]":
        """A directed graph of the same names: nodes with `location`, `layer`, `effect`; edges with `weight`.

        Raises:
            HookGraphError: networkx is not installed.
        """
        return drawing.networkx_of(self.nodes, self.edges.each())

    def to_dot(self, most: int = 200) -> str:
        """The circuit in graphviz' language: layers from bottom to top, orange where the weight is positive,
        blue where it is negative, the thicker the larger. At most so many edges, the largest.
        """
        return drawing.dot_of(self.nodes, self._largest(most))

    def plot(self, most: int = 100) -> "matplotlib.figure.Figure":
        """The same as a figure.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        return drawing.figure_of(self.nodes, self._largest(most))

    def _largest(self, most: int) -> list[Edge]:
        return self.edges.top(most)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per node: location, layer, effect, and how many edges it has."""
        import pandas as pd

        into, out = dict.fromkeys(self.nodes, 0), dict.fromkeys(self.nodes, 0)
        for edge in self.edges.each():
            out[edge.source] = out.get(edge.source, 0) + 1
            into[edge.target] = into.get(edge.target, 0) + 1
        rows = [(str(x), x.root.layer, effect, into[x], out[x]) for x, effect in self.nodes.items()]
        return pd.DataFrame(rows, columns=["location", "layer", "effect", "edges in", "edges out"])

    def __repr__(self) -> str:
        mean = f"of {self.edges.examples} examples, {self.edges.aggregation} over positions"
        lines = [f"Circuit {mean}: {len(self.nodes)} nodes, {self.edges.count} edges"]
        if self.nodes:
            lines.append(repr(self.top(8)))
        return "\n".join([*lines, *map(drawing.told, self.edges.top(8))])

    def _repr_html_(self) -> str:
        tables = self.top(12)._repr_html_(), self.edges._repr_html_()  # pyright: ignore[reportPrivateUsage]
        return f"<p>{len(self.nodes)} nodes, {self.edges.count} edges</p>{''.join(tables)}"

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        tensors, header = self.edges.pack()
        effects = torch.tensor(list(self.nodes.values()), dtype=torch.float64)
        about = {"nodes": [str(x) for x in self.nodes], "places": [str(x) for x in self.places]}
        storage.write(path, _KIND, {**tensors, "effects": effects}, {**header, **about})

    @staticmethod
    def load(path: str | Path) -> "Circuit":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, not a saved circuit, or of locations that are not declared.
        """
        tensors, header = storage.read(path, _KIND)
        names = [storage.parse(path, x) for x in header["nodes"]]
        nodes = dict(zip(names, tensors["effects"].tolist(), strict=True))
        places = tuple(storage.parse(path, x) for x in header["places"])
        return Circuit(nodes, Edges.unpack(path, tensors, header), places)


def only(edges: Edges, nodes: Mapping[Location, float]) -> Edges:
    """The edges whose ends are both among some nodes, or the logits."""
    index: dict[Location, set[tuple[int, ...]]] = {}
    for node in nodes:
        index.setdefault(node.whole, set()).add(_numbers(node))
    blocks = {}
    for (source, target), block in edges.items():
        first = _rows_in(block.source.tolist(), index.get(source, set()))
        last = (
            [True] * len(block)
            if target == LOGITS
            else _rows_in(block.target.tolist(), index.get(target, set()))
        )
        chosen = torch.tensor([a and b for a, b in zip(first, last, strict=True)], dtype=torch.bool)
        if chosen.any():
            blocks[source, target] = block.where(chosen)
    return replace(edges, blocks=blocks)


def _numbers(node: Location) -> tuple[int, ...]:
    """The index of a node along its location's axes, those that are one node left out."""
    index = dict(node.index)
    found = [index[d] for d in node.type.dims if d in index]
    return tuple(i for i in found if isinstance(i, int))


def _rows_in(rows: Sequence[Sequence[int]], known: set[tuple[int, ...]]) -> list[bool]:
    return [tuple(row) in known for row in rows]
