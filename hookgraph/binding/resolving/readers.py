"""What each head reads for its queries, keys and values: one copy of the projection's input per head.

The copies are one tensor seen several times, until some head's copy is edited.
"""

from hookgraph.binding.data.anchors import Anchor, on_call
from hookgraph.binding.data.findings import Findings, WeightSource
from hookgraph.binding.data.views import Columns, view_along
from hookgraph.binding.resolving.blocks import Block
from hookgraph.binding.resolving.projections import (
    Reached,
    as_output,
    behind,
    floating_input,
    has_heads,
    is_projection,
)
from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import ALIASES, Value
from hookgraph.ontology.locations import Location


def bind_reader(
    trace: Trace,
    found: Findings,
    location: Location,
    heads: Value,
    weight: str,
    block: Block,
    owner: Call,
) -> None:
    """Bind what each head reads for `heads`: its queries, its keys or its values.

    Args:
        trace: the pass.
        found: what is known so far.
        location: the reader.
        heads: as attention uses them, heads before positions.
        weight: the name of the projection's weight.
        block: the layer.
        owner: the module that computes attention.
    """
    reached = _projection(trace, heads, owner, block)
    if reached is None:
        found.absent("no single projection returns these heads", location)
        return
    read = floating_input(reached.call)
    if read is None or read[1].tensor.ndim not in (2, 3) or read[1].tensor.shape[-1] != block.width:
        found.absent("the projection does not read the stream, but a latent or another axis", location)
        return
    layout = block.grid.layout_of(read[1])
    anchor = Anchor(location, "head input", reached.call.path, read[0], reached.view, layout=layout)
    found.add(on_call(trace, reached.call, anchor))
    found.weigh(weight, location, WeightSource(reached.call.path, "output", reached.view))


def _projection(trace: Trace, heads: Value, owner: Call, block: Block) -> Reached | None:
    """The last projection that the heads were computed from, and where they lie in what it returns."""
    for value in sorted(behind(heads, owner.first), key=lambda v: -v.number):
        if not has_heads(value, block.grid) or value.tensor.numel() != heads.tensor.numel():
            continue
        first = value.tensor.shape[1] == heads.tensor.shape[1]
        reached = as_output(trace, value, owner, heads_first=first) or _scaled(trace, value, owner, first)
        if reached is not None and isinstance(reached.view, Columns) and is_projection(trace, reached.call):
            return reached
    return None


def _scaled(trace: Trace, heads: Value, owner: Call, heads_first: bool) -> Reached | None:
    """The heads as a view of what a projection returns times a number."""
    here, path = heads, list[Value]()
    while here.op in ALIASES and here.inputs:
        path.append(here)
        here = here.inputs[0]
    if here.op not in ("mul", "div") or len(here.inputs) != 1:
        return None
    reached = as_output(trace, here.inputs[0], owner, heads_first=False)
    found, view = view_along(here, path[::-1], heads_first=heads_first)
    if reached is None or reached.view is not None or not found:
        return None
    return Reached(reached.call, reached.slot, view)
