"""What became of one architecture: whether it is bound, with which locations, and why others are absent."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, final

import torch
from transformers import PreTrainedModel

from hookgraph.binding import HuggingFaceBinding, bind
from hookgraph.binding.resolving.blocks import is_softmax_over_positions
from hookgraph.binding.resolving.examples import example_inputs
from hookgraph.binding.tracing.trace import Trace
from hookgraph.errors import BindingError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import STACKS
from hookgraph_tests.tiny import architectures, build, example_of

Status: TypeAlias = Literal["bound", "not bound", "no stream", "not run", "not built"]
"""`not built`: no tiny instance can be made here; `not run`: the model itself fails on the example; `no
stream`: it is a net of convolutions, neither given tokens nor attending to positions, and is refused."""

_LONGEST: Final = 400
_REFUSED: Final = "no list of layers feeds"
"""What `bind` says of a model without a chain of layers."""
_GENERAL: Final = (
    (r": use \S+$", ""),
    (r"layer \d+ adds", "the layer adds"),
    (r"\[\d+\]", "[l]"),
)
"""What differs between layers and models that lack a location for the same reason."""

_MEASURED: Final = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|inf|nan)(?!\w)")
"""A number, in what is said of an invariant that fails."""


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """One architecture.

    Args:
        table: the mapping it is in.
        architecture: its `model_type`.
        model: the name of its class.
        status: see `Status`.
        reason: why it is not bound.
        layers: how many layers each of its stacks has.
        types: how many locations there are of each type.
        gaps: by type, why locations are absent.
    """

    table: str
    architecture: str
    model: str
    status: Status
    reason: str = ""
    layers: Mapping[str, int] = field(default_factory=dict[str, int])
    types: Mapping[str, int] = field(default_factory=dict[str, int])
    gaps: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def locations(self) -> int:
        """How many locations it has."""
        return sum(self.types.values())


def outcome_of(table: str, architecture: str) -> Outcome:
    """Build one architecture, run it, bind it with proof."""
    status: Status = "not built"
    reason = ""
    try:
        model = build(table, architecture)
        status = "not run"
        example = _runnable(model)
        status = "not bound"
        try:
            return _bound(table, architecture, bind(model, example=example, cached=False))
        except BindingError as error:
            if _REFUSED in str(error) and is_convolutional(Trace(model, example)):
                status = "no stream"
            raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST]
    name = architectures(table)[architecture]
    return Outcome(table, architecture, name, status, reason)


def _runnable(model: PreTrainedModel) -> dict[str, Any]:
    example = example_of(model)
    example = example_inputs(model) if example is None else example
    with torch.no_grad():
        model(**example)
    return example


def is_convolutional(trace: Trace) -> bool:
    """Whether a model convolves what it is given, which is no tokens, and attends to no positions."""
    convolves = any(value.op == "convolution" for value in trace.values)
    attends = any(is_softmax_over_positions(value) for value in trace.values)
    given = [value.tensor for value in trace.root.inputs.values()]
    return convolves and not attends and all(x.is_floating_point() for x in given)


def _bound(table: str, architecture: str, graph: HookGraph) -> Outcome:
    binding = graph.binding
    if not isinstance(binding, HuggingFaceBinding):
        raise TypeError(type(binding))
    gaps: dict[str, Counter[str]] = {}
    for location, reason in graph.report.absent.items():
        gaps.setdefault(location.type.qualified_name, Counter())[general(reason)] += 1
    return Outcome(
        table,
        architecture,
        type(binding.model).__name__,
        "bound",
        layers={stack: n for stack in STACKS if (n := binding.layers(stack))},
        types=dict(Counter(x.type.qualified_name for x in graph.locations)),
        gaps={kind: "; ".join(sorted(reasons)) for kind, reasons in gaps.items()},
    )


def general(reason: str) -> str:
    """A reason without what is particular to one layer or one measurement."""
    for pattern, replacement in _GENERAL:
        reason = re.sub(pattern, replacement, reason)
    invariant, fails, note = reason.partition(" fails: ")
    return invariant + fails + _MEASURED.sub("n", note)
