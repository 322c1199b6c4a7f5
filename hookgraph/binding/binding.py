"""`bind`: from a model to a graph of proven locations."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hookgraph.binding import conformance
from hookgraph.binding.cache_use import see_cache
from hookgraph.binding.discovery import discover
from hookgraph.binding.examples import candidates, one_row, unrunnable
from hookgraph.binding.huggingface import HuggingFaceBinding
from hookgraph.binding.proving import prove
from hookgraph.binding.tracing import Trace, evaluating
from hookgraph.errors import BindingError
from hookgraph.graph.conformance import ConformanceReport
from hookgraph.graph.hook_graph import HookGraph


def bind(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    check: bool = True,
    example: Mapping[str, Any] | None = None,
) -> HookGraph:
    """The graph of a model: every location that it has, each one proven.

    The model is traced on a small example, its locations are resolved from the trace, and each is checked
    on values and on edits. A location that fails a check is absent, with the reason. The model itself is
    not changed.

    Args:
        model: any transformers model.
        tokenizer: with it, strings and lists of strings are accepted wherever inputs are.
        check: whether to prove what was resolved; `graph.report` tells the outcome.
        example: keyword arguments for one forward pass of a batch of two, for a model that cannot be run on
            made-up tokens, a picture or a sound.

    Raises:
        BindingError: the model cannot be run on the example, or has no residual stream.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance] (users' input)
        raise BindingError(f"expected a transformers model, found {type(model).__name__}")
    if not isinstance(model, PreTrainedModel):
        raise BindingError(f"{type(model).__name__} is not a transformers model")
    inputs, trace = _traced(model, candidates(model) if example is None else [dict(example)])
    findings = see_cache(model, discover(trace), inputs)
    binding = HuggingFaceBinding(model, findings, tokenizer, example=inputs)
    if not check:
        return HookGraph(binding)
    outcome = prove(binding)
    return HookGraph(binding.proven(outcome.findings, outcome.report))


def check(graph: HookGraph) -> ConformanceReport:
    """Check every invariant of every location of a bound model, on the model itself.

    Raises:
        BindingError: the graph is not one that `bind` made.
    """
    binding = graph.binding
    if not isinstance(binding, HuggingFaceBinding):
        raise BindingError(f"{type(binding).__name__} is not the binding of a transformers model")
    with evaluating(binding.model):
        return conformance.check(binding, one_row(binding.example, binding.findings.batch))


def _traced(model: PreTrainedModel, examples: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], Trace]:
    """The first example that the model can be run on, and the trace of that run."""
    first: Exception | None = None
    for example in examples:
        try:
            return example, Trace(model, example)
        except Exception as error:  # whatever a model raises that is given what it was not made for
            first = first or error
    raise unrunnable(model, first) from first
