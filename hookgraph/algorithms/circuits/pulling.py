"""Edge weights between chosen nodes: batched gradients of many targets, read at active sources only.

The weight of u -> v is [Σ over v's own coordinates of left_v · dv/du] · delta_u. Targets are numbered so that
those of one number touch different examples (or, where the way from u to v mixes no positions, different
positions): they share one gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.algorithms.circuits.blocks import Block
from hookgraph.algorithms.circuits.nodes import Nodes, grouped, lanes
from hookgraph.algorithms.sites import subgraph_of
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.dimensions import Dimension

_PLACED = (Dimension.BATCH, Dimension.POS)
_ROOM = 1 << 24
"""So many numbers are held at once for the gradients of a chunk of targets."""


@final
@dataclass(frozen=True, eq=False)
class Targets:
    """What is differentiated: left · value at some nodes, as rows over what carries them.

    Args:
        nodes: the targets.
        rows: of each, its gradient with respect to the carrier at its own position; None where the nodes
            are coordinates of the carrier itself.
    """

    nodes: Nodes
    rows: Float[Tensor, "..."] | None

    @staticmethod
    def of(graph: HookGraph, nodes: Nodes, value: Float[Tensor, "..."]) -> "Targets":
        """The targets at a place, read as functions of the value of its carrier."""
        if nodes.place.site is None:
            return Targets(nodes, None)
        subgraph, x = subgraph_of(graph, nodes.place), _rows(nodes, value)
        return Targets(nodes, subgraph.pull(nodes.place, x, nodes.values, nodes.chosen).view_as(x))

    def spread(
        self, chosen: Int[Tensor, "..."], numbers: Int[Tensor, "..."], count: int, like: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Gradients over the whole carrier: `count` of them, each chosen target in that of its number."""
        made = like.new_zeros(count, *like.shape)
        index = self.nodes.index[chosen]
        if self.rows is None:
            view = self.nodes.along(made, leading=1)
            view[(numbers, *index.T)] = self.nodes.values[chosen].to(made)
        else:
            made.flatten(3)[numbers, index[:, 0], index[:, 1]] = self.rows[chosen].flatten(1).to(made)
        return made


