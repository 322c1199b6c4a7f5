"""The inside of attention and of the MLP: heads, scores, neurons, and the norms before them."""

from collections.abc import Callable
from typing import Any

from hookgraph.binding.anchors import Anchor, Role
from hookgraph.binding.blocks import Block, Update
from hookgraph.binding.findings import Findings, WeightSource
from hookgraph.binding.norms import find_norm
from hookgraph.binding.projections import as_input, as_output, is_projection
from hookgraph.binding.tracing import ALIASES, AttentionCall, Call, Trace, Value, alias_root
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import TransformerStack


def bind_attention(
    trace: Trace,
    found: Findings,
    stack: TransformerStack,
    layer: int,
    block: Block,
    update: Update,
    source: Call | None,
) -> None:
    """Bind what one attention update reads and computes. `source` is the module that computes it."""
    bind_reading(trace, found, stack.ATTN_IN[layer], stack.ATTN_LN_SCALE[layer], block, source)
    call = update.attention
    if call is None:
        inside = (stack.ATTN_Q, stack.ATTN_K, stack.ATTN_V, stack.ATTN_Q_PRE, stack.ATTN_K_PRE)
        outside = (stack.ATTN_SCORES, stack.ATTN_PATTERN, stack.ATTN_Z, stack.ATTN_RESULT)
        reason = "this model computes attention without transformers' attention interface"
        found.absent(reason, *inside, *outside, layer=layer)
        return
    eager = _import_path(call.eager)
    heads: tuple[tuple[Location, Role, Value, str], ...] = (
        (stack.ATTN_Q[layer], "query", call.query, "W_Q"),
        (stack.ATTN_K[layer], "key", call.key, "W_K"),
        (stack.ATTN_V[layer], "value", call.value, "W_V"),
    )
    for location, role, value, weight in heads:
        _bind_heads(trace, found, location, role, value, weight, call, block, eager)
    _bind_before_rotary(trace, found, stack.ATTN_Q_PRE[layer], call.query, "W_Q", block, call)
    _bind_before_rotary(trace, found, stack.ATTN_K_PRE[layer], call.key, "W_K", block, call)
    path = call.call.path
    found.add(Anchor(stack.ATTN_SCORES[layer], "interior", path, role="scores", eager=eager))
    found.add(Anchor(stack.ATTN_PATTERN[layer], "interior", path, role="pattern", eager=eager))
    _bind_output(trace, found, stack, layer, block, call, eager)


def _bind_heads(
    trace: Trace,
    found: Findings,
    location: Location,
    role: Role,
    value: Value,
    weight: str,
    call: AttentionCall,
    block: Block,
    eager: str,
) -> None:
    """Queries, keys or values: as what a projection returns if nothing happens to them after it."""
    reached = as_output(trace, value, block.call, heads_first=True)
    if reached is None:
        found.add(Anchor(location, "interior", call.call.path, role=role, eager=eager))
        return
    found.add(Anchor(location, "output", reached.call.path, reached.slot, reached.view))
    if is_projection(trace, reached.call):
        found.weights[weight, location.layer] = WeightSource(reached.call.path, "output", reached.view)


def _bind_before_rotary(
    trace: Trace,
    found: Findings,
    location: Location,
    value: Value,
    weight: str,
    block: Block,
    call: AttentionCall,
) -> None:
    """The last heads before the rotary embedding that some module returns."""
    if as_output(trace, value, block.call, heads_first=True) is not None:
        name = "attn.q" if location.type.name == "attn.q_pre" else "attn.k"
        found.absent(f"nothing happens between the projection and attention: use {name}", location)
        return
    inside = call.call
    for before in sorted(_behind(value, inside.first), key=lambda v: -v.number):
        if before.tensor.shape != value.tensor.shape:
            continue
        reached = as_output(trace, before, inside, heads_first=True)
        if reached is not None:
            found.add(Anchor(location, "output", reached.call.path, reached.slot, reached.view))
            if is_projection(trace, reached.call):
                source = WeightSource(reached.call.path, "output", reached.view)
                found.weights[weight, location.layer] = source
            return
    found.absent("no module returns the heads before the rotary embedding", location)


def _bind_output(
    trace: Trace,
    found: Findings,
    stack: TransformerStack,
    layer: int,
    block: Block,
    call: AttentionCall,
    eager: str,
) -> None:
    """z where the output projection reads it, and what each head writes."""
    reached = as_input(trace, call.out, block.call)
    if reached is None:
        found.add(Anchor(stack.ATTN_Z[layer], "interior", call.call.path, role="out", eager=eager))
        found.absent("something happens between z and the output projection", stack.ATTN_RESULT, layer=layer)
        return
    found.add(Anchor(stack.ATTN_Z[layer], "input", reached.call.path, reached.slot, reached.view))
    found.add(Anchor(stack.ATTN_RESULT[layer], "head result", reached.call.path, reached.slot, reached.view))
    found.weights["W_O", layer] = WeightSource(reached.call.path, "input", reached.view)


