"""Where a value of the trace can be reached: as what a module returns or what a projection is given."""

from dataclasses import dataclass
from typing import final

from hookgraph.binding.tracing import ALIASES, Call, Slot, Trace, Value
from hookgraph.binding.views import Columns, View, view_along

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "_int_mm", "_scaled_mm"})


@final
@dataclass(frozen=True, slots=True)
class Reached:
    """A value as (part of) what a module returns or is given."""

    call: Call
    slot: Slot
    view: View


def as_output(trace: Trace, value: Value, within: Call, *, heads_first: bool) -> Reached | None:
    """`value` as what a module inside `within` returns, through views only; or None."""
    here = value
    path: list[Value] = []
    while True:
        calls = [c for c in trace.producers.get(here, ()) if within in c.parents and not c.is_identity]
        if calls:
            call = min(calls, key=lambda c: len(c.parents))
            slot = next(s for s, v in call.outputs.items() if v is here)
            found, view = view_along(here, path[::-1], heads_first=heads_first)
            return Reached(call, slot, view) if found else None
        if here.op not in ALIASES or not here.inputs or here.number < within.first:
            return None
        path.append(here)
        here = here.inputs[0]


def as_input(trace: Trace, value: Value, within: Call) -> Reached | None:
    """`value` (positions before heads) as what a projection inside `within` is given, whole and
    through views only; or None.
    """
    copies: dict[Value, list[Value]] = {value: []}
    for later in trace.values[value.number + 1 : within.last]:
        if later.op in ALIASES and later.inputs and later.inputs[0] in copies:
            copies[later] = [*copies[later.inputs[0]], later]
    for call in trace.inside(within):
        for slot, given in call.inputs.items():
            if (
                given in copies
                and given.tensor.numel() == value.tensor.numel()
                and is_projection(trace, call)
            ):
                view = _heads_of(value, given)
                return Reached(call, slot, view) if view is not None else None
    return None


def _heads_of(value: Value, given: Value) -> View:
    """The view of a flat tensor as the heads of `value`, if that is what it is."""
    heads, width = value.tensor.shape[-2:]
    if given.tensor.ndim != 3 or given.tensor.shape[-1] != heads * width:
        return None
    columns = Columns(0, heads, width, width)
    same = bool((columns.get(given.tensor) == value.tensor).all())
    return columns if same else None


def is_projection(trace: Trace, call: Call) -> bool:
    """Whether a module call is one matrix product with a parameter, made by the module itself."""
    if set(call.outputs) != {None} or any(True for _ in call.module.children()):
        return False
    products = [v for v in trace.values[call.first : call.last] if v.op in _PRODUCTS]
    return len(products) == 1 and any(_is_parameter(v) for v in products[0].inputs)


def _is_parameter(value: Value) -> bool:
    while value.op in ALIASES and value.inputs:
        value = value.inputs[0]
    return value.op == "parameter"
