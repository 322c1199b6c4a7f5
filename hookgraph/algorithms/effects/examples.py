"""A batch in pieces of its examples, and their results as one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.arguments import whole_number
from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.memory import in_pieces
from hookgraph.algorithms.metrics import AnswerMetric
from hookgraph.errors import HookGraphError, MetricError
from hookgraph.graph.abstract import Inputs, Prepared
from hookgraph.graph.examples import count_examples, rows_of
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.ontology.locations import Location

Result = TypeVar("Result")


@runtime_checkable
class DivisibleMetric(Protocol):
    """A metric that can be had for some examples of the batch only."""

    def __call__(self, logits: Float[Tensor, "batch pos vocab"], /) -> Float[Tensor, " batch"]:
        """One number per example."""
        ...

    def rows(self, chosen: slice) -> Metric:
        """The same metric for some examples."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Examples:
    """Consecutive examples of a batch, and what is measured of them.

    Args:
        graph: the hooked model.
        clean: what is run.
        corrupt: what it is compared with, if there is something.
        metric: logits -> one number per example.
        rows: which examples of the batch that was given.
    """

    graph: HookGraph
    clean: Prepared
    corrupt: Prepared | None
    metric: Metric
    rows: range

    @staticmethod
    def of(graph: HookGraph, clean: Inputs, corrupt: Inputs | None, metric: Metric) -> "Examples":
        """All examples of a batch.

        Raises:
            MetricError: the metric's answers are not one for all examples, or one per example.
        """
        first = graph.binding.prepare(clean)
        second = None if corrupt is None else graph.binding.prepare(corrupt)
        count = count_examples(first) or 1
        if isinstance(metric, AnswerMetric):
            metric.check(count)
        return Examples(graph, first, second, metric, range(count))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def divisible(self) -> bool:
        """Whether some of them can be run without the others."""
        return isinstance(self.metric, DivisibleMetric) and not self.graph.registrations

    def some(self, rows: Sequence[int]) -> "Examples":
        """Those at consecutive places among these.

        Raises:
            MetricError: the metric cannot be divided.
            HookGraphError: hooks may hold values of all examples, or mix them.
        """
        count = len(self)
        if len(rows) == count:
            return self
        if not isinstance(self.metric, DivisibleMetric):
            raise MetricError(
                f"{count} examples have to be run {len(rows)} at a time, and this metric cannot be divided: "
                "use one of hookgraph.metrics, give it a method rows(slice) that returns the metric of "
                f"these examples, or allow batch_size={count} or more memory"
            )
        if self.graph.registrations:
            raise HookGraphError(
                f"{count} examples have to be run {len(rows)} at a time, and the graph has hooks, which may "
                f"hold values of all of them or mix them: allow batch_size={count} or more memory, or pass "
                "fewer examples"
            )
        chosen = slice(rows[0], rows[-1] + 1)
        corrupt = None if self.corrupt is None else rows_of(self.corrupt, chosen, count)
        clean = rows_of(self.clean, chosen, count)
        return Examples(self.graph, clean, corrupt, self.metric.rows(chosen), self.rows[chosen])


def by_examples(examples: Examples, batch_size: int, measure: Callable[[Examples], Result]) -> list[Result]:
    """What `measure` gives for at most `batch_size` examples at once, fewer where memory does not suffice.

    Raises:
        HookGraphError: `batch_size` is no positive number; or the batch has to be divided, and hooks may
            hold values of it, or mix its examples.
        MetricError: the batch has to be divided, and the metric cannot be.
    """
    size = whole_number("batch_size", batch_size)
    pieces = in_pieces(range(len(examples)), size, lambda rows: measure(examples.some(rows)))
    return [found for _, found in pieces]


def joined(parts: Sequence[PatchingEffect]) -> PatchingEffect:
    """The results of consecutive examples as one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    totals = [p.total_effect for p in parts if p.total_effect is not None]
    convention = replace(first.convention, steps=max(p.convention.steps for p in parts))
    return replace(
        first,
        convention=convention,
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
