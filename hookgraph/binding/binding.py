"""`bind`: from a model to a graph of proven locations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hookgraph.binding import cache
from hookgraph.binding.data.family import Family, apply
from hookgraph.binding.data.findings import Findings
from hookgraph.binding.proving import conformance, proving
from hookgraph.binding.resolving.cache_use import see_cache
from hookgraph.binding.resolving.captions import stands_alone
from hookgraph.binding.resolving.discovery import discover
from hookgraph.binding.resolving.examples import candidates, one_row, unrunnable
from hookgraph.binding.running.compiled import as_written
from hookgraph.binding.running.huggingface import HuggingFaceBinding
from hookgraph.binding.running.kernels import check_kernels, configurations
from hookgraph.binding.running.others import is_changed, is_held
from hookgraph.binding.tracing.trace import Trace, evaluating
from hookgraph.errors import AlreadyAttachedError, BindingError, InputError
from hookgraph.graph.conformance import ConformanceReport
from hookgraph.graph.examples import count_examples
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.pictures import refuse_uneven


def bind(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    check: bool = True,
    example: Mapping[str, Any] | None = None,
    family: Family | None = None,
    cached: bool = True,
) -> HookGraph:
    """The graph of a model: every location that it has, each one proven.

    The model is traced on a small example, its locations are resolved from the trace, and each is checked
    on values and on edits. A location that fails a check is absent, with the reason. The model itself is
    not changed.

    Args:
        model: any transformers model, also one wrapped by PEFT: the model inside is bound, adapters included.
        tokenizer: with it, strings and lists of strings are accepted wherever inputs are.
        check: whether to prove what was resolved; `graph.report` tells the outcome.
        example: keyword arguments for one forward pass of a batch of two, for a model that cannot be run on
            made-up tokens, a picture or a sound, or that is to be bound with large pictures beside its text.
        family: a record of what cannot be discovered; what it says is proven like anything else.
        cached: whether a model like this one that was proven before is not proven again; the environment
            variable HOOKGRAPH_CACHE names the folder of such proofs, or is `off`.

    Raises:
        AlreadyAttachedError: a graph holds the model, or held it when it was copied.
        BindingError: the model cannot be run on the example, or has no residual stream; or the record is
            wrong, with the invariant that fails, the location, and by how much.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance] (users' input)
        given = f"{type(model).__name__} {model!r}" if isinstance(model, str) else type(model).__name__
        raise BindingError(
            f"expected a transformers model, found {given}: load one first, as with "
            "AutoModelForCausalLM.from_pretrained(...)"
        )
    model = _unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise BindingError(
            f"{type(model).__name__} is not a transformers model (a PreTrainedModel): bind the whole model, "
            "or write an AbstractBinding for a network of your own"
        )
    if example is not None and not isinstance(example, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"the example is {type(example).__name__}: give keyword arguments of the model, such as "
            "{'input_ids': ids}"
        )
    check_kernels(model, configurations(model))
    _check_free(model)
    if example is not None:
        refuse_uneven(example, count_examples(example) or 1)
    with as_written(model.modules()):
        examples = list(candidates(model)) if example is None else [dict(example)]
        return HookGraph(_bound(model, tokenizer, examples, family, check=check, keeping=check and cached))


def _bound(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    examples: Sequence[dict[str, Any]],
    family: Family | None,
    *,
    check: bool,
    keeping: bool,
) -> HuggingFaceBinding:
    """What is kept of a model like this one, or else what is found in it, proven if that is asked for."""
    kept = _known(model, examples, family) if keeping else None
    if kept is not None:
        inputs, entry = kept
        binding = HuggingFaceBinding(model, entry.findings, tokenizer, example=inputs)
        told = {**entry.report.metadata, **binding.metadata}
        return binding.proven(entry.findings, replace(entry.report, metadata=told))
    inputs, trace = _traced(model, examples)
    found = _resolved(model, trace)
    if not check or proving.is_small(model):  # of a large one its twin tells
        found = see_cache(model, found, inputs)
    found = found if family is None else apply(family, found, model)
    binding = HuggingFaceBinding(model, found, tokenizer, example=inputs)
    if not check:
        return binding
    outcome = proving.prove(binding, family)
    key = cache.key_of(model, inputs, family) if keeping else None
    if key:
        cache.store(key, cache.Entry(outcome.findings, outcome.report))
    told = {**outcome.report.metadata, **_hooked_by_others(model)}
    return binding.proven(outcome.findings, replace(outcome.report, metadata=told))


def _hooked_by_others(model: PreTrainedModel) -> dict[str, str]:
    """On which modules there are hooks of others, for the report: what they change is proven with them."""
    paths = [path or "the model" for path, module in model.named_modules() if is_changed(module)]
    return {"hooks of others": ", ".join(paths)} if paths else {}


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


def _known(
    model: PreTrainedModel, examples: Iterable[dict[str, Any]], family: Family | None
) -> tuple[dict[str, Any], cache.Entry] | None:
    """What is kept of a model like this one, and the example on which it was traced."""
    for example in examples:
        key = cache.key_of(model, example, family)
        entry = cache.load(key, model) if key else None
        if entry is not None:
            return example, entry
    return None


def _resolved(model: PreTrainedModel, trace: Trace) -> Findings:
    """What is found in a trace.

    Raises:
        BindingError: no layers were found, or the model is built in a way that was not foreseen.
    """
    try:
        return discover(trace)
    except (LookupError, AttributeError, TypeError, RuntimeError) as error:
        raise BindingError(
            f"the layers of {type(model).__name__} cannot be resolved, which is a fault of hookgraph; please "
            f"report it with the model's name: {type(error).__name__}: {error}"
        ) from error


def _check_free(model: PreTrainedModel) -> None:
    """Check that no graph holds a model.

    Raises:
        AlreadyAttachedError: one does, or did when the model was copied.
    """
    held = next((path for path, module in model.named_modules() if is_held(module)), None)
    if held is not None:
        raise AlreadyAttachedError(
            f"{held or 'this model'} holds hooks of hookgraph: a graph is attached to this "
            f"{type(model).__name__}, or was when it was copied, and a copy keeps its hooks. Leave the other "
            "`with` first, and copy a model outside of attached()"
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside one that PEFT wrapped; its adapters are modules of that model.

    Raises:
        BindingError: the wrapper adds to the inputs, which the model inside knows nothing of, or is compiled.
    """
    if hasattr(model, "_orig_mod"):
        raise BindingError(
            f"{type(model).__name__} is what torch.compile returned: bind the model that it was given. "
            "Compiled in place, by model.compile(), a model runs as it is written while it is looked into"
        )
    inside = getattr(model, "get_base_model", None)
    if inside is None:
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise BindingError(
            f"{type(model).__name__} puts learnt prompts before its inputs: bind the model inside, "
            "model.get_base_model(), and give it these as inputs_embeds"
        )
    return inside()


def _traced(model: PreTrainedModel, examples: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Trace]:
    """The first example that the model can be run on, and the trace of that run.

    Of several, one with pictures that the model counts through a batch is passed over.
    """
    first: Exception | None = None
    for example in examples:
        try:
            trace = Trace(model, example)
            if len(examples) == 1 or stands_alone(model, example):
                return example, trace
        except Exception as error:  # whatever a model raises that is given what it was not made for
            first = first or error
    raise unrunnable(model, first) from first
