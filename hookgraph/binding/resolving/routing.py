"""Mixtures of experts: the router, the routed experts and the shared ones, found in the trace.

The routed experts of a layer are one module that goes through transformers' experts interface; what it
is given tells the router, and what is added to what it returns are the shared experts.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import final

from hookgraph.binding.data.anchors import Anchor, Role, on_call
from hookgraph.binding.data.findings import ExpertLayer, Findings
from hookgraph.binding.data.layouts import Layout
from hookgraph.binding.resolving.blocks import Block, Update
from hookgraph.binding.resolving.projections import behind, floating_input, is_matrix_product, last_projection
from hookgraph.binding.running.experts import expert_count, is_experts
from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import ALIASES, Slot, Value, alias_root
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import TransformerStack

_CHOICES = frozenset({"topk", "argmax"})
"""Operations by which routers choose."""


@final
@dataclass(frozen=True, slots=True)
class _Routing:
    """What the routed experts of a layer are given."""

    call: Call
    indices: tuple[Slot, Value]
    weights: tuple[Slot, Value]


def bind_experts(
    trace: Trace, found: Findings, stack: TransformerStack, layer: int, block: Block, update: Update
) -> bool:
    """Bind the mixture of experts that computes an update; tells whether there is one."""
    calls = [
        c
        for c in trace.inside(block.call)
        if is_experts(c.module) and any(v in update.cone for v in c.outputs.values())
    ]
    kinds: Sequence[LocationType] = (
        stack.ROUTER_LOGITS,
        stack.ROUTER_INDICES,
        stack.ROUTER_WEIGHTS,
        stack.EXPERT_POST,
        stack.EXPERT_OUT,
        stack.ROUTED_OUT,
    )
    if len(calls) > 1:
        found.absent(f"the layer calls {len(calls)} sets of experts", *kinds, layer=layer)
        return True
    if not calls:
        return _bind_own_code(trace, found, stack, layer, block, update)
    call = calls[0]
    routing = _routing(call)
    if routing is None:
        found.absent("the experts are not given which of them each token is for", *kinds, layer=layer)
    else:
        _bind_routing(trace, found, stack, layer, routing)
        cone, count = behind(routing.weights[1], block.call.first), expert_count(call.module)
        products = {v for v in cone if is_matrix_product(v) and v.tensor.shape[-1] == count}
        _bind_logits(trace, found, stack.ROUTER_LOGITS[layer], block, cone, products)
    slot, routed = next(iter(call.outputs.items()))
    _add_output(trace, found, stack.ROUTED_OUT[layer], call, slot, routed)
    whole = _sum_with(trace, block, update, routed)
    found.experts[stack.RESID_PRE.stack, layer] = ExpertLayer(call.path, "" if whole is None else whole.path)
    _bind_shared(trace, found, stack, layer, block, routed, whole)
    return True


def _routing(call: Call) -> _Routing | None:
    integers = [(s, v) for s, v in call.inputs.items() if not v.tensor.is_floating_point()]
    if len(integers) != 1:
        return None
    shape = integers[0][1].tensor.shape
    floats = [
        (s, v) for s, v in call.inputs.items() if v.tensor.is_floating_point() and v.tensor.shape == shape
    ]
    return _Routing(call, integers[0], floats[-1]) if floats else None


def _bind_routing(
    trace: Trace, found: Findings, stack: TransformerStack, layer: int, routing: _Routing
) -> None:
    """Which experts, with what weights, and what each of them computes."""
    call = routing.call
    given = ((stack.ROUTER_INDICES, *routing.indices), (stack.ROUTER_WEIGHTS, *routing.weights))
    for kind, slot, value in given:
        limit = 0 if value.tensor.is_floating_point() else expert_count(call.module)
        layout: Layout = "flat" if value.tensor.ndim == 2 else ""
        found.add(
            on_call(trace, call, Anchor(kind[layer], "input", call.path, slot, layout=layout, limit=limit))
        )
    computed: tuple[tuple[LocationType, Role], ...] = (
        (stack.EXPERT_POST, "neurons"),
        (stack.EXPERT_OUT, "outputs"),
    )
    for kind, role in computed:
        anchor = Anchor(kind[layer], "experts", call.path, role=role, layout="flat")
        found.add(on_call(trace, call, anchor))


def _bind_own_code(
    trace: Trace, found: Findings, stack: TransformerStack, layer: int, block: Block, update: Update
) -> bool:
    """The router's logits of a mixture that does not go through the interface, as far as there is one."""
    choices = [v for v in update.cone if v.op in _CHOICES]
    if not choices:
        return False
    earlier = behind(min(choices, key=lambda v: v.number), block.call.first)
    products = {v for v in earlier if is_matrix_product(v)}
    _bind_logits(trace, found, stack.ROUTER_LOGITS[layer], block, update.cone, products)
    rest = (
        stack.ROUTER_INDICES,
        stack.ROUTER_WEIGHTS,
        stack.EXPERT_POST,
        stack.EXPERT_OUT,
        stack.ROUTED_OUT,
        stack.SHARED_GATE,
        stack.SHARED_POST,
        stack.SHARED_OUT,
    )
    found.absent("its experts do not go through transformers' experts interface", *rest, layer=layer)
    return True


