"""`mean_patching_effect`: how much each node matters over a data set of pairs, which streams through."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.batches import Batch, PairBatch, batches
from hookgraph.algorithms.effects.checkpoints import Checkpoint
from hookgraph.algorithms.effects.enumeration import counted
from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.fingerprints import fingerprint, parts_of
from hookgraph.algorithms.effects.patching import Method, patching_effect
from hookgraph.algorithms.effects.quadrature import Quadrature
from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.effects.sums import POSITIONS, Mean
from hookgraph.algorithms.interventions.statistics import AblationStatistics
from hookgraph.algorithms.padding import check_aligned
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import chosen_places, joint_axes
from hookgraph.errors import HookGraphError, InputError, nearest
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.ontology.locations import Location

Positions: TypeAlias = Literal["aligned", "summed"]
_STREAMED = "the pairs streamed through and are gone: pass them as a list to check what they gave"


def mean_patching_effect(
    graph: HookGraph,
    pairs: Iterable[Batch],
    metric: Metric | None = None,
    *,
    at: Sequence[Location],
    method: Method = "attrib",
    positions: Positions = "aligned",
    steps: int = 10,
    quadrature: Quadrature = "gauss-legendre",
    tolerance: float | None = None,
    joint: Sequence[str] = (),
    statistics: AblationStatistics | None = None,
    batch_size: int = 256,
    max_memory: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> PatchingEffect:
    """The mean of `patching_effect` over all examples of a stream of batches.

    Only sums are kept, so that memory does not grow with the data; total effects and residuals are kept for
    each example, in order.

    Args:
        graph: the hooked model.
        pairs: batches (clean, corrupt), or (clean, corrupt, metric) where answers differ from batch to batch;
            corrupt is None in all of them, or in none.
        metric: logits -> one number per example, for batches without their own.
        at: locations or parts of locations.
        method: as for `patching_effect`, like the arguments not listed here.
        positions: `aligned`: position 5 of all examples is one node, all batches are of one length, and
            padding stands on the right; `summed`: effects are summed over positions, and batches may differ
            in length.
        steps: points of the path integral.
        quadrature: its rule.
        tolerance: for `ig` and `ig_inputs`, the share of a site's change that its residual may have.
        joint: axes whose coordinates are one node.
        statistics: means from `mean_activations`, to stand in where the pairs have no corrupt inputs: what
            mean ablation of each node changes over the data set.
        batch_size: how many rows are run at once, at most.
        max_memory: how many bytes a pass may take, at most.
        checkpoint: a file that keeps what is done, batch by batch. Where it exists, the batches that it
            holds are not run again; it is left there at the end. What was computed has to be the same: inputs
            and metric of each batch, arguments, hooks and subgraphs. Functions are told by their code and
            what they close over, not by what they call.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Returns:
        Effects and deltas as means over the batch axis, with `.standard_errors` of the effects.

    Raises:
        InputError: there are no pairs, some have corrupt inputs and others none, or inputs padded on the left
            are to be aligned.
        ShapeMismatchError: batches of different lengths are to be aligned.
        LoadError: the checkpoint is of something else, or holds more batches than there are.
        MetricError: as for `patching_effect`; what earlier batches gave is in the checkpoint.
    """
    if positions not in ("aligned", "summed"):
        raise HookGraphError(f"unknown positions {positions!r}: {nearest(positions, ('aligned', 'summed'))}")
    summed = positions == "summed"
    places, joint = chosen_places(graph, at), joint_axes(joint)
    measure = partial(
        patching_effect, graph, at=places, method=method, steps=steps, quadrature=quadrature,
        tolerance=tolerance, joint=joint, statistics=statistics, batch_size=batch_size,
        max_memory=max_memory, progress=False,
    )  # fmt: skip
    kept, mean = None, Mean()
    if checkpoint is not None:
        plan = {
            "method": method,
            "positions": positions,
            "joint": list(joint),
            "at": [str(x) for x in places],
        }
        integral = {"steps": steps, "quadrature": quadrature, "tolerance": tolerance}
        told = {"statistics": fingerprint(statistics), **parts_of(graph), **graph.binding.metadata}
        weights = {"weights": graph.binding.fingerprint}
        kept = Checkpoint(checkpoint, {**plan, **integral, **told, **weights})
        state = kept.resume()
        mean = mean if state is None else Mean.unpack(state)
    every = len(pairs) if isinstance(pairs, Sized) else None
    with Progress(f"{method} over pairs", every, shown=progress) as bar:
        number = 0
        for number, batch in enumerate(_alike(batches(pairs, metric)), 1):
            bar.advance()
            parts = {} if kept is None else _parts(graph, batch)
            if kept is not None and number <= len(kept.done):
                kept.recognise(number - 1, parts)
                continue
            if not summed:
                _check_columns(graph, batch, places, joint)
            effect = measure(batch.clean, batch.corrupt, batch.metric)
            mean = mean.with_batch(effect, summed=summed)
            if kept is not None:
                kept.keep(parts, mean.pack())
        if kept is not None:
            kept.check_count(number)
    if not isinstance(pairs, Sequence):
        return replace(mean.result(), _remeasure=_STREAMED)

    def remeasure(nodes: Sequence[Location]) -> Float[Tensor, "... batch"]:
        columns = counted(nodes, places)
        found = [
            exact_effects(
                graph, x.clean, x.corrupt, x.metric, nodes,
                statistics=statistics, columns=columns, batch_size=batch_size, progress=False,
            )
            for x in batches(pairs, metric)
        ]  # fmt: skip
        return torch.cat(found, -1)

    return replace(mean.result(), _remeasure=remeasure)


def _alike(stream: Iterator[PairBatch]) -> Iterator[PairBatch]:
    """The same batches.

    Raises:
        InputError: some have corrupt inputs, others none.
    """
    first: PairBatch | None = None
    for number, batch in enumerate(stream):
        first = first or batch
        if (batch.corrupt is None) != (first.corrupt is None):
            has, lacks = (0, number) if batch.corrupt is None else (number, 0)
            raise InputError(
                f"batch {has} of the pairs has corrupt inputs, batch {lacks} has none: effects of both kinds "
                "have no mean; give corrupt inputs in all of them, or in none"
            )
        yield batch


def _parts(graph: HookGraph, batch: PairBatch) -> dict[str, str]:
    """Short names of what a batch is made of."""
    prepare = graph.binding.prepare
    corrupt = None if batch.corrupt is None else prepare(batch.corrupt)
    given = {"clean": prepare(batch.clean), "corrupt": corrupt, "metric": batch.metric}
    return {name: fingerprint(value) for name, value in given.items()}


def _check_columns(
    graph: HookGraph, batch: PairBatch, places: Sequence[Location], joint: Sequence[str]
) -> None:
    """Refuse to average columns that are another position in each row.

    Raises:
        InputError: a row begins with padding.
    """
    inputs = graph.binding.prepare(batch.clean)
    for place in places:
        if not {d for d in place.dims if d in POSITIONS} <= {*joint}:
            check_aligned(place, inputs)
