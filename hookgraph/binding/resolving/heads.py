"""The inside of attention: queries, keys, values, scores, pattern, z and what each head writes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias, final

from hookgraph.binding.data.anchors import Anchor, Mechanism, on_call
from hookgraph.binding.data.anchors import Role as Part
from hookgraph.binding.data.findings import Findings, WeightSource
from hookgraph.binding.data.layouts import Layout
from hookgraph.binding.data.views import Axes
from hookgraph.binding.resolving.blocks import Block, Update, is_softmax_over_positions
from hookgraph.binding.resolving.interiors import bind_reading
from hookgraph.binding.resolving.own_attention import Found, own_attention
from hookgraph.binding.resolving.pieces import of_pieces
from hookgraph.binding.resolving.projections import (
    Reached,
    as_input,
    as_output,
    as_weighted_input,
    behind,
    has_heads,
    is_projection,
    why_no_input,
)
from hookgraph.binding.resolving.readers import bind_reader
from hookgraph.binding.tracing.trace import AttentionCall, Call, Trace
from hookgraph.binding.tracing.values import ALIASES, Value
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import AttentionTypes

_Optional: TypeAlias = LocationType | None


@final
@dataclass(frozen=True, slots=True)
class _Inside:
    """The tensors of one attention, as far as the trace shows them; heads lie before positions."""

    call: Call
    """The module that computes it."""
    query: Value | None
    key: Value | None
    value: Value | None
    out: Value | None
    eager: str
    """The eager function, if the model goes through transformers' attention interface."""
    own: Mapping[Part, Found]
    """How its tensors are reached in the model's own code, if it does not."""
    why: str = ""
    """Why it is not reached where the attention function is called, if it is not."""
    unreached: Mapping[Part, str] = field(default_factory=dict[Part, str])
    """Why a tensor is not reached in the model's own code."""
    layout: Layout = ""
    """How its tensors lie in the model's own code, once they have the axes of locations."""
    out_view: Axes | None = None
    """How z lies, if not by position and head."""

    def reaches(self, part: Part) -> bool:
        """Whether a tensor is reached where attention is computed."""
        return bool(self.eager) or part in self.own

    def why_not(self, part: Part) -> str:
        """Why it is not."""
        known = self.unreached.get(part, "they do not show")
        return self.why or f"in the model's own attention code {known}"

    def anchor(self, location: Location, part: Part) -> Anchor:
        """How a tensor is reached where attention is computed."""
        if self.eager:
            return Anchor(location, "interior", self.call.path, role=part, eager=self.eager)
        found = self.own[part]
        return Anchor(
            location,
            "own code",
            self.call.path,
            view=found.view,
            role=part,
            overwritten=found.value.overwritten,
            operand=found.operand,
            layout=self.layout,
        )


def inside_of(types: AttentionTypes) -> tuple[LocationType, ...]:
    """The types of what an attention computes on the way from what it reads to what it adds."""
    every = (getattr(types, x.name) for x in fields(types) if x.name not in ("ln_scale", "reads", "out"))
    return tuple(kind for kind in every if kind is not None)


def bind_attention(
    trace: Trace,
    found: Findings,
    types: AttentionTypes,
    layer: int,
    block: Block,
    update: Update,
    source: Call | None,
) -> None:
    """Bind what one attention update reads and computes. `source` is the module that computes it."""
    inside = _look_inside(trace, block, update)
    owner = None if inside is None else inside.call
    bind_reading(trace, found, types.reads[layer], types.ln_scale[layer], block, update, owner, source)
    if inside is None or (inside.why and inside.query is None):
        none = "this model does not compute a softmax over positions"
        found.absent(none if inside is None else inside.why, *inside_of(types), layer=layer)
        return
    if inside.why:
        found.absent(inside.why, types.scores, types.pattern, layer=layer)
    cross = "" if types.q_pre is not None else "x"
    heads: tuple[tuple[LocationType, _Optional, _Optional, Part, Value | None, str], ...] = (
        (types.q, types.q_pre, types.q_in, "query", inside.query, f"{cross}W_Q"),
        (types.k, types.k_pre, types.k_in, "key", inside.key, f"{cross}W_K"),
        (types.v, None, types.v_in, "value", inside.value, f"{cross}W_V"),
    )
    for kind, earlier, reader, part, value, weight in heads:
        _bind_heads(trace, found, kind[layer], part, value, weight, inside, block)
        if reader is not None and value is not None:
            bind_reader(trace, found, reader[layer], value, weight, block, inside.call)
        elif reader is not None:
            found.absent(inside.why_not(part), reader[layer])
        if earlier is not None:
            _bind_before_rotary(trace, found, earlier[layer], kind, part, value, weight, block, inside)
    _bind_scores(trace, found, types, layer, inside)
    _bind_output(trace, found, types, layer, block, inside)


