"""`bind`: from a model to a graph of proven locations."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hookgraph.binding import conformance
from hookgraph.binding.discovery import discover
from hookgraph.binding.findings import Findings
from hookgraph.binding.huggingface import HuggingFaceBinding
from hookgraph.binding.inputs import vocabulary_size
from hookgraph.binding.tracing import Trace, evaluating
from hookgraph.errors import BindingError
from hookgraph.graph.conformance import ConformanceReport
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location

_TOKENS = 5
_SMALL = 30_000_000
"""Models up to this many parameters are proven whole, on a copy in double precision."""


def bind(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, check: bool = True
) -> HookGraph:
    """The graph of a model: every location that it has, each one proven.

    The model is traced on a few tokens, its locations are resolved from the trace, and each is checked
    on values and on edits. A location that fails a check is absent, with the reason. The model itself is
    not changed.

    Args:
        model: any transformers model.
        tokenizer: with it, strings and lists of strings are accepted wherever inputs are.
        check: whether to prove what was resolved; `graph.report` tells the outcome.

    Raises:
        BindingError: the model cannot be run on token ids, or has no residual stream.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance] (users' input)
        raise BindingError(f"expected a transformers model, found {type(model).__name__}")
    tokens = _tokens(model)
    binding = HuggingFaceBinding(model, _discover(model, tokens), tokenizer)
    return HookGraph(binding.proven(_prove(binding, tokens[:1])) if check else binding)


def check(graph: HookGraph) -> ConformanceReport:
    """Check every invariant of every location of a bound model, on the model itself.

    Raises:
        BindingError: the graph is not one that `bind` made.
    """
    binding = graph.binding
    if not isinstance(binding, HuggingFaceBinding):
        raise BindingError(f"{type(binding).__name__} is not the binding of a transformers model")
    with evaluating(binding.model):
        return conformance.check(binding, _tokens(binding.model)[:1])


def _discover(model: PreTrainedModel, tokens: Int[Tensor, "batch pos"]) -> Findings:
    try:
        trace = Trace(model, {"input_ids": tokens, "use_cache": False})
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise BindingError(
            f"{type(model).__name__} is not a transformer that hookgraph can bind: running it on token ids "
            f"failed with {type(error).__name__}: {error}"
        ) from error
    return discover(trace)


def _prove(binding: HuggingFaceBinding, tokens: Int[Tensor, "batch pos"]) -> ConformanceReport:
    """Check a small model whole, on a copy in double precision; of a large one some layers, as it is."""
    model = binding.model
    if sum(p.numel() for p in model.parameters()) <= _SMALL:
        twin = copy.deepcopy(model)
        nn.Module.to(twin, torch.float64)
        with evaluating(twin):
            return conformance.check(HuggingFaceBinding(twin, binding.findings), tokens)
    with evaluating(model):
        return conformance.check(binding, tokens, _representatives(binding))


def _representatives(binding: HuggingFaceBinding) -> Sequence[Location]:
    """The locations of one layer of each kind: layers are of a kind if they are reached alike."""
    kinds: dict[tuple[object, ...], int] = {}
    by_layer: dict[int, list[Location]] = {}
    for location in binding.locations:
        if location.layer is not None:
            by_layer.setdefault(location.layer, []).append(location)
    for layer, locations in by_layer.items():
        anchors = [binding.findings.anchors[x] for x in locations]
        kind = tuple((a.location.type.name, a.mechanism, a.slot, a.view, a.epsilon) for a in anchors)
        kinds.setdefault(kind, layer)
    chosen = set(kinds.values())
    return [x for x in binding.locations if x.layer is None or x.layer in chosen]


def _tokens(model: nn.Module) -> Int[Tensor, "batch pos"]:
    """A few token ids that the model knows, always the same ones."""
    table = next((p for p in model.parameters() if p.ndim == 2), None)
    known = vocabulary_size(model) if isinstance(model, PreTrainedModel) else 0
    if table is None or not known:
        raise BindingError(f"{type(model).__name__} is not a transformers model: it embeds no tokens")
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(8, known - 1), known, (2, _TOKENS), generator=generator).to(table.device)
