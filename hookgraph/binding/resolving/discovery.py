"""From a trace to anchors: which location is reached where. No name of a module plays a part."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

from hookgraph.binding.data.anchors import Anchor, Mechanism, on_call
from hookgraph.binding.data.findings import Findings, Layer, StreamStep
from hookgraph.binding.resolving.blocks import Block, Step, Update
from hookgraph.binding.resolving.chains import find_chains
from hookgraph.binding.resolving.ends import bind_embedding, bind_head, bind_last_norm
from hookgraph.binding.resolving.heads import bind_attention, inside_of
from hookgraph.binding.resolving.interiors import bind_mlp
from hookgraph.binding.resolving.mixers import bind_mixer
from hookgraph.binding.resolving.mixing import find_mixing
from hookgraph.binding.resolving.norms import find_norm
from hookgraph.binding.resolving.refusals import why_unbound, written_into
from hookgraph.binding.resolving.resuming import resumptions
from hookgraph.binding.resolving.roles import Role, assign_roles, is_ambiguous, values_from
from hookgraph.binding.resolving.stacks import joined, main_chain, name_stacks
from hookgraph.binding.resolving.updates import bind_update
from hookgraph.binding.running.kernels import other_kernel
from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import Slot, Value, alias_chain, is_changed, is_overwritten
from hookgraph.errors import BindingError
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import DECODER, AttentionTypes, TransformerStack

_PARTIAL: Final = "it is computed at some positions only"


def discover(trace: Trace) -> Findings:
    """Resolve a traced model, and where its own code computes attention by the other kernel, too.

    Raises:
        BindingError: the model has no chain of layers with a residual stream.
    """
    found = _discover(trace)
    if any(anchor.operand is not None for anchor in found.anchors.values()):
        with suppress(Exception):  # a model that cannot be run with the other kernel never will be
            with other_kernel(trace.model):
                other = _discover(Trace(trace.model, trace.inputs))
            found.add_ways(other)
    return found


def _discover(trace: Trace) -> Findings:
    chains = joined(find_chains(trace))
    if not chains:
        raise BindingError(
            f"{type(trace.root.module).__name__} is not a transformer that hookgraph can bind: no list of "
            f"layers feeds one layer's output into the next along a residual stream: {why_unbound(trace)}"
        )
    main = main_chain(trace, chains)
    found = Findings(batch=main[0].grid.batch)
    others = [blocks for blocks in chains if blocks is not main]
    sources = [blocks[-1].leaving for blocks in others]
    outside = values_from(trace, sources, main[0].call.first)
    crossed = any(_bind_stack(trace, found, DECODER, main, outside))
    for stack, blocks in name_stacks(trace, others, crossed=crossed):
        _bind_stack(trace, found, stack, blocks, frozenset())
        bind_embedding(trace, found, stack, blocks[0])
        bind_last_norm(trace, found, stack, blocks[-1])
    bind_embedding(trace, found, DECODER, main[0])
    bind_head(trace, found, DECODER, main[-1])
    return found


def _bind_stack(
    trace: Trace, found: Findings, stack: TransformerStack, blocks: list[Block], outside: frozenset[Value]
) -> list[bool]:
    """Bind every layer of a stack; tells of each whether it attends to another stack."""
    mixing = find_mixing(trace, [b for b in blocks if is_ambiguous(b)])
    crossed: list[bool] = []
    beside = any(block.begins for block in blocks)
    for number, block in enumerate(blocks):
        roles = assign_roles(trace, block, mixing, outside)
        _bind_entry(trace, found, _points(stack, block)[0][number], block, beside=beside)
        _bind_block(trace, found, stack, number, block, roles)
        found.overtaken.update(_overtaken(trace, block))
        found.rewritten = found.rewritten or written_into(trace, block.call, block.entering)
        crossed.append("cross-attention" in roles)
    joined_axes = blocks[0].grid.layout in ("flat", "one row")
    if joined_axes and trace.packed & {*blocks[0].entering.tensor.shape[:2]}:
        found.packed.append(stack.RESID_PRE.stack)
    layers = found.layers[stack.RESID_PRE.stack]
    if not any(layer.shared for layer in layers):
        after = resumptions(trace, blocks)
        layers[:] = [replace(layer, after=x) for layer, x in zip(layers, after, strict=True)]
    return crossed


def _overtaken(trace: Trace, block: Block) -> dict[str, tuple[Slot, ...]]:
    """The modules that are given the stream before it is changed in place, and where among what they are
    given.
    """
    stream = {block.entering, *(s.value for s in block.steps)}
    values = (block.entering, *trace.values[block.call.first : block.call.last])
    found: dict[str, dict[Slot, None]] = {}
    for call in trace.inside(block.call) if any(v.overwritten for v in values) else []:
        for slot, value in call.inputs.items():
            held = alias_chain(value)
            if not stream.isdisjoint(held) and _is_overtaken(call, held):
                found.setdefault(call.path, {})[slot] = None
    return {path: tuple(slots) for path, slots in found.items()}


def _is_overtaken(call: Call, held: set[Value]) -> bool:
    """Whether what a module is given is changed in place after it. A module that changes it itself, or hands
    it on, has to be given the tensor that the model goes on with.
    """
    changed = [v.changed for v in held if v.overwritten]
    handed_on = any(not held.isdisjoint(alias_chain(v)) for v in call.outputs.values())
    return bool(changed) and not handed_on and not any(call.first <= n < call.last for n in changed)


def _points(stack: TransformerStack, block: Block) -> tuple[LocationType, LocationType, LocationType]:
    """The types of the stream before, in and after a layer: of one stream, or of several."""
    if block.streams > 1:
        return stack.STREAMS_PRE, stack.STREAMS_MID, stack.STREAMS_POST
    return stack.RESID_PRE, stack.RESID_MID, stack.RESID_POST


def _bind_entry(
    trace: Trace, found: Findings, location: Location, block: Block, *, beside: bool = False
) -> None:
    """What a layer is given. One that is no module shares it with what is added to its updates, and where a
    stream begins anew, later layers read what was before `beside` it: it is reached where it is returned, or
    else changed for all that hold it. So it is where a layer changes it: the model may go on with it.
    """
    grid = block.grid
    if block.begins and block.entering.tensor.shape[-1] != block.leaving.tensor.shape[-1]:
        found.absent("the layer is given no stream: it begins one of another width", location)
        return
    alone = block.ends is None and not beside
    owner = None if alone else next(trace.owners(block.entering, trace.root), None)
    if owner is not None:
        held = alias_chain(block.entering)
        slot, value = next((s, v) for s, v in owner.outputs.items() if v in held)
        view, layout = block.streams_of(value), grid.layout_of(value)
        anchor = Anchor(location, "output", owner.path, slot, view, layout=layout)
        found.add(on_call(trace, owner, anchor))
        return
    call = block.call if block.ends is None else block.ends[0]
    reading: Mechanism = "input" if alone and not is_changed(block.leaving, [block.entering]) else "sum"
    slot = next(s for s, v in call.inputs.items() if v is block.entering)
    view = block.streams_of(block.entering)
    anchor = Anchor(location, reading, call.path, slot, view, layout=grid.layout)
    found.add(on_call(trace, call, anchor))


def _bind_block(
    trace: Trace,
    found: Findings,
    stack: TransformerStack,
    layer: int,
    block: Block,
    roles: dict[Role, list[Update]],
) -> None:
    call = block.call
    slot_in = next(s for s, v in call.inputs.items() if v is block.entering)
    slot_out = next(s for s, v in call.outputs.items() if v is block.leaving)
    first, last = block.ends or (call, call)
    if block.streams > 1:
        reason = f"the model keeps several residual streams: see {stack.STREAMS_POST}"
        found.absent(reason, stack.RESID_PRE, stack.RESID_MID, stack.RESID_POST, layer=layer)
    layout = block.grid.layout
    point, view = _points(stack, block)[2][layer], block.streams_of(block.leaving)
    after = Anchor(point, _returning(block.leaving, call), last.path, slot_out, view, layout=layout)
    found.add(on_call(trace, last, after))
    kinds: dict[Role, LocationType] = {
        "attention": stack.ATTN_OUT,
        "cross-attention": stack.XATTN_OUT,
        "mixer": stack.MIXER_OUT,
        "mlp": stack.MLP_OUT,
        "extra": stack.EXTRA_OUT,
    }
    places: dict[Update, Location] = {}
    for role, kind in kinds.items():
        updates = roles.get(role, [])
        if len(updates) == 1 and bind_update(trace, found, kind[layer], block, updates[0], role):
            places[updates[0]] = kind[layer]
        elif len(updates) > 1:
            found.absent(f"layer {layer} adds {len(updates)} updates of this kind", kind, layer=layer)
    _bind_insides(trace, found, stack, layer, block, roles)
    middles = _bind_middles(trace, found, stack, layer, block, roles)
    stream = _stream(block, places, middles, point)
    by_name = call.named or isinstance(slot_out, str)
    shared = block.ends is not None or bool(block.grid.axes) or by_name or trace.calls_of(call.module) > 1
    found.layers.setdefault(stack.RESID_PRE.stack, []).append(
        Layer(
            first.path,
            slot_in,
            slot_out,
            call.size,
            stream,
            shared,
            layout,
            view is not None,
            stage=block.stage,
            overwritten=is_overwritten(block.entering) or is_overwritten(block.leaving),
        )
    )


def _bind_insides(
    trace: Trace,
    found: Findings,
    stack: TransformerStack,
    layer: int,
    block: Block,
    roles: dict[Role, list[Update]],
) -> None:
    """What the updates of a layer read and compute, of each kind of which there is one."""
    attentions: tuple[tuple[Role, AttentionTypes], ...] = (
        ("attention", stack.attention),
        ("cross-attention", stack.cross_attention),
    )
    for role, types in attentions:
        updates = roles.get(role, [])
        if len(updates) == 1 and not updates[0].step.partial:
            bind_attention(trace, found, types, layer, block, updates[0], _source(trace, block, updates[0]))
        elif updates:
            several = f"layer {layer} adds {len(updates)} updates of this kind"
            why = _PARTIAL if len(updates) == 1 else several
            found.absent(why, types.ln_scale, types.reads, *inside_of(types), layer=layer)
    mixer = roles.get("mixer", [])
    if len(mixer) == 1 and not mixer[0].step.partial:
        bind_mixer(trace, found, stack, layer, block, mixer[0], _source(trace, block, mixer[0]))
    mlp = roles.get("mlp", [])
    if len(mlp) == 1 and mlp[0].step.partial:
        inside = (stack.MLP_LN_SCALE, stack.MLP_IN, stack.MLP_PRE, stack.MLP_POST)
        found.absent(_PARTIAL, *inside, layer=layer)
    elif len(mlp) == 1:
        bind_mlp(trace, found, stack, layer, block, mlp[0], _source(trace, block, mlp[0]))


def _source(trace: Trace, block: Block, update: Update) -> Call | None:
    """The module that computes an update, behind its post-norm if it has one."""
    call = update.source
    while call is not None:
        norm = find_norm(call, block.grid.layout)
        if norm is None:
            return call
        call = next(trace.owners(norm.input, block.call), None)
    return None


def _bind_middles(
    trace: Trace,
    found: Findings,
    stack: TransformerStack,
    layer: int,
    block: Block,
    roles: dict[Role, list[Update]],
) -> dict[Value, Location]:
    """The points of the stream between the updates: after the mixing, and after cross-attention."""
    first = roles.get("attention", []) or roles.get("mixer", [])
    crossing, last = roles.get("cross-attention", []), roles.get("mlp", [])
    wanted: list[tuple[LocationType, list[Update], list[Update]]] = []
    if crossing:
        wanted = [(stack.RESID_MID, first, crossing), (stack.RESID_XMID, crossing, last)]
    else:
        wanted = [(_points(stack, block)[1], first, last)]
    middles: dict[Value, Location] = {}
    for kind, before, after in wanted:
        if len(before) != 1 or len(after) != 1:
            found.absent("the layer is not one mixing update followed by one MLP update", kind, layer=layer)
            continue
        value = _bind_middle(trace, found, kind[layer], block, before[0], after[0])
        if value is not None:
            middles[value] = kind[layer]
    return middles


def _bind_middle(
    trace: Trace, found: Findings, location: Location, block: Block, before: Update, after: Update
) -> Value | None:
    """The stream between two updates: what a norm returns, or a sum that a module is given."""
    steps = block.steps[block.steps.index(before.step) :]
    chain = {s.value for s in steps}
    if before.step is after.step or not any(i in chain for v in after.cone for i in v.inputs):
        found.absent("both updates read the layer's input, so no such sum exists", location)
        return None
    middle = _parting(steps, after)
    layout = block.grid.layout_of(middle)
    call = next(trace.owners(middle, block.call), None)
    if call is not None and middle in call.outputs.values():
        slot = next(s for s, v in call.outputs.items() if v is middle)
        how = _returning(middle, call)
        anchor = Anchor(location, how, call.path, slot, block.streams_of(middle), layout=layout)
        found.add(on_call(trace, call, anchor))
        return middle
    consumers = [
        (c, s) for c in trace.inside(block.call) for s, v in c.inputs.items() if _same_elements(v, middle)
    ]
    if not consumers:
        found.absent("no module is given the sum", location)
        return None
    call, slot = min(consumers, key=lambda pair: (len(pair[0].parents), pair[0].number))
    given = call.inputs[slot]
    layout = block.grid.layout_of(given)
    anchor = Anchor(location, "sum", call.path, slot, block.streams_of(given), layout=layout)
    found.add(on_call(trace, call, anchor))
    return middle


def _returning(value: Value, call: Call) -> Mechanism:
    """How what a module returns is reached. Of what it changes in place its caller may go on with what it
    gave, and ignore what is returned.
    """
    return "returned sum" if is_changed(value, call.inputs.values()) else "output"


def _parting(steps: Sequence[Step], after: Update) -> Value:
    """The last value of the stream before the next update is added that this update was computed from.

    What is done to the stream after it, as scaling what the update is added to, the update does not see.
    """
    values = [steps[0].value]
    for step in steps[1:]:
        if step.kind in ("add", "mix"):
            break
        values.append(step.value)
    read = {i for v in after.cone for i in v.inputs}
    return next((v for v in reversed(values) if v in read), values[-1])


def _same_elements(value: Value, source: Value) -> bool:
    """Whether a value is the source, or a view that shares its memory."""
    while value is not source:
        if value.op not in ("view", "_unsafe_view", "alias", "detach") or not value.inputs:
            return False
        value = value.inputs[0]
    return True


def _scaling(value: Value) -> StreamStep:
    """A multiplication by a number or by a parameter; a division by a parameter is not replayed."""
    names = [v.name for v in value.inputs if v.op == "parameter"]
    if names:
        return StreamStep("parameter", name=names[0]) if value.op == "mul" else StreamStep("add")
    factor = value.scalars[0] if value.scalars else 1.0
    return StreamStep("scale", factor=factor if value.op == "mul" else 1 / factor)


def _addition(update: Update, location: Location | None) -> StreamStep:
    path = update.call.path if update.call else ""
    return StreamStep("share" if update.spread else "add", location, path)


def _stream(
    block: Block, places: dict[Update, Location], middles: dict[Value, Location], last: Location
) -> tuple[StreamStep, ...]:
    """The layer's residual path as data, from its input to its output."""
    steps = [StreamStep("anew")] if block.begins else list[StreamStep]()
    for step in block.steps:
        if step.kind == "add":
            terms = [u for u in block.updates if u.step is step]
            steps += [_addition(u, places.get(u)) for u in terms] or [StreamStep("add")]
        elif step.kind == "norm" and step.norm is not None:
            steps.append(StreamStep("norm", name=step.norm.call.path, layout=step.norm.layout))
        elif step.kind == "scale":
            steps.append(_scaling(step.value))
        elif step.kind in ("mix", "clamp", "mask", "shift", "gate"):
            steps.append(StreamStep("add"))  # what it does is not replayed
        if step.value in middles:
            steps.append(StreamStep("here", middles[step.value]))
    return (*steps, StreamStep("here", last))
