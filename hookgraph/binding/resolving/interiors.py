"""What an update reads from the stream, the norm before it, and the inside of the MLP."""

from collections.abc import Sequence

from hookgraph.binding.data.anchors import Anchor, on_call
from hookgraph.binding.data.findings import Findings, WeightSource
from hookgraph.binding.data.layouts import Grid
from hookgraph.binding.resolving.blocks import Block, Update, reads_past_attention
from hookgraph.binding.resolving.norms import Norm, find_norm
from hookgraph.binding.resolving.paths import cone_of
from hookgraph.binding.resolving.projections import (
    Reached,
    as_output,
    floating_input,
    is_matrix_product,
    is_projection,
    last_projection,
)
from hookgraph.binding.resolving.routing import bind_experts
from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import ALIASES, Slot, Value, alias_root
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import TransformerStack

NONLINEAR = frozenset(
    {"gelu", "silu", "relu", "tanh", "sigmoid", "softplus", "elu", "leaky_relu", "hardtanh"}
)

_ADDS = "the module that reads the stream for this update also adds the update to it: an edit would move both"


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
    bind_reading(trace, found, stack.MLP_IN[layer], stack.MLP_LN_SCALE[layer], block, update, source)
    if bind_experts(trace, found, stack, layer, block, update):
        reason = f"the MLP is a mixture of experts: see {stack.EXPERT_POST}"
        found.absent(reason, stack.MLP_POST, stack.MLP_PRE, layer=layer)
        return
    down = None if source is None else last_projection(trace, source)
    if down is None:
        found.absent("no single projection ends this MLP", stack.MLP_POST, stack.MLP_PRE, layer=layer)
        return
    read = floating_input(down)
    if read is None:
        found.absent(
            "what the projection reads is no tensor of its arguments",
            stack.MLP_POST,
            stack.MLP_PRE,
            layer=layer,
        )
        return
    slot, neurons = read
    layout = block.grid.layout_of(neurons)
    anchor = Anchor(stack.MLP_POST[layer], "input", down.path, slot, layout=layout)
    found.add(on_call(trace, down, anchor))
    found.weigh("W_out", stack.MLP_POST[layer], WeightSource(down.path, "input"))
    _bind_nonlinearity(trace, found, stack.MLP_PRE[layer], neurons, block)


def _bind_nonlinearity(
    trace: Trace, found: Findings, location: Location, neurons: Value, block: Block
) -> None:
    activation = _activation(trace, neurons, block)
    read = None if activation is None else floating_input(activation)
    if activation is not None and read is not None:
        slot, before = read
        anchor = Anchor(location, "input", activation.path, slot, layout=block.grid.layout_of(before))
        found.add(on_call(trace, activation, anchor))
        activated = {alias_root(v) for v in activation.outputs.values()}
    else:
        operation = _nonlinear_operation(neurons, block.call.first)
        before = None if operation is None else operation.inputs[0]
        reached = None if before is None else as_output(trace, before, block.call, heads_first=False)
        if operation is None or before is None or reached is None:
            found.absent("the input of the nonlinearity is not what a module is given or returns", location)
            return
        anchor = Anchor(
            location,
            "output",
            reached.call.path,
            reached.slot,
            reached.view,
            layout=block.grid.layout_of(before),
        )
        found.add(on_call(trace, reached.call, anchor))
        activated = {operation}
    gate = as_output(trace, before, block.call, heads_first=False)
    up = _other_factor(trace, neurons, activated, block)
    names = ("W_in", None) if up is None else ("W_gate", "W_in")
    for name, reached in zip(names, (gate, up), strict=True):
        if name is not None and reached is not None and is_projection(trace, reached.call):
            found.weigh(name, location, WeightSource(reached.call.path, "output", reached.view))


def bind_reading(
    trace: Trace,
    found: Findings,
    location: Location,
    scale: Location,
    block: Block,
    update: Update,
    *sources: Call | None,
) -> None:
    """What an update reads from the stream, and the scale of the norm before it.

    It is what the first of `sources` is given that is given anything of the stream's shape; failing that,
    what the only module is given that reads the stream, or a norm of it, for this update; or what a norm
    returns that only this update reads. A module that adds the update to the stream is given the stream
    itself, which is more than what the update reads. A projection may be given what the layer's own code
    computed for this update, of the stream's shape by chance.
    """
    size = block.entering.tensor.numel() // block.streams
    adding = False
    for source in sources:
        given = [] if source is None else [(s, v) for s, v in source.inputs.items() if _fits(v, size)]
        given = [(s, v) for s, v in given if not reads_past_attention(v, block)]
        if source is not None and is_projection(trace, source):
            given = [(s, v) for s, v in given if not _is_projected(v, block)]
        if source is not None and source.first <= update.step.value.number < source.last:
            adding, given = True, [(s, v) for s, v in given if not _is_stream(v, block)]
        if source is not None and given:
            _add_reading(trace, found, location, scale, block, source, *given[0])
            return
    readers = _readers(trace, block, update)
    if len(readers) == 1:
        _add_reading(trace, found, location, scale, block, *readers[0])
        return
    norm = _own_norm(trace, block, update, [value for _, _, value in readers])
    if norm is not None:
        layout = block.grid.layout_of(norm.output)
        anchor = Anchor(location, "output", norm.call.path, norm.returned, layout=layout)
        found.add(on_call(trace, norm.call, anchor))
        bind_scale(trace, found, scale, norm.output, block.call, block.grid)
        return
    found.absent(_ADDS if adding else "no single module reads the stream for this update", location, scale)


