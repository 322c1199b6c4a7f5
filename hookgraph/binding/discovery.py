"""From a trace to anchors: which location is reached where. No name of a module plays a part."""

from collections.abc import Iterator

from hookgraph.binding.anchors import Anchor
from hookgraph.binding.blocks import Block, Update, find_chains, reads
from hookgraph.binding.findings import Findings, Layer, WeightSource
from hookgraph.binding.interiors import bind_attention, bind_mlp, bind_scale
from hookgraph.binding.norms import find_norm
from hookgraph.binding.projections import is_projection
from hookgraph.binding.tracing import Call, Trace, Value, alias_root
from hookgraph.binding.views import Scaled
from hookgraph.errors import BindingError
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import DECODER, TransformerStack


def discover(trace: Trace) -> Findings:
    """Resolve a traced model.

    Raises:
        BindingError: the model has no chain of layers with a residual stream.
    """
    chains = find_chains(trace)
    if not chains:
        lists = [p for p, m in trace.root.module.named_modules() if type(m).__name__ == "ModuleList"]
        raise BindingError(
            f"{type(trace.root.module).__name__} is not a transformer that hookgraph can bind: no list of "
            "layers feeds one layer's output into the next along a residual stream "
            f"(lists of modules: {', '.join(lists) or 'none'})"
        )
    found = Findings()
    main = max(chains.values(), key=lambda blocks: blocks[-1].call.last)
    for number, block in enumerate(main):
        _bind_block(trace, found, DECODER, number, block)
    _bind_embedding(trace, found)
    _bind_head(trace, found, main[-1])
    return found


def _bind_block(trace: Trace, found: Findings, stack: TransformerStack, layer: int, block: Block) -> None:
    call = block.call
    slot_in = next(s for s, v in call.inputs.items() if v is block.entering)
    slot_out = next(s for s, v in call.outputs.items() if v is block.leaving)
    found.add(Anchor(stack.RESID_PRE[layer], "input", call.path, slot_in))
    found.add(Anchor(stack.RESID_POST[layer], "output", call.path, slot_out))
    size = 0 if slot_out is None else len(call.outputs)
    found.layers.setdefault(stack.RESID_PRE.stack, []).append(Layer(call.path, slot_in, slot_out, size))
    attention = [u for u in block.updates if u.mixes_positions]
    other = [u for u in block.updates if not u.mixes_positions]
    if len(attention) == 1:
        _bind_update(found, stack.ATTN_OUT[layer], attention[0])
        source = _source(trace, block, attention[0])
        bind_attention(trace, found, stack, layer, block, attention[0], source)
    if len(other) == 1:
        _bind_update(found, stack.MLP_OUT[layer], other[0])
        source = _source(trace, block, other[0])
        bind_mlp(trace, found, stack, layer, block, other[0], source)
    for kind, updates in ((stack.ATTN_OUT, attention), (stack.MLP_OUT, other)):
        if len(updates) != 1:
            found.absent(f"layer {layer} adds {len(updates)} such updates to the stream", kind, layer=layer)
    _bind_middle(trace, found, stack.RESID_MID[layer], block, attention, other)


def _bind_update(found: Findings, location: Location, update: Update) -> None:
    if update.call is None:
        found.absent("the update is computed by the layer itself, no module returns it", location)
        return
    slot = next(s for s, v in update.call.outputs.items() if v is update.value)
    view = None if update.coefficient == 1.0 else Scaled(update.coefficient)
    found.add(Anchor(location, "output", update.call.path, slot, view))


def _source(trace: Trace, block: Block, update: Update) -> Call | None:
    """The module that computes an update, behind its post-norm if it has one."""
    call = update.call
    while call is not None:
        norm = find_norm(call)
        if norm is None:
            return call
        call = next(trace.owners(norm.input, block.call), None)
    return None


def _bind_middle(
    trace: Trace,
    found: Findings,
    location: Location,
    block: Block,
    attention: list[Update],
    other: list[Update],
) -> None:
    """The sum between attention and MLP: reached in place where a module is given it."""
    if len(attention) != 1 or len(other) != 1:
        found.absent("the layer is not one attention update followed by one MLP update", location)
        return
    steps = block.steps
    after = steps[steps.index(attention[0].step) :]
    middle = attention[0].step.value
    for step in after[1:]:
        if step.kind == "add":
            break
        middle = step.value
    same_sum = attention[0].step is other[0].step
    chain = {middle, *(s.value for s in after)}
    if same_sum or not reads(other[0], chain):
        found.absent("attention and MLP both read the layer's input, so no such sum exists", location)
        return
    call = next(trace.owners(middle, block.call), None)
    if call is not None and middle in call.outputs.values():
        slot = next(s for s, v in call.outputs.items() if v is middle)
        found.add(Anchor(location, "output", call.path, slot))
        return
    consumers = [(c, s) for c in trace.inside(block.call) for s, v in c.inputs.items() if v is middle]
    if not consumers:
        found.absent("no module is given the sum", location)
        return
    call, slot = min(consumers, key=lambda pair: (len(pair[0].parents), pair[0].number))
    found.add(Anchor(location, "sum", call.path, slot))


def _bind_embedding(trace: Trace, found: Findings) -> None:
    tokens = {v for v in trace.root.inputs.values() if not v.tensor.is_floating_point()}
    for call in trace.calls:
        out = call.outputs.get(None)
        looks_up = any(alias_root(v) in tokens for v in call.inputs.values())
        if looks_up and out is not None and out.is_activation and len(call.inputs) == 1:
            found.add(Anchor(DECODER.EMBED, "output", call.path))
            found.weights["W_E", None] = WeightSource(call.path, "table")
            return
    found.absent("no module looks the tokens up", DECODER.EMBED)


def _bind_head(trace: Trace, found: Findings, last: Block) -> None:
    logits = trace.root.outputs.get("logits")
    if logits is None:
        for location in (DECODER.LOGITS, DECODER.FINAL_LN_OUT, DECODER.FINAL_LN_SCALE):
            found.absent("the model returns no logits", location)
        return
    found.add(Anchor(DECODER.LOGITS, "output", "", "logits"))
    head = next((c for c in _projections_behind(trace, logits) if c.first >= last.call.last), None)
    read = None if head is None else head.activation
    if head is None or read is None:
        reason = "no projection from every position to the vocabulary was found"
        found.absent(reason, DECODER.FINAL_LN_OUT, DECODER.FINAL_LN_SCALE)
        return
    slot, given = read
    found.add(Anchor(DECODER.FINAL_LN_OUT, "input", head.path, slot))
    found.weights["W_U", None] = WeightSource(head.path, "output")
    bind_scale(trace, found, DECODER.FINAL_LN_SCALE, given, trace.root)


def _projections_behind(trace: Trace, value: Value) -> Iterator[Call]:
    """The projections that a value was computed from, the nearest first."""
    waiting, seen = [value], set[Value]()
    while waiting:
        here = max(waiting, key=lambda v: v.number)
        waiting.remove(here)
        if here in seen or here.is_source:
            continue
        seen.add(here)
        projections = [c for c in trace.producers.get(here, ()) if is_projection(trace, c)]
        if projections:
            yield projections[0]
            waiting.extend(projections[0].inputs.values())
        else:
            waiting.extend(here.inputs)
