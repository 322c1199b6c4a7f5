"""`Block`: the edges from the nodes of one location to those of another, sparse on both ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.ontology.dimensions import Dimension


@final
@dataclass(frozen=True, eq=False, repr=False)
class Block:
    """Edges as coordinates and values. No entry is stored for what is not an edge.

    Args:
        source_dims: the axes that tell the nodes apart at which edges start.
        target_dims: those of the nodes at which they end.
        source: of each edge, the node at which it starts, by those axes.
        target: the node at which it ends.
        values: its weight.
    """

    source_dims: tuple[Dimension, ...]
    target_dims: tuple[Dimension, ...]
    source: Int[Tensor, "..."]
    target: Int[Tensor, "..."]
    values: Float[Tensor, "..."]

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        ends = f"{' '.join(self.source_dims) or 'one node'} -> {' '.join(self.target_dims) or 'one node'}"
        return f"Block of {len(self)} edges, {ends}"

    def kept(self, threshold: float) -> "Block":
        """The edges with |weight| > threshold."""
        return self.where(self.values.abs() > threshold)

    def where(self, chosen: Tensor) -> "Block":
        """The edges that a mask, or a list of numbers, chooses."""
        return Block(
            self.source_dims, self.target_dims, self.source[chosen], self.target[chosen], self.values[chosen]
        )

    def scaled(self, factor: float) -> "Block":
        """The same edges, every weight times a factor."""
        return Block(self.source_dims, self.target_dims, self.source, self.target, self.values * factor)

    def without(self, dims: Sequence[Dimension]) -> "Block":
        """Summed over some axes of both ends."""
        keep_s = [i for i, d in enumerate(self.source_dims) if d not in dims]
        keep_t = [i for i, d in enumerate(self.target_dims) if d not in dims]
        return Block(
            tuple(self.source_dims[i] for i in keep_s),
            tuple(self.target_dims[i] for i in keep_t),
            self.source[:, keep_s],
            self.target[:, keep_t],
            self.values,
        ).merged()

    def merged(self) -> "Block":
        """Each edge once: the weights of those between the same nodes added."""
        both = torch.cat([self.source, self.target], dim=1)
        if not len(self) or not both.shape[1]:
            empty = both[: min(1, len(self))]
            values = self.values.sum(0, keepdim=True) if len(self) else self.values
            return self._with(empty, values)
        keys = _keys(both)
        distinct, places = keys.unique(return_inverse=True)
        values = self.values.new_zeros(len(distinct)).index_add(0, places, self.values)
        first = torch.empty_like(distinct).scatter(0, places, torch.arange(len(keys), device=keys.device))
        return self._with(both[first], values)

    def _with(self, both: Tensor, values: Tensor) -> "Block":
        ends = len(self.source_dims)
        return Block(self.source_dims, self.target_dims, both[:, :ends], both[:, ends:], values)

    @staticmethod
    def joined(blocks: Sequence["Block"]) -> "Block":
        """The edges of all blocks, each once, weights added."""
        first = blocks[0]
        return Block(
            first.source_dims,
            first.target_dims,
            torch.cat([b.source for b in blocks]),
            torch.cat([b.target for b in blocks]),
            torch.cat([b.values for b in blocks]),
        ).merged()

    def to_sparse(
        self, source: Mapping[Dimension, int], target: Mapping[Dimension, int]
    ) -> Float[Tensor, "..."]:
        """As a sparse tensor over the axes of the source, then those of the target, of these sizes."""
        shape = [*(source[d] for d in self.source_dims), *(target[d] for d in self.target_dims)]
        both = torch.cat([self.source, self.target], dim=1).T
        return torch.sparse_coo_tensor(both, self.values, shape, check_invariants=True).coalesce()


def _keys(index: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """One number for each row, the same for equal rows only."""
    sizes = (index.amax(0) + 1).tolist()
    keys = index.new_zeros(len(index))
    room = 1
    for size in sizes:
        room *= size
    if room >= 1 << 62:
        return index.unique(dim=0, return_inverse=True)[1]
    for column, size in zip(index.T, sizes, strict=True):
        keys = keys * size + column
    return keys
