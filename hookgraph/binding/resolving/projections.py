"""Where a value of the trace can be reached: as what a module returns or what a projection is given."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.binding.data.layouts import Grid
from hookgraph.binding.data.views import Axes, Columns, View, view_along
from hookgraph.binding.running.weights import may_be_affine
from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import ALIASES, Slot, Value, alias_root

_LINEAR = frozenset({"add", "sub", "neg", "cat", "stack"})
_ADDING_PRODUCTS = frozenset({"addmm", "baddbmm"})
"""Matrix products to which their first input is added."""

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
            if whole and is_projection(trace, call) and not _is_read_beside(trace, call, given, within):
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
            if _is_read_beside(trace, call, given, within):
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
    affine in what it is given all the same: an adapter stands beside a projection, its weight is computed
    from several, or it is kept in another form.
    """
    given = [v for v in call.inputs.values() if v.tensor.is_floating_point()]
    if set(call.outputs) != {None} or len(given) != 1:
        return False
    products = [v for v in trace.values[call.first : call.last] if v.op in PRODUCTS]
    if (
        len(products) == 1
        and is_matrix_product(products[0])
        and not any(True for _ in call.module.children())
    ):
        return may_be_affine(call.module, given[0].tensor.shape[-1])
    return bool(products) and _is_affine(trace, call, given[0])


def _is_affine(trace: Trace, call: Call, given: Value) -> bool:
    """Whether what a module returns for a position is an affine function of what it is given there, seen in
    its operations, with nothing in it that depends on what the model is given.
    """
    returned, width = call.outputs[None], given.tensor.shape[-1]
    if returned.tensor.shape[:-1] != given.tensor.shape[:-1] or not may_be_affine(call.module, width):
        return False
    made, multiplied = {given}, False
    for value in trace.values[call.first : call.last]:
        if not any(v in made for v in value.inputs):
            continue
        if not _is_linear(value, made) or not all(v in made or _is_constant(trace, v) for v in value.inputs):
            return False
        multiplied = multiplied or value.op in PRODUCTS
        made.add(value)
    return multiplied and returned in made


def _is_linear(value: Value, made: Set[Value]) -> bool:
    """Whether an operation is linear in those of its inputs that are `made`."""
    if value.op in PRODUCTS:
        added = value.op in _ADDING_PRODUCTS
        return sum(v in made for v in value.inputs[added : added + 2]) <= 1
    if value.op == "mul":
        return sum(v in made for v in value.inputs) == 1
    if value.op == "div":
        return not any(v in made for v in value.inputs[1:])
    return value.op in _LINEAR or value.op in ALIASES


def _is_constant(trace: Trace, value: Value) -> bool:
    """Whether a value follows from the weights alone."""
    given, waiting, seen = set(trace.root.inputs.values()), [value], set[Value]()
    while waiting:
        here = waiting.pop()
        if here in given:
            return False
        if here not in seen:
            seen.add(here)
            waiting.extend(here.inputs)
    return True


def _is_read_beside(trace: Trace, call: Call, given: Value, within: Call) -> bool:
    """Whether anything else inside `within` computes with what a projection is given: an edit there would
    not reach that.
    """
    root = alias_root(given)
    copies = {root}
    for later in trace.values[root.number + 1 : within.last]:
        if not any(v in copies for v in later.inputs):
            continue
        if later.op in ALIASES:
            copies.add(later)
        elif not call.first <= later.number < call.last:
            return True
    return False


def is_matrix_product(value: Value) -> bool:
    """Whether a value is a matrix product with a parameter."""
    return value.op in PRODUCTS and any(_is_parameter(v) for v in value.inputs)


def floating_input(call: Call) -> tuple[Slot, Value] | None:
    """The first argument of a module that is a floating-point tensor."""
    return next(((s, v) for s, v in call.inputs.items() if v.tensor.is_floating_point()), None)


def last_projection(trace: Trace, source: Call) -> Call | None:
    """The projection whose output is what `source` returns, with what is wrapped around it."""
    results = {alias_root(v) for v in source.outputs.values()}

    def ends(call: Call) -> bool:
        return bool(results & {alias_root(v) for v in call.outputs.values()}) and is_projection(trace, call)

    found = next(filter(ends, reversed([source, *trace.inside(source)])), None)
    around = reversed(found.parents) if found is not None and found is not source else ()
    for call in around:
        if call is source or not ends(call):
            break
        found = call
    return found


def _is_parameter(value: Value) -> bool:
    while value.op in ALIASES and value.inputs:
        value = value.inputs[0]
    return value.op == "parameter"
