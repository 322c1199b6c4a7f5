"""The model with some edges only: each reader sees the current value of the writers that it keeps, and the
corrupt value of the others.

Layer by layer, with x the stream of all current values: a reader's norm is taken of x + Σ (corrupt - current)
over what it does not keep. The norms of all readers of a layer are one replay that stops behind them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, final

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from hookgraph.algorithms.batches import PairBatch
from hookgraph.algorithms.circuits.components import Reader, Writer, connections
from hookgraph.algorithms.circuits.writing import head_weight, places_written, results
from hookgraph.algorithms.copies import finite_metric
from hookgraph.algorithms.pairs import prepare_pair
from hookgraph.errors import HookGraphError, InputError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.graph.run import Run
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.transformer import RESID_PRE

Kept: TypeAlias = Mapping[tuple[Writer, Reader], Bool[Tensor, "..."]]
"""Which edges are kept: (nodes of the writer, nodes of the reader); none where nothing is said."""


@final
@dataclass(frozen=True, eq=False)
class CircuitRunner:
    """A batch of pairs, and the model to be run with some edges.

    Args:
        graph: the hooked model.
        metric: what is measured.
        writers: what writes, in causal order.
        readers: what reads.
        base: the clean run.
        corrupt: the corrupt values of writers.
        weights: W_O of each layer.
        counts: how many nodes each reader has.
    """

    graph: HookGraph
    metric: Metric
    writers: Sequence[Writer]
    readers: Sequence[Reader]
    base: Run
    corrupt: Run
    weights: Mapping[Writer, Float[Tensor, "..."]]
    counts: Mapping[Reader, int]

    @staticmethod
    def of(
        graph: HookGraph, batch: PairBatch, writers: list[Writer], readers: list[Reader]
    ) -> "CircuitRunner":
        """Run both inputs.

        Raises:
            InputError: there are no corrupt inputs.
            MetricError: the metric is not a finite number.
            HookGraphError: a norm follows the heads, so that what each adds cannot be exchanged alone.
        """
        first, second = prepare_pair(graph, batch.clean, batch.corrupt)
        if second is None:
            raise InputError("what an edge leaves out is its corrupt value, and a batch has none such")
        places = places_written(writers)
        base = graph.run(first, save=places, metric=batch.metric, logits=False)
        finite_metric(base)
        corrupt = graph.run(second, save=places)
        weights: dict[Writer, Tensor] = {}
        for writer in (w for w in writers if w.dims):
            weight = head_weight(graph, writer, base)
            if weight is None:
                raise HookGraphError(
                    f"{writer.update} is no sum of what its heads add, as where a norm follows them: single "
                    "heads have no value of their own in the stream, so edges are scored, but not patched"
                )
            weights[writer] = weight
        heads = [r.place for r in readers if r.copies is not None]
        seen = graph.run(first, save=heads) if heads else {}
        counts = {r: 1 if r.copies is None else seen[r.place].shape[2] for r in readers}
        return CircuitRunner(graph, batch.metric, writers, readers, base, corrupt, weights, counts)

    @property
    def measured(self) -> Float[Tensor, " batch"]:
        """The metric of the whole model."""
        return finite_metric(self.base)

    def each_alone(self) -> dict[tuple[Writer, Reader], Float[Tensor, "..."]]:
        """What patching one edge alone changes, summed over examples, for every edge."""
        full = self.everything()
        found: dict[tuple[Writer, Reader], Tensor] = {}
        for pair, mask in full.items():
            score = torch.zeros(mask.shape, dtype=self.measured.dtype)
            for i, j in torch.ones_like(mask).nonzero().tolist():
                left = mask.clone()
                left[i, j] = False
                score[i, j] = (self.run({**full, pair: left}) - self.measured).sum()
            found[pair] = score
        return found

    def everything(self) -> dict[tuple[Writer, Reader], Bool[Tensor, "..."]]:
        """All edges."""
        heads = {w: self.base[w.place].shape[2] if w.dims else 1 for w in self.writers}
        return {
            (w, r): torch.ones(heads[w], self.counts[r], dtype=torch.bool)
            for w, r in connections(self.writers, self.readers)
        }

    def run(self, kept: Kept) -> Float[Tensor, " batch"]:
        """The metric of the model with the edges that are kept."""
        stream = _Stream(self.base[RESID_PRE[0]].detach(), {})
        for writer in self.writers:
            if writer.update == RESID_PRE[0]:
                stream.missing[writer] = (self.corrupt[writer.update] - stream.value)[None]
                continue
            self._advance(writer, stream, kept)
        last = self.readers[-1]
        value = stream.current() + self._shift(last, stream, kept)[0]
        run = self.graph.replay(self.base, last.stream, value=value, metric=self.metric, logits=False)
        return finite_metric(run)

    def _advance(self, writer: Writer, stream: "_Stream", kept: Kept) -> None:
        """Run one branch of a layer, each of its readers seeing what it keeps, and add what it writes."""
        layer, update = writer.update.layer or 0, writer.update
        stream.enter(layer)
        own = [r for r in self.readers if r.place.layer == layer and self._writer_of(r) == writer]
        graph, entering = self.graph, stream.value
        shifts = [self._shift(r, stream, kept) for r in own]
        if own[0].copies is not None:
            graph = self._seeing(own, shifts, layer, entering)
        elif own[0].stream == RESID_PRE[layer]:
            entering = entering + shifts[0][0]
        else:
            graph = graph.hook(own[0].stream, SetTo(stream.current() + shifts[0][0]))
        run = graph.replay(self.base, RESID_PRE[layer], value=entering, save=places_written([writer]))
        stream.added.append(run[update])
        if writer.dims:
            delta = self.corrupt[writer.place] - run[writer.place]
            stream.missing[writer] = results(delta, self.weights[writer])
        else:
            stream.missing[writer] = (self.corrupt[update] - run[update])[None]

    def _seeing(
        self, readers: Sequence[Reader], shifts: Sequence[Tensor], layer: int, x: Tensor
    ) -> HookGraph:
        """The graph in which each head reads the norm of its own stream."""
        whole = readers[0].whole
        if whole is None:
            raise ValueError("heads read something")
        streams = (x[None] + torch.cat(list(shifts))).flatten(0, 1)
        read = self.graph.replay(self.base, RESID_PRE[layer], value=streams, save=[whole])[whole]
        parts = read.unflatten(0, (-1, len(x))).split([len(s) for s in shifts])
        graph = self.graph
        for reader, part in zip(readers, parts, strict=True):
            if reader.copies is not None:
                graph = graph.hook(reader.copies, SetTo(rearrange(part, "head b s d -> b s head d")))
        return graph

    def _shift(self, reader: Reader, stream: "_Stream", kept: Kept) -> Float[Tensor, "..."]:
        """Σ (corrupt - current) over the writers that a reader does not keep, for each of its nodes."""
        total = stream.value.new_zeros(self.counts[reader], *stream.value.shape)
        for writer, missing in stream.missing.items():
            if reader.is_reached_by(writer):
                mask = kept.get((writer, reader))
                left = torch.ones(len(missing), len(total)) if mask is None else (~mask)
                total += torch.tensordot(left.T.to(missing), missing, dims=1)
        return total

    def _writer_of(self, reader: Reader) -> Writer:
        """What the reader's branch writes: the next update of its layer."""
        return next(w for w in self.writers if reader.place.precedes(w.update))


@final
@dataclass(eq=False)
class _Stream:
    """The stream of all current values before a layer, what the layer added, and what each writer misses."""

    value: Float[Tensor, "batch pos d_model"]
    missing: dict[Writer, Float[Tensor, "..."]]
    layer: int = 0
    added: list[Float[Tensor, "..."]] = field(default_factory=list[Tensor])

    def enter(self, layer: int) -> None:
        """Go on to a layer."""
        if layer != self.layer:
            self.value, self.layer, self.added = self.current(), layer, []

    def current(self) -> Float[Tensor, "..."]:
        """The stream with what the layer added so far."""
        return torch.stack([self.value, *self.added]).sum(0)