def _bind_logits(
    trace: Trace,
    found: Findings,
    location: Location,
    block: Block,
    cone: Collection[Value],
    products: Collection[Value],
) -> None:
    """The last of `products`, one number per expert; `cone` holds what was computed from it."""
    if not products:
        found.absent("the weights are not computed from one number per expert", location)
        return
    logits = max(products, key=lambda v: v.number)
    uses = [v.number for v in cone if v.op not in ALIASES and _reads(v, logits)]
    for call in reversed(trace.inside(block.call)):
        slot = next((s for s, v in call.outputs.items() if alias_root(v) is logits), None)
        returns = any(alias_root(v) is logits for v in call.outputs.values())
        if returns and uses and min(uses) >= call.last:
            _add_output(trace, found, location, call, slot, call.outputs[slot])
            return
    owner = max(
        (c for c in trace.inside(block.call) if c.first <= logits.number < c.last),
        key=lambda c: len(c.parents),
        default=None,
    )
    inside = () if owner is None else trace.values[owner.first : owner.last]
    if owner is None or sum(is_matrix_product(v) for v in inside) != 1:
        found.absent("no module returns the logits, or computes them by its only matrix product", location)
        return
    found.add(on_call(trace, owner, Anchor(location, "product", owner.path, role="product", layout="flat")))


def _reads(value: Value, source: Value) -> bool:
    return any(alias_root(v) is source for v in value.inputs)


def _add_output(
    trace: Trace, found: Findings, location: Location, call: Call, slot: Slot, value: Value
) -> None:
    layout: Layout = "flat" if value.tensor.ndim == 2 else ""
    anchor = Anchor(location, "output", call.path, slot, layout=layout)
    found.add(on_call(trace, call, anchor))


def _sum_with(trace: Trace, block: Block, update: Update, routed: Value) -> Call | None:
    """The smallest module that returns the routed experts' output with what is added to it."""
    calls = [
        c
        for c in trace.inside(block.call)
        if c.first <= routed.number < c.last
        and set(c.outputs) == {None}
        and c.outputs[None] in update.cone
        and c.outputs[None] is not routed
        and any(alias_root(t) is alias_root(routed) for t in _terms(c.outputs[None], c.first))
    ]
    return max(calls, key=lambda c: len(c.parents), default=None)


def _terms(value: Value, first: int) -> list[Value]:
    """What a value is the sum of."""
    root = alias_root(value)
    sizes = [i.tensor.numel() for i in root.inputs]
    if root.op != "add" or root.number < first or len(sizes) != 2 or sizes[0] != sizes[1]:
        return [value]
    return [t for i in root.inputs for t in _terms(i, first)]


def _bind_shared(
    trace: Trace,
    found: Findings,
    stack: TransformerStack,
    layer: int,
    block: Block,
    routed: Value,
    whole: Call | None,
) -> None:
    """What is added to the routed experts' output, and the gate that it may be multiplied by."""
    kinds = (stack.SHARED_GATE, stack.SHARED_POST, stack.SHARED_OUT)
    terms = [] if whole is None else _terms(whole.outputs[None], whole.first)
    others = [t for t in terms if alias_root(t) is not alias_root(routed)]
    if len(others) != 1:
        reason = "its experts are all routed" if not others else f"{len(others)} terms are added to them"
        found.absent(reason, *kinds, layer=layer)
        return
    term, gate = others[0], None
    product = alias_root(term)
    if product.op == "mul" and len(product.inputs) == 2:
        gate, term = sorted(product.inputs, key=lambda v: v.tensor.numel())
    if gate is None or not _bind_gate(trace, found, stack.SHARED_GATE[layer], block, gate):
        found.absent("no gate module stands before the shared experts", stack.SHARED_GATE, layer=layer)
    call = next((c for c in trace.owners(term, block.call)), None)
    if call is None:
        found.absent("no module returns them", stack.SHARED_OUT, stack.SHARED_POST, layer=layer)
        return
    slot = next(s for s, v in call.outputs.items() if alias_root(v) is alias_root(term))
    _add_output(trace, found, stack.SHARED_OUT[layer], call, slot, call.outputs[slot])
    down = last_projection(trace, call)
    read = None if down is None else floating_input(down)
    if down is None or read is None:
        found.absent("no single projection ends the shared experts", stack.SHARED_POST, layer=layer)
        return
    layout: Layout = "flat" if read[1].tensor.ndim == 2 else ""
    found.add(
        on_call(trace, down, Anchor(stack.SHARED_POST[layer], "input", down.path, read[0], layout=layout))
    )


def _bind_gate(trace: Trace, found: Findings, location: Location, block: Block, gate: Value) -> bool:
    """What a module returns whose sigmoid is the gate."""
    root = alias_root(gate)
    if root.op != "sigmoid":
        return False
    call = next((c for c in trace.owners(root.inputs[0], block.call)), None)
    if call is None:
        return False
    slot = next(s for s, v in call.outputs.items() if alias_root(v) is alias_root(root.inputs[0]))
    _add_output(trace, found, location, call, slot, call.outputs[slot])
    return True
