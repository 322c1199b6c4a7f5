"""The two ends of a model: what embeds the tokens, and what reads the last layer."""

from collections.abc import Iterator

from hookgraph.binding.data.anchors import Anchor, on_call
from hookgraph.binding.data.findings import Findings, WeightSource
from hookgraph.binding.resolving.blocks import Block
from hookgraph.binding.resolving.interiors import bind_scale
from hookgraph.binding.resolving.norms import find_norm
from hookgraph.binding.resolving.projections import is_projection
from hookgraph.binding.resolving.stacks import values_behind
from hookgraph.binding.running.outputs import read_output
from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import Value, alias_root
from hookgraph.ontology.transformer import TransformerStack


def bind_embedding(trace: Trace, found: Findings, stack: TransformerStack, first: Block) -> None:
    """The module that turned token ids into what the first layer of a stack reads."""
    behind = values_behind(first.entering)
    tokens = {v for v in trace.root.inputs.values() if not v.tensor.is_floating_point()}
    for call in trace.calls:
        out = call.outputs.get(None)
        if out is None or out not in behind or not out.is_activation or len(call.inputs) != 1:
            continue
        if any(alias_root(v) in tokens for v in call.inputs.values()):
            layout = first.grid.layout_of(out)
            found.add(on_call(trace, call, Anchor(stack.EMBED, "output", call.path, layout=layout)))
            found.weigh("W_E", stack.EMBED, WeightSource(call.path, "table"))
            return
    found.absent("no module looks tokens up for this stack", stack.EMBED)


def bind_head(trace: Trace, found: Findings, stack: TransformerStack, last: Block) -> None:
    """The norm after the last layer, the unembedding's input and the logits."""
    logits = trace.root.outputs.get("logits")
    if logits is None or not logits.is_activation:
        found.absent("the model returns no logits per position", stack.LOGITS)
        bind_last_norm(trace, found, stack, last)
        return
    found.add(Anchor(stack.LOGITS, "output", "", "logits"))
    head = next((c for c in _projections_behind(trace, logits) if c.first >= last.call.last), None)
    given = [] if head is None else [(s, v) for s, v in head.inputs.items() if v.is_activation]
    if head is None or not given:
        found.absent("no projection to the vocabulary was found", stack.FINAL_LN_OUT, stack.FINAL_LN_SCALE)
        return
    slot, value = given[0]
    layout = last.grid.layout_of(value)
    found.add(on_call(trace, head, Anchor(stack.FINAL_LN_OUT, "input", head.path, slot, layout=layout)))
    found.weigh("W_U", stack.LOGITS, WeightSource(head.path, "output"))
    bind_scale(trace, found, stack.FINAL_LN_SCALE, _unscaled(value), trace.root, last.grid)


def _unscaled(value: Value) -> Value:
    """What a value was before it was multiplied by a number, as some models do before the unembedding."""
    constant = value.op in ("mul", "div") and len(value.inputs) == 1 and value.scalars
    return alias_root(value.inputs[0]) if constant else value


def bind_last_norm(trace: Trace, found: Findings, stack: TransformerStack, last: Block) -> None:
    """Where no head follows a stack: the norm that reads its last layer, if there is one.

    Of several the one that what the model is measured by is computed from: others may read the layer too.
    """
    calls = [c for c in trace.calls if c.first >= last.call.last]
    norms = [n for c in calls if (n := find_norm(c, last.grid.layout)) is not None]
    norms = [n for n in norms if alias_root(n.input, [last.leaving]) is last.leaving]
    read = values_behind(trace.value_of(read_output(trace.output)))
    norm = next((n for n in norms if n.output in read), next(iter(norms), None))
    if norm is None:
        found.absent("no norm reads the last layer", stack.FINAL_LN_OUT, stack.FINAL_LN_SCALE)
        return
    layout = last.grid.layout_of(norm.output)
    anchor = Anchor(stack.FINAL_LN_OUT, "output", norm.call.path, norm.returned, layout=layout)
    found.add(on_call(trace, norm.call, anchor))
    bind_scale(trace, found, stack.FINAL_LN_SCALE, norm.output, trace.root, last.grid)


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
