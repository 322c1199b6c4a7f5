"""Passes over several copies of a run's batch, from the last boundary before what they change."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hookgraph.algorithms.memory import is_out_of_memory
from hookgraph.errors import MetricError
from hookgraph.graph.examples import batch_size
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric, Tiled
from hookgraph.graph.run import Run
from hookgraph.hooks.editing import Hook
from hookgraph.hooks.positions import ByPosition
from hookgraph.ontology.locations import Location

USUAL_REASONS = (
    "a log or a root of what may fall to 0, a masked row, or an overflow in half precision, are usual reasons"
)
"""Of what is no finite number."""


def run_copies(
    graph: HookGraph,
    base: Run,
    entry: Location | None,
    copies: int,
    *,
    metric: Metric | None = None,
    save: Sequence[Location] = (),
    value: Shaped[Tensor, "..."] | None = None,
) -> Run:
    """One pass over several copies of a run's batch, from `entry` on, or whole.

    Row i belongs to example i modulo the batch. At `entry` enters `value`, by default what the run saved. An
    error of PyTorch says how many copies there were: hooks of others may hold values of one batch.
    """
    tiled = None if metric is None else Tiled(metric, len(base.measured), copies, base.columns)
    try:
        if entry is None:
            inputs = graph.binding.prepare(dict(base.inputs), copies=copies)
            return graph.run(inputs, save=save, metric=tiled, logits=False)
        entering = tile(base[entry], copies) if value is None else value
        return graph.replay(base, entry, value=entering, save=save, metric=tiled, logits=False)
    except RuntimeError as error:
        if copies > 1 and not is_out_of_memory(error):
            error.add_note(
                f"This pass ran {copies} copies of the batch side by side. A hook that was registered with "
                "PyTorch and holds a value for each example does not fit them: register it with graph.hook, "
                f"which calls it with one copy at a time, or give batch_size={batch_size(base.inputs)}, the "
                "number of examples."
            )
        raise


def tile(value: Shaped[Tensor, "batch ..."], copies: int) -> Shaped[Tensor, "..."]:
    """The whole batch, several times, one after the other."""
    return value.repeat(copies, *([1] * (value.ndim - 1)))


def per_copy(graph: HookGraph, batch: int) -> HookGraph:
    """The graph whose hooks are called with one copy of the batch at a time, as in the run that they are for:
    a hook may hold values of that run, or mix its examples.
    """
    hooked = tuple((location, _each_copy(hook, batch)) for location, hook in graph.registrations)
    return replace(graph, registrations=hooked)


def looked_at(value: Shaped[Tensor, "..."]) -> None:
    """A hook that changes nothing, but has its location computed: fused attention computes no pattern."""


def _each_copy(hook: Hook, batch: int) -> Hook:
    if hook is looked_at:
        return hook
    if isinstance(hook, ByPosition):
        return ByPosition(partial(_called_each, hook.fn, batch))
    return partial(_called_each, hook, batch)


def _called_each(
    hook: Callable[..., Tensor | None], batch: int, value: Tensor, *told: Tensor
) -> Tensor | None:
    """What a hook returns that is called with one copy at a time, and with what it is told of its rows."""
    if len(value) == batch:
        return hook(value, *told)
    parts = [part.clone() for part in value.split(batch)]
    rows = zip(*(x.split(batch) for x in told), strict=True) if told else [()] * len(parts)
    news = [hook(part, *row) for part, row in zip(parts, rows, strict=True)]
    return torch.cat([part if new is None else new for part, new in zip(parts, news, strict=True)])


def finite_metric(run: Run) -> Float[Tensor, " batch"]:
    """The metric of a run.

    Raises:
        MetricError: it is not a number in some example.
    """
    bad = (~run.measured.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise MetricError(
            f"the metric is not a finite number in example {', '.join(map(str, bad))}: look at the logits of "
            f"these inputs; {USUAL_REASONS}"
        )
    return run.measured


def finite_per_copy(
    values: Float[Tensor, "... batch"], nodes: Sequence[Location]
) -> Float[Tensor, "... batch"]:
    """What was measured in each copy of a batch, of which each has one node patched.

    Raises:
        MetricError: it is not a number in some example.
    """
    wrong = (~values.isfinite()).nonzero().tolist()
    if wrong:
        copy, example = wrong[0]
        raise MetricError(
            f"the metric is not a finite number in example {example} where {nodes[copy]} is patched: look at "
            f"the logits there; {USUAL_REASONS}"
        )
    return values