@final
@dataclass(frozen=True, eq=False)
class Sources:
    """Where gradients are read: the change of the carrier that each node's change makes.

    Args:
        nodes: the sources.
        rows: of each, that change at its own position; None where nodes are coordinates of the carrier.
    """

    nodes: Nodes
    rows: Float[Tensor, "..."] | None

    @staticmethod
    def of(graph: HookGraph, nodes: Nodes, value: Float[Tensor, "..."]) -> "Sources":
        """The sources at a place."""
        if nodes.place.site is None:
            return Sources(nodes, None)
        subgraph, x = subgraph_of(graph, nodes.place), _rows(nodes, value)
        return Sources(nodes, subgraph.push(nodes.place, x, nodes.values, nodes.chosen).view_as(x))

    def read(self, chosen: Int[Tensor, "..."], gradients: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """gradient · change: a row per gradient, over the carrier at one position (or one example), and a
        column per chosen source, all of that position (or example).
        """
        if self.rows is not None:
            return gradients.flatten(1) @ self.rows[chosen].flatten(1).to(gradients).T
        nodes = self.nodes
        skipped = 1 + len(nodes.place.dims) - gradients.ndim
        dims = nodes.place.dims[skipped:]
        own = [d for d in nodes.dims if d in dims]
        view = gradients.permute(0, *(1 + dims.index(d) for d in (*own, *nodes.joint)))
        columns = [nodes.dims.index(d) for d in own]
        index = tuple(nodes.index[chosen][:, columns].T)
        picked = view[(slice(None), *index)] if index else view[:, None]
        products = picked * nodes.values[chosen].to(gradients)
        return products.flatten(2).sum(2) if nodes.joint else products


@final
@dataclass(frozen=True, eq=False)
class Way:
    """Two carriers in one pass, the second a function of the first; or the same stream seen twice.

    Args:
        start: the value that acts.
        end: the value acted upon.
        identity: whether the gradient goes from one to the other unchanged, and none need be computed.
    """

    start: Float[Tensor, "..."]
    end: Float[Tensor, "..."]
    identity: bool = False

    def back(self, gradients: Float[Tensor, "..."]) -> Float[Tensor, "..."] | None:
        """Gradients at the end, one after the other, taken back to the start; None where no way leads."""
        if self.identity:
            return gradients
        if not self.end.requires_grad or self.end.is_leaf:
            return None
        try:
            found = self._grad(gradients, batched=True)
        except RuntimeError:  # an operation that cannot be batched, or not in this memory
            parts = [self._grad(one, batched=False) for one in gradients]
            kept = [p for p in parts if p is not None]
            found = torch.stack(kept) if len(kept) == len(parts) else None
        return found

    def _grad(self, gradients: Tensor, *, batched: bool) -> Tensor | None:
        return torch.autograd.grad(
            self.end, self.start, gradients, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )[0]

    @cached_property
    def is_local(self) -> bool:
        """Whether what happens at one position depends on that position only.

        Gradients tell: any two positions differ in a bit of their numbers. From the positions that have it
        no gradient may reach one that lacks it, nor the reverse. Attention shows with the first bit.
        """
        size = self.end.shape[1]
        if self.identity:
            return True
        if self.start.shape[1] != size:
            return False
        drawn = torch.Generator().manual_seed(0)
        noise = torch.randn(self.end.shape, generator=drawn, dtype=torch.float64).to(self.end)
        numbers = torch.arange(size, device=self.end.device)
        for bit in range((size - 1).bit_length()):
            having = (numbers >> bit) % 2 == 1
            for some in (having, ~having):
                probe = torch.zeros_like(noise)
                probe[:, some] = noise[:, some]
                found = self.back(probe[None])
                if found is not None and bool(found[0][:, ~some].any()):
                    return False
        return True


def weights(way: Way, targets: Targets, sources: Sequence[Sources]) -> list[Block]:
    """The edges from every source to every target, per example, for each of `sources`."""
    placed = all(x.nodes.dims[:2] == _PLACED for x in (targets, *sources))
    columns = 2 if placed and way.is_local else 1
    groups = grouped(targets.nodes, columns)
    numbers = lanes(groups)
    by_group = [_members(grouped(s.nodes, columns)) for s in sources]
    found: list[list[Block]] = [[] for _ in sources]
    for chosen, start, count in _chunks(numbers, max(1, _ROOM // max(1, way.end.numel()))):
        spread = targets.spread(chosen, numbers[chosen] - start, count, way.end.detach())
        gradients = way.back(spread)
        if gradients is None:
            break
        here = _members(groups[chosen])
        for group, members in here.items():
            rows = chosen[members]
            place = tuple(targets.nodes.index[rows[0], :columns].tolist())
            own = gradients[(numbers[rows] - start, *place)]
            for i, source in enumerate(sources):
                those = by_group[i].get(group)
                if those is not None:
                    found[i] += _read(source, targets.nodes, those, rows, own, whole=columns == 1)
    return [_one(f, s.nodes, targets.nodes) for f, s in zip(found, sources, strict=True)]


def _read(
    source: Sources,
    targets: Nodes,
    those: Int[Tensor, "..."],
    rows: Int[Tensor, "..."],
    own: Float[Tensor, "..."],
    *,
    whole: bool,
) -> Iterator[Block]:
    """The edges of one group; where it is a whole example, position by position of the sources."""
    if source.rows is None or not whole:
        pieces = [(those, own)]
    else:
        at = source.nodes.index[those, 1]
        pieces = [(those[at == p], own[:, p]) for p in at.unique().tolist()]
    for some, gradient in pieces:
        product = source.read(some, gradient)
        yield Block(
            source.nodes.dims,
            targets.dims,
            source.nodes.index[some].repeat(len(rows), 1),
            targets.index[rows].repeat_interleave(len(some), 0),
            product.flatten(),
        )


def _one(blocks: list[Block], sources: Nodes, targets: Nodes) -> Block:
    if blocks:
        return Block.joined(blocks)
    none = torch.zeros(0, dtype=torch.long)
    return Block(
        sources.dims,
        targets.dims,
        none.view(0, 1).expand(0, len(sources.dims)),
        none.view(0, 1).expand(0, len(targets.dims)),
        targets.effect.new_zeros(0),
    )


def _rows(nodes: Nodes, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What the site holds at the position of each node."""
    return value.detach()[nodes.index[:, 0], nodes.index[:, 1]].flatten(1)


def _members(groups: Int[Tensor, "..."]) -> dict[int, Int[Tensor, "..."]]:
    """The members of each group."""
    order = torch.argsort(groups, stable=True)
    names, counts = groups[order].unique_consecutive(return_counts=True)
    return dict(zip(names.tolist(), order.split(counts.tolist()), strict=True))


def _chunks(numbers: Int[Tensor, "..."], size: int) -> Iterator[tuple[Int[Tensor, "..."], int, int]]:
    """The targets of some numbers at a time, the first of these and how many they are."""
    total = int(numbers.max()) + 1 if len(numbers) else 0
    for start in range(0, total, size):
        count = min(size, total - start)
        yield ((numbers >= start) & (numbers < start + count)).nonzero()[:, 0], start, count
