"""The gradient of the metric with respect to the stream, as each reader alone passes it on.

Nothing is split: gradients at queries, keys and values go back through each head's own weight, then all
together through the norm. Where that does not add up to the gradient at what they read (a norm of queries,
a weight that is not a plain one), each head's own copy of what it reads is asked instead.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.circuits.components import Reader
from hookgraph.algorithms.streams import if_present
from hookgraph.errors import HookGraphError, MetricError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import (
    ATTN_K,
    ATTN_K_PRE,
    ATTN_OUT,
    ATTN_Q,
    ATTN_Q_PRE,
    ATTN_V,
    ATTN_Z,
    MLP_IN,
    RESID_MID,
)
from hookgraph.ontology.weights import W_K, W_Q, W_V

_WEIGHTS = {ATTN_Q: W_Q, ATTN_K: W_K, ATTN_V: W_V}
_BEFORE = {ATTN_Q: ATTN_Q_PRE, ATTN_K: ATTN_K_PRE}
"""What a projection returns, where a rotary embedding follows."""
_ROUNDING = 1e-3

Pass = Callable[[HookGraph, Sequence[Location]], Run]
"""Runs a graph with the metric, saves locations, and keeps the autograd graph."""


@final
@dataclass(frozen=True, eq=False)
class Readings:
    """A pass with its autograd graph, and the gradient at each reader.

    Args:
        graph: the hooked model.
        run: the pass.
        slopes: the gradient of the metric at what heads are made of, at what is read, at the last stream.
        copies: whether each head's own copy of what it reads was asked.
    """

    graph: HookGraph
    run: Run
    slopes: dict[Location, Float[Tensor, "..."]]
    copies: bool

    @staticmethod
    def of(graph: HookGraph, readers: Sequence[Reader], execute: Pass) -> "Readings":
        """One forward and one backward pass.

        Raises:
            MetricError: the metric depends on none of the readers.
        """
        found = Readings._take(graph, readers, execute, copies=False)
        return found if found._adds_up(readers) else Readings._take(graph, readers, execute, copies=True)

    @staticmethod
    def _take(graph: HookGraph, readers: Sequence[Reader], execute: Pass, *, copies: bool) -> "Readings":
        ends = [_made(graph, r, copies=copies) for r in readers]
        wholes = [r.whole for r in readers if r.whole is not None]
        asked = list(dict.fromkeys([*ends, *wholes]))
        values = [x for r in readers for x in _writing(graph, r)]
        run = execute(graph, list(dict.fromkeys([*asked, *(r.stream for r in readers), *values])))
        if run.metric is None or not run.metric.requires_grad:
            raise MetricError("the metric does not depend on what the model reads")
        found = torch.autograd.grad(
            run.metric.sum(), [run[x] for x in asked], retain_graph=True, allow_unused=True
        )
        slopes = {x: torch.zeros_like(run[x]) if g is None else g for x, g in zip(asked, found, strict=True)}
        readings = Readings(graph, run, slopes, copies)
        readings._check_streams(readers)
        return readings

    def _check_streams(self, readers: Sequence[Reader]) -> None:
        """Refuse an MLP that reads what attention beside it adds, where no location is that stream."""
        for reader in readers:
            layer = reader.place.layer or 0
            beside = if_present(self.graph, ATTN_OUT[layer])
            if reader.place.type != MLP_IN or beside is None or reader.stream == RESID_MID[layer]:
                continue
            (found,) = torch.autograd.grad(
                self.run[reader.place].sum(), self.run[beside], retain_graph=True, allow_unused=True
            )
            if found is not None:
                raise HookGraphError(
                    f"{reader.place} reads what {beside} adds, and there is no {RESID_MID[layer]}"
                )

    def _adds_up(self, readers: Sequence[Reader]) -> bool:
        """Whether the gradients of all heads together are that at what they read."""
        for whole, members in _by_whole(readers):
            if whole is None or members[0].copies is None:
                continue
            total = torch.cat([self._at_input(r) for r in members]).sum(0)
            if (total - self.slopes[whole]).norm() > _ROUNDING * self.slopes[whole].norm():
                return False
        return True

    def _at_input(self, reader: Reader) -> Float[Tensor, "..."]:
        """The gradient at what a reader reads, after the norm, for each of its nodes."""
        slope = self.slopes[_made(self.graph, reader, copies=self.copies)]
        if reader.copies is None:
            return slope[None]
        if self.copies:
            return rearrange(slope, "batch pos head d -> head batch pos d")
        weight = self.graph.weight(_WEIGHTS[reader.place.type], reader.place.layer).detach()
        return torch.einsum("bshe,hde->hbsd", slope, weight.to(slope))

    def at_stream(self, readers: Sequence[Reader]) -> Iterator[tuple[Reader, Float[Tensor, "..."]]]:
        """For each reader, the gradient at the stream through each of its nodes alone."""
        for whole, members in _by_whole(readers):
            parts = [self._at_input(r) for r in members]
            if whole is None:
                yield from zip(members, parts, strict=True)
                continue
            slopes = torch.cat(parts)
            (found,) = torch.autograd.grad(
                self.run[whole], self.run[members[0].stream], slopes, retain_graph=True, is_grads_batched=True
            )
            yield from zip(members, found.split([len(p) for p in parts]), strict=True)


def _by_whole(readers: Sequence[Reader]) -> Iterator[tuple[Location | None, list[Reader]]]:
    for whole, members in groupby(readers, key=lambda r: r.whole):
        yield whole, list(members)


def _made(graph: HookGraph, reader: Reader, *, copies: bool) -> Location:
    """Where the gradient is taken."""
    if reader.whole is None:
        return reader.stream
    if reader.copies is None or copies:
        return reader.copies or reader.whole
    before = _BEFORE.get(reader.place.type)
    return (None if before is None else if_present(graph, before[reader.place.layer or 0])) or reader.place


def _writing(graph: HookGraph, reader: Reader) -> list[Location]:
    """What is written beside a reader, whose way into the stream may be differentiated."""
    layer = reader.place.layer
    kinds = [] if layer is None else [ATTN_Z[layer], ATTN_OUT[layer]]
    return [x for x in kinds if if_present(graph, x) is not None]
