"""Where a value of the trace can be reached: as what a module returns or what a projection is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.binding.data.layouts import Grid
from hookgraph.binding.data.views import Axes, Columns, View, view_along
from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import ALIASES, Slot, Value, alias_root

_SCALING = frozenset({"mul", "div"})
_ADDING = frozenset({"add", "sub"})

_WEIGHTING = frozenset({"mul", "div", "native_layer_norm", "native_dropout"})
"""Operations that leave each feature where it is."""

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "_int_mm", "_scaled_mm"})
"""Matrix products."""


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


def as_input(trace: Trace, value: Value, view: Axes | None, within: Call) -> Reached | None:
    """Heads as what a projection inside `within` is given, all of them and through views only; or None.

    Args:
        trace: the pass.
        value: heads.
        view: how they lie.
        within: where to look.
    """
    copies = {value}
    for later in trace.values[value.number + 1 : within.last]:
        if later.op in ALIASES and later.inputs and later.inputs[0] in copies:
            copies.add(later)
    if view is not None and view.axes != value.tensor.ndim:
        return None
    heads = value.tensor if view is None else view.get(value.tensor)
    for call in trace.inside(within):
        for slot, given in call.inputs.items():
            whole = given in copies and given.tensor.numel() == value.tensor.numel()
            if whole and is_projection(trace, call):
                columns = _columns_of(heads, given)
                return Reached(call, slot, columns) if columns is not None else None
    return None


def as_weighted_input(trace: Trace, value: Value, view: Axes | None, within: Call) -> Reached | None:
    """Heads as what a projection inside `within` is given after a gate or a norm, each feature in its place.

    Args:
        trace: the pass.
        value: heads.
        view: how they lie.
        within: where to look.
    """
    if view is not None and view.axes != value.tensor.ndim:
        return None
    heads = value.tensor if view is None else view.get(value.tensor)
    if heads.ndim != 4:
        return None
    count, width = heads.shape[2:]
    numbers = torch.arange(count * width).view(count, width).expand(heads.shape)
    numbers = numbers if view is None else view.put(value.tensor, numbers)
    # They lie in memory as the heads do, so that views of these are views of the numbers.
    lying = torch.empty_like(value.tensor, dtype=torch.long).copy_(numbers)
    places: dict[Value, Int[Tensor, "..."]] = {value: lying}
    for later in trace.values[value.number + 1 : within.last]:
        found = _placed(later, places)
        if found is not None:
            places[later] = found
    for call in trace.inside(within):
        for slot, given in call.inputs.items():
            flat = places.get(given)
            if flat is None or flat.ndim != 3 or not is_projection(trace, call):
                continue
            same = flat.shape[-1] == count * width and bool((flat == torch.arange(count * width)).all())
            return Reached(call, slot, Columns(0, count, width, width)) if same else None
    return None


def why_no_input(trace: Trace, value: Value, within: Call) -> str:
    """Why no projection inside `within` is given heads, each feature in its place."""
    projections = [c for c in trace.inside(within) if is_projection(trace, c)]
    made = {value}
    for later in trace.values[value.number + 1 : within.last]:
        if not any(v in made for v in later.inputs):
            continue
        if not is_matrix_product(later):
            made.add(later)
        elif any(c.first <= later.number < c.last for c in projections):
            return "more is done to z before the output projection than to weigh its features"
        else:
            return "no module is the output projection: the code that attends multiplies with its weight"
    return "no projection is given what is made of z"


def _placed(value: Value, places: Mapping[Value, Int[Tensor, "..."]]) -> Int[Tensor, "..."] | None:
    """The number of the feature that each element of a value comes from, if it is one of those weighted."""
    if value.op in ALIASES:
        source = value.inputs[0] if value.inputs else value
        if source not in places or source.tensor.numel() != value.tensor.numel() or value.replay is None:
            return None
        moved = value.replay(places[source])
        return moved if isinstance(moved, Tensor) and not moved.is_floating_point() else places[source]
    if value.op not in _WEIGHTING:
        return None
    return next(
        (places[v] for v in value.inputs if v in places and v.tensor.shape == value.tensor.shape), None
    )


def has_heads(value: Value, grid: Grid) -> bool:
    """Whether a value has as many axes as heads of every example and position have."""
    return value.tensor.ndim == 4 or (value.tensor.ndim == 3 and grid.layout == "flat")


def behind(value: Value, first: int) -> set[Value]:
    """Everything from number `first` on that `value` was computed from, itself included."""
    seen: set[Value] = set()
    waiting = [value]
    while waiting:
        here = waiting.pop()
        if here in seen or here.number < first or here.is_source:
            continue
        seen.add(here)
        waiting.extend(here.inputs)
    return seen


def _columns_of(heads: Float[Tensor, "batch ..."], given: Value) -> Columns | None:
    """Where heads lie in a flat tensor, if it holds them."""
    flat = given.tensor
    if flat.ndim == 2:  # examples and positions on one axis
        flat = flat[None]
    if flat.ndim != 3 or heads.ndim != 4:
        return None
    count, width = heads.shape[-2:]
    if flat.shape != (*heads.shape[:2], count * width):
        return None
    columns = Columns(0, count, width, width)
    return columns if bool((columns.get(flat) == heads).all()) else None


def is_projection(trace: Trace, call: Call) -> bool:
    """Whether a module call is one matrix product of what it is given with a parameter, made by itself; or
    several, each linear in what it is given, as where an adapter stands beside a projection.
    """
    given = [v for v in call.inputs.values() if v.tensor.is_floating_point()]
    if set(call.outputs) != {None} or len(given) != 1:
        return False
    products = [v for v in trace.values[call.first : call.last] if v.op in PRODUCTS]
    if not any(True for _ in call.module.children()):
        return len(products) == 1 and is_matrix_product(products[0])
    return len(products) > 1 and _is_affine(trace, call, given[0])


def _is_affine(trace: Trace, call: Call, given: Value) -> bool:
    """Whether what a module returns is an affine function of what it is given, seen in its operations."""
    made = {given}
    for value in trace.values[call.first : call.last]:
        sources = [v in made for v in value.inputs]
        if not any(sources):
            continue
        weighs = value.op in _SCALING and sources[0] and not any(sources[1:])
        multiplies = is_matrix_product(value) and sum(sources) == 1
        if not (weighs or multiplies or value.op in _ADDING or value.op in ALIASES):
            return False
        made.add(value)
    return call.outputs[None] in made


def is_matrix_product(value: Value) -> bool:
    """Whether a value is a matrix product with a parameter."""
    return value.op in PRODUCTS and any(_is_parameter(v) for v in value.inputs)


def floating_input(call: Call) -> tuple[Slot, Value] | None:
    """The first argument of a module that is a floating-point tensor."""
    return next(((s, v) for s, v in call.inputs.items() if v.tensor.is_floating_point()), None)


def last_projection(trace: Trace, source: Call) -> Call | None:
    """The projection whose output is what `source` returns."""
    results = {alias_root(v) for v in source.outputs.values()}
    for call in reversed([source, *trace.inside(source)]):
        if is_projection(trace, call) and results & {alias_root(v) for v in call.outputs.values()}:
            return call
    return None


def _is_parameter(value: Value) -> bool:
    while value.op in ALIASES and value.inputs:
        value = value.inputs[0]
    return value.op == "parameter"
