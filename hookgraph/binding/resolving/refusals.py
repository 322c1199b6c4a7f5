"""Why no layers were found in a model: the operation at which the residual path of a layer ends."""

from itertools import pairwise, zip_longest
from typing import Final

from hookgraph.binding.data.layouts import grid_of
from hookgraph.binding.resolving.blocks import handed_on, resolve
from hookgraph.binding.resolving.chains import Lists, called_lists, calls_side_by_side, is_chain
from hookgraph.binding.resolving.paths import STREAM_AXES, PathFinder, cone_of
from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import ALIASES, Value

_FOLLOWED: Final = (
    "(what is followed: sums, products with numbers, weights and gates, norms, clamps, casts and views)"
)

_NAMED: Final = 4
"""How many lists are named."""


def why_unbound(trace: Trace) -> str:
    """Where the stream was lost in the list of modules that is most like layers, and what to do about it."""
    lists = {**called_lists(trace), **calls_side_by_side(trace)}
    feeding = {path: calls for path, calls in lists.items() if len(calls) > 1 and _keeps_shape(calls)}
    chains = {path: calls for path, calls in feeding.items() if is_chain(calls)}
    calls = _longest(chains) or _longest(feeding)
    reshaping = None if calls else _reshaping(lists)
    if reshaping is not None:
        return reshaping
    if not calls:
        names = [path or "its own" for path in lists]
        held = ", ".join([*names[:_NAMED], *["..."][: len(names) - _NAMED]]) or "none"
        return f"no two modules of a list return what they are given in its shape (lists of modules: {held})"
    gap = next(((a, b) for a, b in pairwise(calls) if not handed_on(a, b)), None)
    if gap is None:
        return _lost_inside(trace, calls)
    before, after = gap
    return (
        f"{after.path} is not given what {before.path} returns{_lost_between(trace, before, after)}: hand on "
        "what a layer returns as it is, or add to it"
    )


def written_into(trace: Trace, call: Call, entering: Value) -> str:
    """Where a layer writes into a tensor like its stream, which no path shows; empty if it does not."""
    for view in trace.written:
        whole = view
        while whole.op in ALIASES and whole.inputs and call.first <= whole.number:
            whole = whole.inputs[0]
        if call.first <= view.number < call.last and whole.tensor.shape == entering.tensor.shape:
            where = _module_of(trace, view)
            return (
                f"{where} writes into it in place (as `x[:, :] += ...` and `x[:] = ...` do), which is not "
                "followed: write `x = x + ...` or `x += ...`"
            )
    return ""


def _longest(lists: Lists) -> list[Call]:
    """The outermost of the lists with the most calls."""
    return max(lists.values(), key=lambda calls: (-len(calls[0].parents), len(calls)), default=[])


def _reshaping(lists: Lists) -> str | None:
    """Which module of a list returns another shape than it is given, where others keep it."""
    for calls in sorted(lists.values(), key=len, reverse=True):
        kept = [_keeps_shape([call]) for call in calls]
        if False in kept and 2 * sum(kept) >= len(kept):
            call = calls[kept.index(False)]
            given, returned = (
                next((tuple(v.tensor.shape) for v in values.values() if v.is_activation), None)
                for values in (call.inputs, call.outputs)
            )
            return (
                f"{call.path} returns an activation of shape {returned}, and is given one of shape {given}, "
                "where others of its list keep positions and width, as a stream does"
            )
    return None


def _keeps_shape(calls: list[Call]) -> bool:
    """Whether the modules return activations shaped like those that they are given."""
    given = [{tuple(v.tensor.shape) for v in c.inputs.values() if v.is_activation} for c in calls]
    returned = [{tuple(v.tensor.shape) for v in c.outputs.values() if v.is_activation} for c in calls]
    return all(not a.isdisjoint(b) for a, b in zip(given, returned, strict=True))


def _lost_inside(trace: Trace, calls: list[Call]) -> str:
    for call, after in zip_longest(calls, calls[1:]):
        if resolve(trace, call, after, gated=True) is not None:
            continue
        passed = set(call.outputs.values()) if after is None else handed_on(call, after)
        leaving = next((v for v in call.outputs.values() if v in passed and v.is_activation), None)
        entering = next((v for v in call.inputs.values() if v.is_activation), None)
        kind = type(call.module).__name__
        if leaving is None or entering is None:
            return f"{call.path} ({kind}) is given, or hands on, no activation"
        through = written_into(trace, call, entering)
        if through:
            return f"the stream is lost where {through}"
        finder = PathFinder(trace, call, entering, grid_of(trace, entering), gated=True)
        if finder.path(leaving) is not None:
            return f"{call.path} ({kind}) adds nothing to what it is given"
        places = _places(trace, call, entering, finder.ends)
        lost = " and ".join(places) or "tensors that are computed from something else"
        return (
            f"the way back from what {call.path} ({kind}) returns to what it is given ends at {lost} "
            f"{_FOLLOWED}; write what {kind} returns as what it is given plus updates"
        )
    if all(v.tensor.ndim >= STREAM_AXES for v in calls[0].outputs.values() if v.is_activation):
        return f"what {calls[0].path} returns is a picture, of which no axes are positions and features"
    return f"{calls[0].path} and those after it add to what they are given, but as parts of no layers"


def _lost_between(trace: Trace, before: Call, after: Call) -> str:
    """The operations between two layers at which the path from one to the other ends."""
    given = next(v for v in after.inputs.values() if v.is_activation)
    returned = next(v for v in before.outputs.values() if v.is_activation)
    around = Call(before.number, "", before.module, 0, before.parents, before.last, {})
    finder = PathFinder(trace, around, returned, grid_of(trace, returned), gated=True)
    finder.path(given)
    places = _places(trace, around, returned, finder.ends)
    return f", but what {' and '.join(places)} made of it" if places else ""


def _places(trace: Trace, call: Call, entering: Value, ends: list[Value]) -> list[str]:
    """The last two operations that the stream went into and no path came out of, each with its module."""
    made = [v for v in ends if any(entering in here.inputs for here in cone_of(v, set(), call.first))]
    lost = [_viewed(v, entering) for v in made or ends if v.op]
    names = [f"`{v.op}` in {_module_of(trace, v)}" for v in lost]
    return list(dict.fromkeys(names))[:2]


def _viewed(value: Value, entering: Value) -> Value:
    """What a value is a part or a view of, if the layer computed it."""
    while (
        value.op in ALIASES
        and value.inputs
        and not (value.inputs[0] is entering or value.inputs[0].is_source)
    ):
        value = value.inputs[0]
    return value


def _module_of(trace: Trace, value: Value) -> str:
    """The innermost module that computed a value."""
    around = [c for c in trace.calls if c.first <= value.number < c.last]
    return around[-1].path or type(trace.root.module).__name__