def _add_reading(
    trace: Trace,
    found: Findings,
    location: Location,
    scale: Location,
    block: Block,
    source: Call,
    slot: Slot,
    value: Value,
) -> None:
    also = tuple(s for s, v in source.inputs.items() if v is value and s != slot)
    anchor = Anchor(location, "input", source.path, slot, layout=block.grid.layout_of(value), also=also)
    found.add(on_call(trace, source, anchor))
    bind_scale(trace, found, scale, value, block.call, block.grid)


def _fits(value: Value, size: int) -> bool:
    return value.tensor.is_floating_point() and value.tensor.ndim in (2, 3) and value.tensor.numel() == size


def _readers(trace: Trace, block: Block, update: Update) -> list[tuple[Call, Slot, Value]]:
    """The outermost modules, norms apart, that are given the stream or a norm of it for an update."""
    stream = {block.entering, *(s.value for s in block.steps)}
    norms = [n for c in trace.inside(block.call) if (n := find_norm(c, block.grid.layout)) is not None]
    read = stream | {n.output for n in norms if alias_root(n.input, stream) in stream}
    readers: list[tuple[Call, Slot, Value]] = []
    for call in trace.inside(block.call):
        used = any(v in update.cone for v in call.outputs.values()) and not call.is_identity
        inside = any(call in reader.parents or reader in call.parents for reader, _, _ in readers)
        if not used or inside or any(call is n.call for n in norms):
            continue
        for slot, value in call.inputs.items():
            if alias_root(value, read) in read:
                readers.append((call, slot, value))
                break
    return readers


def _is_projected(value: Value, block: Block) -> bool:
    """Whether a projection stands between the stream and a value."""
    stream = {block.entering, *(s.value for s in block.steps)}
    return any(is_matrix_product(v) for v in cone_of(value, stream, block.call.first))


def _is_stream(value: Value, block: Block) -> bool:
    stream = {block.entering, *(s.value for s in block.steps)}
    return alias_root(value, stream) in stream


def _own_norm(trace: Trace, block: Block, update: Update, values: Sequence[Value]) -> Norm | None:
    """The norm whose result all of these values are, and nothing but this update is computed from."""
    norms = [n for c in trace.inside(block.call) if (n := find_norm(c, block.grid.layout)) is not None]
    read = {alias_root(v, [n.output for n in norms]) for v in values}
    norm = next((n for n in norms if read == {n.output}), None)
    if norm is None or _is_stream(norm.output, block):
        return None
    inside = trace.values[block.call.first : block.call.last]
    alone = all(v in update.cone for v in inside if norm.output in v.inputs)
    return norm if alone else None


def bind_scale(
    trace: Trace, found: Findings, scale: Location, value: Value, within: Call, grid: Grid
) -> None:
    """The scale of the norm that computed `value`."""
    norms = (find_norm(c, grid.layout) for c in trace.owners(value, within))
    norm = next((n for n in norms if n is not None), None)
    if norm is None:
        found.absent("no norm stands before it", scale)
        return
    if norm.returned is not None:
        found.absent("the norm returns more than its result", scale)
        return
    if norm.layout:
        found.absent("the norm has features before positions", scale)
        return
    path, nth = norm.call.path, norm.call.nth
    taken = [
        a.location
        for a in found.anchors.values()
        if a.mechanism == "norm scale" and a.module == path and a.call == nth
    ]
    if taken:
        found.absent(f"the norm is the one of {taken[0]}", scale)
        return
    layout = grid.layout_of(norm.input)
    anchor = Anchor(
        scale, "norm scale", path, norm.slot, centred=norm.centred, epsilon=norm.epsilon, layout=layout
    )
    found.add(on_call(trace, norm.call, anchor))


def _activation(trace: Trace, neurons: Value, block: Block) -> Call | None:
    """The module without parameters that computed the neurons, a product with a gate apart."""
    waiting = [neurons]
    while waiting:
        here = waiting.pop(0)
        for call in trace.producers.get(here, ()):
            plain = not call.is_identity and not any(True for _ in call.module.parameters())
            if plain and block.call in call.parents and len(call.inputs) == 1:
                return call
        waiting.extend(_factors(here, block.call.first))
    return None


def _nonlinear_operation(neurons: Value, first: int) -> Value | None:
    """The operation that computed the neurons, a product with a gate apart."""
    waiting = [neurons]
    while waiting:
        here = waiting.pop(0)
        if here.op in NONLINEAR and here.inputs:
            return here
        waiting.extend(_factors(here, first))
    return None


def _factors(value: Value, first: int) -> list[Value]:
    if value.op not in ALIASES and value.op != "mul":
        return []
    return [v for v in value.inputs if v.number >= first and not v.is_source]


def _other_factor(trace: Trace, neurons: Value, activated: set[Value], block: Block) -> Reached | None:
    """What the activation is multiplied with, if the MLP is gated."""
    product = alias_root(neurons)
    if product.op != "mul" or len(product.inputs) != 2:
        return None
    for factor in product.inputs:
        if alias_root(factor) not in activated:
            return as_output(trace, factor, block.call, heads_first=False)
    return None
