"""Where what a layer adds to its stream is reached: as what a module returns, or times the layer's weight."""

from typing import Final

from hookgraph.binding.data.anchors import Anchor, on_call
from hookgraph.binding.data.anchors import Role as Part
from hookgraph.binding.data.findings import Findings
from hookgraph.binding.data.views import Scaled
from hookgraph.binding.resolving.blocks import Block, Update
from hookgraph.binding.resolving.own_attention import operand_of
from hookgraph.binding.tracing.operations import RESULT
from hookgraph.binding.tracing.trace import Trace
from hookgraph.binding.tracing.values import ALIASES
from hookgraph.ontology.locations import Location

_WRITTEN: Final = (
    "what a module returns is written into in place before it is added (as `x[:, 1:] *= ...` does), which is "
    "not followed"
)


def bind_update(
    trace: Trace, found: Findings, location: Location, block: Block, update: Update, part: Part
) -> bool:
    """Bind one update, which is this `part` of what the layer computes; tells whether it is reached."""
    if update.call is None:
        anchor = _weighed(trace, location, block, update, part)
        if anchor is None:
            found.absent(_why_not(update), location)
            return False
        found.add(on_call(trace, block.call, anchor))
        return True
    if _is_written(trace, update):
        found.absent(_WRITTEN, location)
        return False
    slot = next(s for s, v in update.call.outputs.items() if v is update.value)
    layout = block.grid.layout_of(update.value)
    anchor = Anchor(location, "output", update.call.path, slot, _view(update), layout=layout)
    found.add(on_call(trace, update.call, anchor))
    return True


def _is_written(trace: Trace, update: Update) -> bool:
    """Whether something is written into what a module returned before it is added."""
    first = 0 if update.call is None else update.call.last
    views = [v for v in trace.written if first <= v.changed <= update.step.value.number]
    for whole in views:
        while whole is not update.value and whole.op in ALIASES and whole.inputs:
            whole = whole.inputs[0]
        if whole is update.value:
            return True
    return False


def _weighed(trace: Trace, location: Location, block: Block, update: Update, part: Part) -> Anchor | None:
    """What a module returns, times a parameter, as the layer itself multiplies them."""
    inside = [o for o in trace.operations if block.call in o.within]
    made = next((o for o in inside if o.form.kind == "weighing" and o.out is update.value), None)
    if made is None or update.step.partial or block.ends is not None:
        return None
    layout, operand = block.grid.layout_of(update.value), operand_of(inside, made, RESULT)
    return Anchor(
        location, "own code", block.call.path, view=_view(update), role=part, layout=layout, operand=operand
    )


def _view(update: Update) -> Scaled | None:
    return None if update.coefficient == 1.0 else Scaled(update.coefficient)


def _why_not(update: Update) -> str:
    if update.step.partial:
        return "it is added at some positions only"
    if update.source is None:
        return "the update is computed by the layer itself, no module returns it"
    return "the layer multiplies what a module returns with weights of its own, no module returns that"
