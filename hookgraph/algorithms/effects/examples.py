"""A batch in pieces of its examples, and their results as one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.memory import in_pieces
from hookgraph.errors import HookGraphError, MetricError
from hookgraph.graph.abstract import Inputs, Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric, ReadingMetric
from hookgraph.ontology.locations import Location

Measure = Callable[[Inputs, Inputs | None, Metric], PatchingEffect]


def by_examples(
    graph: HookGraph,
    clean: Inputs,
    corrupt: Inputs | None,
    metric: Metric,
    batch_size: int,
    measure: Measure,
) -> PatchingEffect:
    """The effects of a batch of any size: `measure` is called with at most `batch_size` examples at once.

    Raises:
        MetricError: the batch has to be divided, and the metric cannot be.
        HookGraphError: it has to be divided, and hooks may hold values of it, or mix its examples.
    """
    first = graph.binding.prepare(clean)
    second = None if corrupt is None else graph.binding.prepare(corrupt)
    count = batch_of(first)

    def work(rows: Sequence[int]) -> PatchingEffect:
        if len(rows) == count:
            return measure(first, second, metric)
        if not isinstance(metric, ReadingMetric):
            raise MetricError(
                f"{count} examples have to be run {len(rows)} at a time, and this metric cannot be divided: "
                "use one of hookgraph.metrics, give it a method rows(slice), or pass fewer examples"
            )
        if graph.registrations:
            raise HookGraphError(
                f"{count} examples have to be run {len(rows)} at a time, and the graph has hooks, which may "
                f"hold values of all of them or mix them: allow batch_size={count} or more memory, or pass "
                "fewer examples"
            )
        chosen = slice(rows[0], rows[-1] + 1)
        part = None if second is None else rows_of(second, chosen, count)
        return measure(rows_of(first, chosen, count), part, metric.rows(chosen))

    return _joined([found for _, found in in_pieces(range(count), batch_size, work)])


def batch_of(inputs: Prepared) -> int:
    """How many examples there are."""
    return next((len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim), 1)


def rows_of(inputs: Prepared, chosen: slice | Int[Tensor, " batch"], count: int) -> Prepared:
    """Some of the examples, in an order."""
    return {
        name: rows_of(v, chosen, count)
        if type(v) is dict  # masks by kind of layer
        else v[chosen]
        if isinstance(v, Tensor) and v.ndim and len(v) == count
        else v
        for name, v in inputs.items()
    }


def _joined(parts: Sequence[PatchingEffect]) -> PatchingEffect:
    """The results of consecutive examples as one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    totals = [p.total_effect for p in parts if p.total_effect is not None]
    return replace(
        first,
        effects=_joined_at([p.effects for p in parts]),
        deltas=_joined_at([p.deltas for p in parts]),
        grads=_joined_at([p.grads for p in parts]),
        total_effect=torch.cat(totals) if totals else None,
        residuals=_cat([p.residuals for p in parts]),
        incomplete=tuple(dict.fromkeys(x for p in parts for x in p.incomplete)),
    )


def _joined_at(parts: Sequence[Attribution]) -> Attribution:
    return Attribution(_cat(parts), parts[0].reduced)


def _cat(parts: Sequence[Mapping[Location, Tensor]]) -> dict[Location, Tensor]:
    return {location: torch.cat([part[location] for part in parts]) for location in parts[0]}
