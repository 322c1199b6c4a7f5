"""The residual path of one layer of a model, and what is added to it.

The path leads from the layer's input to its output through additions, scalings, casts and
norms; the other operands of the additions are the updates. What an update is follows from how it was
computed: attention if its computation contains a softmax over positions, otherwise an MLP.
"""

from dataclasses import dataclass, field
from typing import final

from hookgraph.binding.data.layouts import Grid, grid_of, grid_of_pictures
from hookgraph.binding.data.views import Columns, View
from hookgraph.binding.resolving.paths import STREAM_AXES, PathFinder, Step, cone_of
from hookgraph.binding.resolving.shares import Term, terms_of
from hookgraph.binding.tracing.trace import AttentionCall, Call, Trace
from hookgraph.binding.tracing.values import Value, alias_root

_MAPS = frozenset({"mm", "addmm", "native_layer_norm", "convolution"})
"""Operations that make features of features: no scale, mask or view."""


@final
@dataclass(eq=False, slots=True)
class Update:
    """A term added to the stream: `coefficient · value`, computed by `call` if a module owns it."""

    value: Value
    coefficient: float
    call: Call | None
    step: Step
    cone: frozenset[Value]
    """Everything inside the block that it was computed from, the stream itself excluded."""
    attention: AttentionCall | None = None
    softmax: bool = False
    """Whether its computation contains a softmax over positions."""
    source: Call | None = None
    """The module that computes it, also where what is added is that times weights."""
    spread: int = 0
    """Among how many streams it is shared out, if there are several."""


@final
@dataclass(eq=False, slots=True)
class Block:
    """One layer: its input and output, the path between them, the updates along it."""

    call: Call
    entering: Value
    leaving: Value
    steps: list[Step]
    updates: list[Update] = field(default_factory=list[Update])
    grid: Grid = field(default_factory=lambda: Grid(0, 0))
    ends: tuple[Call, Call] | None = None
    """Of a layer that is no module: its first part, which is given the input, and its last one."""
    stage: int = 0
    """How often the width changed on the way to it."""
    begins: bool = False
    """Whether the stream begins in it anew, with its first update."""

    @property
    def streams(self) -> int:
        """How many residual streams there are."""
        if self.grid.axes:
            return 1
        if self.entering.tensor.ndim == STREAM_AXES:
            return self.entering.tensor.shape[0 if self.grid.layout == "streams first" else 2]
        return max((u.spread for u in self.updates), default=0) or 1

    @property
    def has_streams(self) -> bool:
        """Whether streams are mixed, or take a share each of what is added; pictures too have four axes."""
        mixed = any(s.kind == "mix" for s in self.steps) or any(u.spread for u in self.updates)
        return mixed or self.grid.layout == "streams first"

    def streams_of(self, value: Value) -> View:
        """Several streams on the last axis of a tensor; None if there is one, or an axis for them."""
        if self.streams == 1 or value.tensor.ndim == STREAM_AXES:
            return None
        return Columns(0, self.streams, self.width, self.width)

    @property
    def width(self) -> int:
        """How many features one stream has."""
        shape = self.entering.tensor.shape
        return shape[-1] if len(shape) == STREAM_AXES else shape[-1] // self.streams

    @property
    def adds(self) -> list[Step]:
        """The additions of the residual path, in order."""
        return [s for s in self.steps if s.kind == "add"]


def handed_on(before: Call, call: Call) -> set[Value]:
    """What a call returns that another is given."""
    returned = set(before.outputs.values())
    return returned & {alias_root(v, returned) for v in call.inputs.values()}


def resolve(
    trace: Trace, call: Call, after: Call | None = None, *, begins: bool = False, gated: bool = False
) -> Block | None:
    """The residual path of one call of a layer to what the call after it is given; None if there is none.

    With `begins` it is a path from the first update; with `gated` one that is multiplied by activations.
    """
    passed = set(call.outputs.values()) if after is None else handed_on(call, after)
    for entering in (v for v in call.inputs.values() if v.is_activation):
        grid = grid_of(trace, entering)
        finder = PathFinder(trace, call, entering, grid, begins=begins, gated=gated)
        for leaving in (v for v in call.outputs.values() if v.is_activation and v in passed):
            if begins and leaving.tensor.shape[:-1] != entering.tensor.shape[:-1]:
                continue  # a stage with other positions
            steps = finder.path(leaving)
            if steps and any(s.kind == "add" for s in steps):
                block = Block(call, entering, leaving, steps, grid=grid, begins=begins)
                block.updates = _updates(trace, block)
                if entering.tensor.ndim == STREAM_AXES and not block.has_streams:
                    block.grid = grid_of_pictures(trace, entering)
                return block
    return None


def _updates(trace: Trace, block: Block) -> list[Update]:
    stream = {block.entering, *(s.value for s in block.steps)}
    attention = {a.out: a for a in trace.attention_calls}
    updates: list[Update] = []
    for step in block.adds:
        for term in terms_of(trace, block.call, step.update):
            cone = frozenset(cone_of(term.value, stream - {term.value}, block.call.first))
            found = [attention[v] for v in cone if v in attention]
            softmax = bool(found) or any(is_softmax_over_positions(v, block.entering) for v in cone)
            updates.append(_made_of(term, step, cone, found[-1] if found else None, softmax=softmax))
    return updates


def _made_of(
    term: Term, step: Step, cone: frozenset[Value], attention: AttentionCall | None, *, softmax: bool
) -> Update:
    value, coefficient = term.value, term.coefficient
    call = None if step.partial else term.call
    return Update(value, coefficient, call, step, cone, attention, softmax, term.source, term.spread)


def is_softmax_over_positions(value: Value, stream: Value | None = None) -> bool:
    """Whether an operation is the softmax of an attention, or a fused attention as a whole.

    With three axes it is one over a batched matrix product, batch and heads on one axis; a router's is not.
    Nor is one that each position of the stream has to itself, as over what earlier layers returned there.
    """
    if value.op.startswith("_scaled_dot_product"):
        return stream is None or not _is_within_positions(value, stream)
    if value.op not in ("_softmax", "_safe_softmax") or value.tensor.ndim < 3:
        return False
    return value.tensor.ndim > 3 or _is_product_per_head(value.inputs[0])


def _is_within_positions(value: Value, stream: Value) -> bool:
    """Whether a fused attention has positions where heads lie, and the whole width of the stream."""
    shape, own = stream.tensor.shape, value.tensor.shape
    return len(own) == len(shape) + 1 and own[-3] == shape[-2] != own[-2] and own[-1] == shape[-1]


def _is_product_per_head(value: Value) -> bool:
    """Whether a value is a batched matrix product, but for its scale, its mask, and views."""
    waiting, shape = [value], value.tensor.shape
    seen: set[Value] = set()
    while waiting:
        here = waiting.pop()
        if here.op in ("bmm", "baddbmm"):
            return True
        if here not in seen and here.op not in _MAPS:
            seen.add(here)
            waiting += [v for v in here.inputs if not v.is_source and v.tensor.numel() == shape.numel()]
    return False


def reads_past_attention(value: Value, block: Block) -> bool:
    """Whether a value was computed through an attention of the block after the stream was last read."""
    stream = {block.entering, *(s.value for s in block.steps)}
    return any(is_softmax_over_positions(v) for v in cone_of(value, stream, block.call.first))
