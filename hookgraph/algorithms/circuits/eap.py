"""`edge_attribution`: a score for every edge from a writer to a reader, without surgery on the model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.batches import Batch, PairBatch, batches
from hookgraph.algorithms.circuits.blocks import Block
from hookgraph.algorithms.circuits.components import Reader, Writer, readers_of, writers_of
from hookgraph.algorithms.circuits.reading import Pass, Readings
from hookgraph.algorithms.circuits.results import Edges, Pair
from hookgraph.algorithms.circuits.running import CircuitRunner
from hookgraph.algorithms.circuits.scores import EdgeScores
from hookgraph.algorithms.circuits.writing import Change, change_of, places_written
from hookgraph.algorithms.copies import finite_metric
from hookgraph.algorithms.effects.quadrature import Quadrature, nodes_and_weights
from hookgraph.algorithms.effects.results import Convention
from hookgraph.algorithms.pairs import prepare_pair
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.streams import check_sum
from hookgraph.errors import HookGraphError, nearest
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.graph.run import Run
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.locations import Location

EapMethod: TypeAlias = Literal["eap", "eap-ig-inputs", "eap-ig-activations", "exact"]

Scores: TypeAlias = dict[tuple[Writer, Reader], Float[Tensor, "..."]]
"""(nodes of the writer, nodes of the reader), summed over examples."""

_INSTEAD = "Use `edges`, which follows gradients through all of these"


def edge_attribution(
    graph: HookGraph,
    pairs: Iterable[Batch],
    metric: Metric | None,
    method: EapMethod = "eap",
    *,
    steps: int = 5,
    quadrature: Quadrature = "gauss-legendre",
    progress: bool | None = None,
) -> EdgeScores:
    """How m(clean) would change if one reader saw one writer's corrupt value: a score for every edge.

    score(u -> v) = Σ over positions of (u_corrupt - u_clean) · dm/d(the stream as v reads it), the mean over
    examples. Writers are the embedding, each head, each MLP; readers the queries, keys and values of each
    head (keys and values of each key-value head), each MLP, and the logits. By

    * `eap`: the gradient in the clean run.
    * `eap-ig-inputs`: its mean while the embeddings go from clean to corrupt: `steps` passes.
    * `eap-ig-activations`: its mean while the writer goes from clean to corrupt, the heads of a layer
      together: `steps` passes per update.
    * `exact`: the change itself, each edge patched alone. Costs a pass per edge.

    Args:
        graph: the hooked model.
        pairs: batches (clean, corrupt), or (clean, corrupt, metric) where answers differ.
        metric: logits -> one number per example.
        method: see above.
        steps: points of the path integral.
        quadrature: its rule.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        HookGraphError: an unknown method, or a model in which no location tells what an update reads, or
            whose stream is not the sum of what is added to it, as in BERT.
        UnknownLocationError: the model lacks the embedding, or what an update reads.
        InputError: there are no pairs.
        MetricError: nothing is measured, or not one number per example.

    Source: Syed et al., arXiv:2310.10348 (eap); Hanna et al., arXiv:2403.17806 (eap-ig); Marks et al.,
    arXiv:2403.19647 (activations).
    """
    if method not in get_args(EapMethod):
        raise HookGraphError(f"unknown method {method!r}: {nearest(method, get_args(EapMethod))}")
    work = _Attribution(graph, writers_of(graph), readers_of(graph), method, steps, quadrature)
    totals: Scores = {}
    examples = 0
    with Progress("edge attribution", None, shown=progress) as bar:
        for batch in batches(pairs, metric):
            if not examples:
                check_sum(graph, batch.clean, "edges between components", _INSTEAD)
            found, count = work.batch(batch)
            examples += count
            for pair, score in found.items():
                totals[pair] = totals[pair] + score if pair in totals else score
            bar.advance()
    integral = method.startswith("eap-ig")
    convention = Convention(method, quadrature=quadrature if integral else "", steps=steps if integral else 0)
    blocks: dict[Pair, Block] = {
        (w.place, r.place): _block(w, r, score / examples) for (w, r), score in totals.items()
    }
    return EdgeScores(Edges(blocks, "sum", examples, convention, graph.binding.metadata))


def _block(writer: Writer, reader: Reader, score: Float[Tensor, "..."]) -> Block:
    source, target = (x.flatten() for x in torch.meshgrid(*map(torch.arange, score.shape), indexing="ij"))
    return Block(
        writer.dims,
        reader.dims,
        source[:, None][:, : len(writer.dims)],
        target[:, None][:, : len(reader.dims)],
        score.flatten().detach().cpu(),
    )


@final
@dataclass(frozen=True, eq=False)
class _Attribution:
    """What is scored, and how."""

    graph: HookGraph
    writers: list[Writer]
    readers: list[Reader]
    method: EapMethod
    steps: int
    quadrature: Quadrature

    def batch(self, batch: PairBatch) -> tuple[Scores, int]:
        """The scores of a batch, summed over its examples, and how many these are."""
        graph, places = self.graph, places_written(self.writers)
        first, second = prepare_pair(graph, batch.clean, batch.corrupt)
        if self.method == "exact":
            runner = CircuitRunner.of(graph, batch, self.writers, self.readers)
            return runner.each_alone(), len(runner.measured)
        clean = graph.run(first, save=places)
        corrupt = None if second is None else graph.run(second, save=places)
        changes = {w: change_of(graph, w, clean, corrupt) for w in self.writers}
        count = len(clean[places[0]])

        def execute(hooked: HookGraph, save: Sequence[Location]) -> Run:
            with hooked.binding.frozen():
                run = hooked.run(first, save=save, metric=batch.metric, grad=True, logits=False)
            finite_metric(run)
            return run

        return self._integrate(changes, clean, corrupt, execute), count

    def _integrate(
        self, changes: dict[Writer, Change], clean: Run, corrupt: Run | None, execute: Pass
    ) -> Scores:
        if self.method == "eap":
            return self._scores(self.graph, changes, execute, 1.0)
        nodes, weights = nodes_and_weights(self.quadrature, self.steps)
        moving = self.writers if self.method == "eap-ig-activations" else self.writers[:1]
        scores: Scores = {}
        for writer in moving:
            scored = {writer: changes[writer]} if self.method == "eap-ig-activations" else changes
            place = writer.place if writer.dims else writer.update
            start = clean[place]
            end = torch.zeros_like(start) if corrupt is None else corrupt[place]
            for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
                graph = self.graph.hook(place, SetTo(torch.lerp(start, end, node)))
                for pair, score in self._scores(graph, scored, execute, weight).items():
                    scores[pair] = scores[pair] + score if pair in scores else score
        return scores

    def _scores(
        self, graph: HookGraph, changes: dict[Writer, Change], execute: Pass, weight: float
    ) -> Scores:
        """The scores of edges out of some writers, from the gradients of one pass."""
        readings = Readings.of(graph, self.readers, execute)
        found: Scores = {}
        for reader, slopes in readings.at_stream(self.readers):
            for writer, change in changes.items():
                if reader.is_reached_by(writer):
                    found[writer, reader] = weight * change.along(slopes, readings.run)
        return found
