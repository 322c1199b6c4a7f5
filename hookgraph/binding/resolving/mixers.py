"""Mixers without attention: what they read, the gate on what they computed, and what they project out."""

from hookgraph.binding.data.anchors import Anchor, on_call
from hookgraph.binding.data.findings import Findings
from hookgraph.binding.data.views import Columns, Span
from hookgraph.binding.resolving.blocks import Block, Update
from hookgraph.binding.resolving.interiors import NONLINEAR, bind_reading
from hookgraph.binding.resolving.projections import (
    Reached,
    as_output,
    floating_input,
    is_projection,
    last_projection,
)
from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import Value, alias_root
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import TransformerStack


def bind_mixer(
    trace: Trace,
    found: Findings,
    stack: TransformerStack,
    layer: int,
    block: Block,
    update: Update,
    source: Call | None,
) -> None:
    """Bind what one mixer reads and computes. `source` is the module that computes it."""
    bind_reading(trace, found, stack.MIXER_IN[layer], stack.MIXER_LN_SCALE[layer], block, update, source)
    down = None if source is None else last_projection(trace, source)
    read = None if down is None else floating_input(down)
    if source is None or down is None or read is None or read[1].tensor.ndim not in (2, 3):
        found.absent("no single projection ends this mixer", stack.MIXER_Z, stack.MIXER_GATE, layer=layer)
        return
    slot, projected = read
    layout = block.grid.layout_of(projected)
    found.add(on_call(trace, down, Anchor(stack.MIXER_Z[layer], "input", down.path, slot, layout=layout)))
    _bind_gate(trace, found, stack.MIXER_GATE[layer], source, projected)


def _bind_gate(trace: Trace, found: Findings, location: Location, source: Call, projected: Value) -> None:
    """The one factor of what is projected out that is a projection, behind a nonlinearity or not."""
    gates = [g for factor in _factors(trace, source, projected) if (g := _gate(trace, source, factor))]
    if len(gates) != 1:
        reason = f"{len(gates)} projections multiply what the mixer computed" if gates else _NO_GATE
        found.absent(reason, location)
        return
    reached = gates[0]
    if reached.call.outputs[reached.slot].tensor.ndim != 3:
        found.absent("the projection has one axis for batch and position", location)
        return
    view = reached.view
    if isinstance(view, Columns):
        if view.stride != view.width:
            found.absent("the gate lies between other features, head by head", location)
            return
        view = Span(view.start, view.count * view.width)
    anchor = Anchor(location, "output", reached.call.path, reached.slot, view)
    found.add(on_call(trace, reached.call, anchor))


_NO_GATE = "no projection multiplies what the mixer computed, or other operations come between"


def _factors(trace: Trace, source: Call, projected: Value) -> list[Value]:
    """What was multiplied last, in the mixer itself or by a norm that is given the gate."""
    call = next(trace.owners(projected, source), None)
    given = [] if call is None else [v for v in call.inputs.values() if v.tensor.is_floating_point()]
    if len(given) == 2:
        return given
    here = alias_root(projected)
    computed = [v for v in here.inputs if not v.is_source]
    return computed if here.op == "mul" and len(computed) == 2 else []


def _gate(trace: Trace, source: Call, factor: Value) -> Reached | None:
    """A factor, or what its nonlinearity reads, as what a projection returns."""
    root = alias_root(factor)
    before = root.inputs[0] if root.op in NONLINEAR and root.inputs else factor
    reached = as_output(trace, before, source, heads_first=False)
    return reached if reached is not None and is_projection(trace, reached.call) else None
