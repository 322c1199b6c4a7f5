"""`EdgeScores`: a score for every edge between components, and the circuits they select."""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.circuits.circuit import Circuit
from hookgraph.algorithms.circuits.results import Edge, Edges, Pair
from hookgraph.algorithms.circuits.roc import EdgeRoc
from hookgraph.errors import HookGraphError, nearest
from hookgraph.graph import storage
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import (
    ATTN_IN,
    ATTN_OUT,
    ATTN_Z,
    LOGITS,
    MIXER_IN,
    MIXER_OUT,
    MLP_IN,
    MLP_OUT,
)

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

Selection: TypeAlias = Literal["top", "greedy"]

_KIND = "edge scores"
_OWN = {MLP_IN: MLP_OUT, MIXER_IN: MIXER_OUT, ATTN_IN: ATTN_OUT}
"""What reads, and what it writes, where there are no heads."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores:
    """A score for every edge from a writer to a reader.

    Args:
        edges: the scores, mean over examples; of each pair of locations every edge, sources first.
    """

    edges: Edges

    def __len__(self) -> int:
        return self.edges.count

    def __getitem__(self, pair: Pair) -> Float[Tensor, "..."]:
        """The scores from one location to another: over the heads of both, where they have any."""
        block = self.edges[pair]
        shape = [int(c.max()) + 1 for c in (*block.source.T, *block.target.T)]
        return block.values.view(shape)

    @property
    def method(self) -> str:
        """How they were computed."""
        return self.edges.convention.method

    def top(self, k: int = 10) -> list[Edge]:
        """The k edges with the largest |score|."""
        return self.edges.top(k)

    def values(self) -> Float[Tensor, "..."]:
        """All scores, in the order of `edges.each()`."""
        return torch.cat([block.values for block in self.edges.values()])

    def nodes(self) -> dict[Location, float]:
        """The score of each writer: that of all its edges together, Δ · the gradient at its own output."""
        found: dict[Location, float] = {}
        for edge in self.edges.each():
            found[edge.source] = found.get(edge.source, 0.0) + edge.weight
        return found

    def circuit(self, top: int, how: Selection = "top", *, signed: bool = False) -> Circuit:
        """The circuit of the edges with the largest scores, less those that do not lead to the logits.

        * `top`: the `top` edges with the largest |score|; signed, those without which m falls most.
        * `greedy`: from the logits backwards, each time the largest of the edges into what is there already,
          until there are `top`: all of them lead to the logits.

        Raises:
            HookGraphError: an unknown way to select.
        """
        if how not in get_args(Selection):
            raise HookGraphError(f"how={how!r} is unknown: {nearest(how, get_args(Selection))}")
        select = _greedy if how == "greedy" else _largest
        places, chosen = select(list(self.edges.each()), top, signed, self._heads)
        kept = self.select(torch.tensor(places, dtype=torch.long))
        scores = self.nodes()
        ends = dict.fromkeys(x for e in chosen for x in (e.source, e.target) if x != LOGITS)
        nodes = {x: scores.get(x, sum(e.weight for e in chosen if e.target == x)) for x in ends}
        return Circuit(nodes, kept, tuple(dict.fromkeys(x.whole for x in ends)))

    def select(self, chosen: Tensor) -> Edges:
        """The edges of some numbers, counted as `edges.each()` does."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[chosen] = True
        blocks, start = {}, 0
        for pair, block in self.edges.items():
            own = mask[start : start + len(block)]
            start += len(block)
            if own.any():
                blocks[pair] = block.where(own)
        return Edges(
            blocks, self.edges.aggregation, self.edges.examples, self.edges.convention, self.edges.metadata
        )

    @property
    def _heads(self) -> Mapping[Location, int]:
        """How many heads each location has."""
        found: dict[Location, int] = {}
        for (source, target), block in self.edges.items():
            for place, index in ((source, block.source), (target, block.target)):
                if index.shape[1]:
                    found[place] = max(found.get(place, 0), int(index.max()) + 1)
        return found

    def auroc(self, truth: Iterable[tuple[Location, Location]]) -> float:
        """How well |score| tells true edges from the others: 1 where every true one is larger, 0.5 by chance.

        Raises:
            HookGraphError: as `roc`.
        """
        return self.roc(truth).area

    def roc(self, truth: Iterable[tuple[Location, Location]]) -> EdgeRoc:
        """The shares of true and of other edges that |score| finds, over its threshold.

        Raises:
            HookGraphError: a true edge is none of these, or there are true ones only, or none.
        """
        true = set(truth)
        edges = list(self.edges.each())
        marks = torch.tensor([(e.source, e.target) in true for e in edges])
        if int(marks.sum()) != len(true):
            known = {(e.source, e.target) for e in edges}
            lacking = next(pair for pair in true if pair not in known)
            raise HookGraphError(f"{lacking[0]} -> {lacking[1]} is no edge of these scores")
        if not marks.any() or bool(marks.all()):
            raise HookGraphError("there are no true edges, or no others: nothing to tell apart")
        sizes = torch.tensor([abs(e.weight) for e in edges], dtype=torch.float64)
        return EdgeRoc.of(sizes, marks, self.edges.metadata)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per edge: source, target and score."""
        return self.edges.to_frame()

    def __repr__(self) -> str:
        return f"EdgeScores by {self.method}: {self.edges!r}"

    def plot(self, most: int = 20) -> "matplotlib.figure.Figure":
        """The edges with the largest |score|.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        return self.edges.plot(most)

    def _repr_html_(self) -> str:
        return self.edges._repr_html_()  # pyright: ignore[reportPrivateUsage]

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        storage.write(path, _KIND, *self.edges.pack())

    @staticmethod
    def load(path: str | Path) -> "EdgeScores":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or no saved scores.
        """
        return EdgeScores(Edges.unpack(path, *storage.read(path, _KIND)))


Chosen: TypeAlias = tuple[list[int], list[Edge]]


def _largest(edges: list[Edge], top: int, signed: bool, heads: Mapping[Location, int]) -> Chosen:
    """The largest edges, pruned to those that lead to the logits."""
    order = sorted(range(len(edges)), key=lambda i: -_size(edges[i], signed))[:top]
    leading = {LOGITS}
    kept: set[int] = set()
    # Backwards: when an edge is looked at, every edge that its target could go on by has been.
    for i in sorted(order, key=lambda i: edges[i].target.order, reverse=True):
        if edges[i].target in leading:
            kept.add(i)
            leading.update(readers_of_writer(edges[i].source, heads))
    return sorted(kept), [edges[i] for i in sorted(kept)]


def _greedy(edges: list[Edge], top: int, signed: bool, heads: Mapping[Location, int]) -> Chosen:
    """Edges into what is there already, the largest first."""
    into: dict[Location, list[int]] = {}
    for i, edge in enumerate(edges):
        into.setdefault(edge.target, []).append(i)
    waiting: list[tuple[float, int]] = []
    reached: set[Location] = set()

    def reach(targets: Iterable[Location]) -> None:
        for target in targets:
            if target not in reached:
                reached.add(target)
                for i in into.get(target, []):
                    heapq.heappush(waiting, (-_size(edges[i], signed), i))

    reach([LOGITS])
    kept: list[int] = []
    while waiting and len(kept) < top:
        _, i = heapq.heappop(waiting)
        kept.append(i)
        reach(readers_of_writer(edges[i].source, heads))
    return sorted(kept), [edges[i] for i in sorted(kept)]


def _size(edge: Edge, signed: bool) -> float:
    return -edge.weight if signed else abs(edge.weight)


def readers_of_writer(writer: Location, heads: Mapping[Location, int]) -> Iterator[Location]:
    """What a writer is made of: of a head its queries, and the keys and values that it shares or owns."""
    if writer.type == ATTN_Z:
        head = dict(writer.index)[Dimension.HEAD]
        for place, count in heads.items():
            if place.layer == writer.layer and place.type != ATTN_Z and isinstance(head, int):
                group = heads[writer.whole] // count
                axis = Dimension.HEAD if Dimension.HEAD in place.type.dims else Dimension.KV_HEAD
                yield place.at(**{axis.value: head // group})
        return
    for reader, update in _OWN.items():
        if writer.type == update and writer.layer is not None:
            yield reader[writer.layer]
