"""`Edges`: weights between nodes, sparse on both ends."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, final

from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.algorithms.circuits.blocks import Block
from hookgraph.algorithms.effects.results import Convention
from hookgraph.errors import LocationError, nearest
from hookgraph.graph import storage
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

Aggregation: TypeAlias = Literal["sum", "none", "examples"]
"""What becomes of positions and examples:

* `sum`: summed over the positions of both ends, then the mean over examples.
* `none`: positions stay, the mean over examples.
* `examples`: both stay.
"""

Pair: TypeAlias = tuple[Location, Location]

_KIND = "edges"


@final
@dataclass(frozen=True, slots=True)
class Edge:
    """One edge: a part of a location, one of a later location, and the weight between them."""

    source: Location
    target: Location
    weight: float


@final
@dataclass(frozen=True, eq=False, repr=False)
class Edges(Mapping[Pair, Block]):
    """Weights between nodes, by the locations of both: `edges[early.latents, late.latents]`.

    Args:
        blocks: by source and target location.
        aggregation: what became of positions and examples.
        examples: over how many examples the weights are a mean.
        convention: what was computed.
        metadata: the model's name, revision and dtype.
    """

    blocks: Mapping[Pair, Block]
    aggregation: Aggregation
    examples: int
    convention: Convention
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def __getitem__(self, pair: Pair) -> Block:
        found = self.blocks.get(pair)
        if found is None:
            known = [f"{s} -> {t}" for s, t in self.blocks]
            wanted = " -> ".join(map(str, pair))
            raise LocationError(f"there are no edges {wanted}: {nearest(wanted, known)}")
        return found

    def __contains__(self, pair: object) -> bool:
        return pair in self.blocks

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def count(self) -> int:
        """How many edges there are."""
        return sum(map(len, self.blocks.values()))

    def threshold(self, least: float) -> "Edges":
        """The edges with |weight| > least."""
        return replace(self, blocks={pair: block.kept(least) for pair, block in self.items()})

    def each(self) -> Iterator[Edge]:
        """Every edge, in no particular order."""
        for pair, block in self.items():
            yield from _edges(pair, block)

    def top(self, k: int = 10) -> list[Edge]:
        """The k edges with the largest |weight|."""
        best: list[Edge] = []
        for pair, block in self.items():
            chosen = block.values.abs().topk(min(k, len(block))).indices
            best += _edges(pair, block.where(chosen))
        return nlargest(k, best, key=lambda edge: abs(edge.weight))

    def to_frame(self) -> "pandas.DataFrame":
        """One row per edge: source, target and weight."""
        return frame_of(list(self.each()))

    def __repr__(self) -> str:
        how = {"sum": "summed over positions, ", "none": "", "examples": "per example, "}[self.aggregation]
        mean = "" if self.aggregation == "examples" else f"mean of {self.examples} examples"
        lines = [f"{self.count} edges, {how}{mean}".rstrip(", ")]
        lines += [f"  {s} -> {t}: {len(block)}" for (s, t), block in self.items()]
        return "\n".join([*lines, _table(self.top(8))]) if self.count else "\n".join(lines)

    def plot(self, most: int = 20) -> "matplotlib.figure.Figure":
        """The weights of the largest edges.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        shown = self.top(most)
        names = [f"{edge.source} → {edge.target}" for edge in shown]
        return plotting.bars(names, [edge.weight for edge in shown], "weight", f"{self.count} edges")

    def _repr_html_(self) -> str:
        return frame_of(self.top(20)).to_html(float_format=lambda x: f"{x:+.4f}")

    def pack(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors to store, and the header that tells what they are."""
        tensors: dict[str, Tensor] = {}
        told: list[object] = []
        for i, ((source, target), block) in enumerate(self.items()):
            tensors |= {f"{i}/source": block.source, f"{i}/target": block.target, f"{i}/values": block.values}
            told.append([str(source), str(target), list(block.source_dims), list(block.target_dims)])
        about = {"aggregation": self.aggregation, "examples": self.examples, "blocks": told}
        return tensors, {**about, "convention": asdict(self.convention), "metadata": dict(self.metadata)}

    @staticmethod
    def unpack(path: str | Path, tensors: storage.Tensors, header: Mapping[str, object]) -> "Edges":
        """What `pack` returned."""
        blocks: dict[Pair, Block] = {}
        known: object = header["blocks"]
        for i, (source, target, s, t) in enumerate(known if isinstance(known, list) else []):
            pair = storage.parse(path, source), storage.parse(path, target)
            dims = tuple(map(Dimension, s)), tuple(map(Dimension, t))
            parts = (tensors[f"{i}/{name}"] for name in ("source", "target", "values"))
            blocks[pair] = Block(*dims, *parts)
        convention: object = header["convention"]
        return Edges(
            blocks,
            header["aggregation"],  # pyright: ignore[reportArgumentType] (as it was written)
            int(str(header["examples"])),
            Convention(**convention),  # pyright: ignore[reportCallIssue]
            header["metadata"],  # pyright: ignore[reportArgumentType]
        )

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        storage.write(path, _KIND, *self.pack())

    @staticmethod
    def load(path: str | Path) -> "Edges":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, not saved edges, or of locations that are not declared.
        """
        return Edges.unpack(path, *storage.read(path, _KIND))

    @staticmethod
    def merged(parts: "list[Edges]") -> "Edges":
        """Edges of several batches as those of all their examples: means weighted by their sizes."""
        total = sum(p.examples for p in parts)
        found: dict[Pair, list[Block]] = {}
        for part in parts:
            for pair, block in part.items():
                found.setdefault(pair, []).append(block.scaled(part.examples / total))
        return replace(parts[0], blocks={k: Block.joined(v) for k, v in found.items()}, examples=total)


def aggregated(block: Block, how: Aggregation, examples: int) -> Block:
    """Weights per example, as an aggregation has them."""
    if how == "examples":
        return block
    gone = (Dimension.BATCH,) if how == "none" else (Dimension.BATCH, Dimension.POS)
    return block.without(gone).scaled(1 / examples)


def node_at(place: Location, dims: tuple[Dimension, ...], index: list[int]) -> Location:
    """A node as a part of its location."""
    return place.at(**{d.value: i for d, i in zip(dims, index, strict=True)})


def frame_of(edges: list[Edge]) -> "pandas.DataFrame":
    """One row per edge."""
    import pandas as pd

    rows = [(str(e.source), str(e.target), e.weight) for e in edges]
    return pd.DataFrame(rows, columns=["source", "target", "weight"])


def _table(edges: list[Edge]) -> str:
    return frame_of(edges).to_string(index=False, float_format=lambda x: f"{x:+.4f}")


def _edges(pair: Pair, block: Block) -> Iterator[Edge]:
    weights = block.values.tolist()
    for s, t, weight in zip(block.source.tolist(), block.target.tolist(), weights, strict=True):
        yield Edge(node_at(pair[0], block.source_dims, s), node_at(pair[1], block.target_dims, t), weight)