def bind_mlp(
    trace: Trace,
    found: Findings,
    stack: TransformerStack,
    layer: int,
    block: Block,
    update: Update,
    source: Call | None,
) -> None:
    """Bind what one MLP update reads and computes. `source` is the module that computes it."""
    bind_reading(trace, found, stack.MLP_IN[layer], stack.MLP_LN_SCALE[layer], block, source)
    down = None if source is None else _last_projection(trace, source)
    read = None if down is None else down.activation
    if down is None or read is None:
        reason = "no projection from neurons at every position ends this MLP"
        found.absent(reason, stack.MLP_POST, stack.MLP_PRE, layer=layer)
        return
    slot, neurons = read
    found.add(Anchor(stack.MLP_POST[layer], "input", down.path, slot))
    found.weights["W_out", layer] = WeightSource(down.path, "input")
    activation = _activation(trace, neurons, block)
    if activation is None:
        found.absent("no module computes the nonlinearity", stack.MLP_PRE, layer=layer)
        return
    read = activation.activation
    if read is None:
        found.absent("the nonlinearity reads no neurons at every position", stack.MLP_PRE, layer=layer)
        return
    slot, before = read
    found.add(Anchor(stack.MLP_PRE[layer], "input", activation.path, slot))
    gate = as_output(trace, before, block.call, heads_first=False)
    up = _other_factor(trace, neurons, activation, block)
    names = ("W_in", None) if up is None else ("W_gate", "W_in")
    for name, reached in zip(names, (gate, up), strict=True):
        if name is not None and reached is not None and is_projection(trace, reached.call):
            found.weights[name, layer] = WeightSource(reached.call.path, "output", reached.view)


def bind_reading(
    trace: Trace, found: Findings, location: Location, scale: Location, block: Block, source: Call | None
) -> None:
    """What a module reads from the stream, and the scale of the norm before it."""
    shape = block.entering.tensor.shape
    given = [] if source is None else [(s, v) for s, v in source.inputs.items() if v.tensor.shape == shape]
    if source is None or not given:
        found.absent("no single module computes this update", location, scale)
        return
    slot, value = given[0]
    found.add(Anchor(location, "input", source.path, slot))
    bind_scale(trace, found, scale, value, block.call)


def bind_scale(trace: Trace, found: Findings, scale: Location, value: Value, within: Call) -> None:
    """The scale of the norm that computed `value`."""
    norm = next((n for c in trace.owners(value, within) if (n := find_norm(c)) is not None), None)
    if norm is None:
        found.absent("no norm stands before it", scale)
        return
    path = norm.call.path
    taken = [a.location for a in found.anchors.values() if a.mechanism == "norm scale" and a.module == path]
    if taken:
        found.absent(f"the norm is the one of {taken[0]}", scale)
        return
    found.add(Anchor(scale, "norm scale", path, norm.slot, centred=norm.centred, epsilon=norm.epsilon))


def _last_projection(trace: Trace, source: Call) -> Call | None:
    """The projection whose output is what `source` returns."""
    results = {alias_root(v) for v in source.outputs.values()}
    for call in reversed([source, *trace.inside(source)]):
        if is_projection(trace, call) and results & {alias_root(v) for v in call.outputs.values()}:
            return call
    return None


def _activation(trace: Trace, neurons: Value, block: Block) -> Call | None:
    """The module without parameters that computed the neurons, a product with a gate apart."""
    waiting = [neurons]
    while waiting:
        here = waiting.pop(0)
        for call in trace.producers.get(here, ()):
            plain = not call.is_identity and not any(True for _ in call.module.parameters())
            if plain and block.call in call.parents:
                return call
        if here.op in ALIASES or here.op == "mul":
            waiting.extend(v for v in here.inputs if v.number >= block.call.first and not v.is_source)
    return None


def _other_factor(trace: Trace, neurons: Value, activation: Call, block: Block) -> Any:
    """What the activation is multiplied with, if the MLP is gated."""
    product = alias_root(neurons)
    if product.op != "mul" or len(product.inputs) != 2:
        return None
    activated = {alias_root(v) for v in activation.outputs.values()}
    for factor in product.inputs:
        if alias_root(factor) not in activated:
            return as_output(trace, factor, block.call, heads_first=False)
    return None


def _behind(value: Value, first: int) -> set[Value]:
    """Everything from number `first` on that `value` was computed from."""
    seen: set[Value] = set()
    waiting = [value]
    while waiting:
        here = waiting.pop()
        if here in seen or here.number < first or here.is_source:
            continue
        seen.add(here)
        waiting.extend(here.inputs)
    return seen


def _import_path(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"