def _calls(trace: Trace, attention: AttentionCall) -> list[AttentionCall]:
    """The calls of the attention function in one call of a module."""
    return [a for a in trace.attention_calls if a.call is attention.call]


def _of_pieces(trace: Trace, calls: list[AttentionCall], block: Block) -> _Inside:
    """An attention of which the function is called several times: on pieces, or with other values."""
    own, out = of_pieces(trace, calls)
    first = calls[0]
    parts: tuple[tuple[Part, Value], ...] = (
        ("query", first.query),
        ("key", first.key),
        ("value", first.value),
    )
    query, key, value = (own[x].value if x in own else piece for x, piece in parts)
    why = "the attention function is called more than once in this layer"
    lies: Layout = "" if block.grid.layout == "" else "one row"
    return _Inside(first.call, query, key, value, out, "", own, why=why, layout=lies)


def _look_inside(trace: Trace, block: Block, update: Update) -> _Inside | None:
    call = update.attention
    if call is not None:
        calls = _calls(trace, call)
        if len(calls) > 1:
            return _of_pieces(trace, calls, block)
        eager = _import_path(call.eager)
        return _Inside(call.call, call.query, call.key, call.value, call.out, eager, {})
    softmaxes = sorted((v for v in update.cone if is_softmax_over_positions(v)), key=lambda v: v.number)
    if not softmaxes:
        return None
    softmax = softmaxes[-1]
    owner = max(
        (c for c in trace.calls if c.first <= softmax.number < c.last and c is not trace.root),
        key=lambda c: len(c.parents) if any(True for _ in c.module.children()) else -1,
        default=block.call,
    )
    keys = softmax.tensor.shape[-1]
    taken = sum(owner.first <= v.number < owner.last and v.tensor.shape[-1] == keys for v in softmaxes)
    if taken > 1:  # for each head, for some queries, or as a difference: one of them is not the whole
        return _Inside(owner, None, None, None, None, "", {}, why=f"the softmax is taken {taken} times")
    reached = own_attention(trace, block, owner, softmax)
    seen = reached.seen
    query, key, value = (_by_head(seen.get(part), reached.heads) for part in ("query", "key", "value"))
    out, own = seen.get("out"), reached.found
    if "out" in own:
        view = own["out"].view
    else:  # heads before positions, as products have them; what is given on tells whether it is so
        heads = reached.heads or softmax.tensor.shape[1]
        joined = out is not None and out.tensor.ndim == 3 and out.tensor.shape[0] % heads == 0
        view = Axes((0, 2, 1, 3), heads if joined else 0)
    return _Inside(owner, query, key, value, out, "", own, unreached=reached.why, out_view=view)


def _by_head(value: Value | None, heads: int) -> Value | None:
    """The tensor, behind views and transpositions, that has heads on the second of its four axes."""
    if value is None:
        return None
    here = best = value
    while here.op in ALIASES and here.inputs and here.inputs[0].tensor.numel() == best.tensor.numel():
        here = here.inputs[0]
        if here.tensor.ndim == 4 and here.tensor.shape[1] == heads:
            best = here
    return best


def _bind_heads(
    trace: Trace,
    found: Findings,
    location: Location,
    part: Part,
    value: Value | None,
    weight: str,
    inside: _Inside,
    block: Block,
) -> None:
    """Queries, keys or values: as what a projection returns if nothing happens to them after it."""
    reached = None if value is None else as_output(trace, value, block.call, heads_first=True)
    if reached is not None and _has_heads(reached.view, value):
        _add_heads(trace, found, location, weight, block, reached)
    elif inside.reaches(part):
        found.add(on_call(trace, inside.call, inside.anchor(location, part)))
    else:
        found.absent(inside.why_not(part), location)


def _add_heads(
    trace: Trace, found: Findings, location: Location, weight: str, block: Block, reached: Reached
) -> None:
    """Heads as what a module returns, and the weight if that is a projection."""
    layout = block.grid.layout_of(reached.call.outputs[reached.slot])
    anchor = Anchor(location, "output", reached.call.path, reached.slot, reached.view, layout=layout)
    found.add(on_call(trace, reached.call, anchor))
    if is_projection(trace, reached.call):
        found.weigh(weight, location, WeightSource(reached.call.path, "output", reached.view))


def _has_heads(view: object, value: Value | None) -> bool:
    return view is not None or (value is not None and value.tensor.ndim == 4)


def _bind_before_rotary(
    trace: Trace,
    found: Findings,
    location: Location,
    kind: LocationType,
    part: Part,
    value: Value | None,
    weight: str,
    block: Block,
    inside: _Inside,
) -> None:
    """The last heads before the rotary embedding that some module returns."""
    if value is None:
        found.absent(inside.why_not(part), location)
        return
    if as_output(trace, value, block.call, heads_first=True) is not None:
        found.absent(f"nothing happens between the projection and attention: use {kind}", location)
        return
    first = inside.call.first
    for before in sorted(behind(value, first), key=lambda v: -v.number):
        if not has_heads(before, block.grid) or _sizes(before) != _sizes(value):
            continue  # latents from which keys and values are made may have as many numbers
        first_heads = before.tensor.shape[1] == value.tensor.shape[1]
        reached = as_output(trace, before, inside.call, heads_first=first_heads)
        if reached is not None and _has_heads(reached.view, before):
            _add_heads(trace, found, location, weight, block, reached)
            return
    found.absent("no module returns the heads as they are before what is done to them last", location)


def _sizes(value: Value) -> list[int]:
    """The sizes of the axes of heads; where examples and positions share one, these are four too."""
    shape = value.tensor.shape
    return sorted((1, *shape) if len(shape) == 3 else shape)


def _bind_scores(trace: Trace, found: Findings, types: AttentionTypes, layer: int, inside: _Inside) -> None:
    parts: tuple[tuple[LocationType, Part], ...] = ((types.scores, "scores"), (types.pattern, "pattern"))
    for kind, part in parts:
        if inside.reaches(part):
            found.add(on_call(trace, inside.call, inside.anchor(kind[layer], part)))
        else:
            found.absent(inside.why_not(part), kind[layer])


def _bind_output(
    trace: Trace, found: Findings, types: AttentionTypes, layer: int, block: Block, inside: _Inside
) -> None:
    """z where the output projection reads it, and what each head writes."""
    out = inside.out
    reached = None
    if out is not None:
        reached = as_input(trace, out, inside.out_view, block.call)
    if reached is None:
        if inside.reaches("out"):
            found.add(on_call(trace, inside.call, inside.anchor(types.z[layer], "out")))
        else:
            found.absent(inside.why_not("out"), types.z, layer=layer)
        _bind_weighted_result(trace, found, types.result[layer], block, inside)
        return
    reads: tuple[tuple[LocationType, Mechanism], ...] = ((types.z, "input"), (types.result, "head result"))
    for kind, mechanism in reads:
        layout = block.grid.layout_of(reached.call.inputs[reached.slot])
        anchor = Anchor(kind[layer], mechanism, reached.call.path, reached.slot, reached.view, layout=layout)
        found.add(on_call(trace, reached.call, anchor))
    name = "W_O" if types.q_pre is not None else "xW_O"
    found.weigh(name, types.z[layer], WeightSource(reached.call.path, "input", reached.view))


def _bind_weighted_result(
    trace: Trace, found: Findings, location: Location, block: Block, inside: _Inside
) -> None:
    """What each head writes where a gate or a norm stands before the projection: the projection's rows of
    the head times what they are given.
    """
    out = inside.out
    if out is None:
        found.absent(inside.why_not("out"), location)
        return
    reached = as_weighted_input(trace, out, inside.out_view, block.call)
    if reached is None:
        why = why_no_input(trace, out, block.call) if inside.reaches("out") else inside.why_not("out")
        found.absent(why, location)
        return
    layout = block.grid.layout_of(reached.call.inputs[reached.slot])
    anchor = Anchor(location, "head result", reached.call.path, reached.slot, reached.view, layout=layout)
    found.add(on_call(trace, reached.call, anchor))


def _import_path(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"
