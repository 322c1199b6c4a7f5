"""What is handed to a graph: locations, and what is mistaken for one."""

import sys
from collections.abc import Sequence
from types import FunctionType, MethodType
from typing import Final

from hookgraph.errors import HookGraphError, LocationError, UnknownLocationError
from hookgraph.hooks.editing import Hook
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.weights import WeightType

_NEVER: Final = (sys.maxsize, sys.maxsize)
"""How many arguments a function needs and takes by position that needs some by name."""
_TAKES_MORE: Final = 0x04
"""Python's flag of functions with *args."""


def chooses_steps(location: Location) -> bool:
    """Whether a location is that of some passes of a generation only."""
    return any(dim is Dimension.STEP for dim, _ in location.index)


def a_location(found: object) -> Location:
    """What was given, if it is a location.

    Raises:
        LocationError: it is a kind of location, or text.
    """
    if isinstance(found, Location):
        return found
    if isinstance(found, LocationType):
        name = found.qualified_name
        raise LocationError(
            f"{name} is a kind of location: use graph.every(...) for all layers, or one, as in {name}[0]"
        )
    if isinstance(found, str):
        raise LocationError(f"{found!r} is text: write Location.parse({found!r})")
    raise LocationError(f"{found!r} is no location, such as RESID_POST[6] or ATTN_Z[9].at(head=3)")


def asked(save: Sequence[Location] | Location) -> Sequence[Location]:
    """What is to be saved, as a sequence."""
    return [save] if isinstance(save, Location) else save


def a_weight(kind: object) -> WeightType:
    """What was given, if it names a weight as `W_O` does.

    Raises:
        UnknownLocationError: it is something else, such as text.
    """
    if isinstance(kind, WeightType):
        return kind
    raise UnknownLocationError(f"{kind!r} is no weight: give one of hookgraph.weights, such as W_O")


def a_hook(location: Location, fn: Hook) -> Hook:
    """What was given, if it can be called with what is at a location.

    Raises:
        HookGraphError: it cannot be called, or takes no argument, or more than one.
    """
    if not callable(fn):
        raise HookGraphError(
            f"a {type(fn).__name__} at {location} cannot be called: a hook is a function of what is there"
        )
    count = _arguments_of(fn)
    if count is not None and not count[0] <= 1 <= count[1]:
        takes = f"takes {count[1]}" if count[1] < 1 else f"needs {count[0]}"
        takes = "needs named" if count == _NEVER else takes
        raise HookGraphError(
            f"the hook at {location} {takes} arguments: it is called with one, the tensor that is there"
        )
    return fn


def _arguments_of(fn: object) -> tuple[int, int] | None:
    """How many arguments a function of Python's needs and takes by position; None of anything else. Many
    hooks are put into many graphs: a signature would take far longer.
    """
    function, bound = (fn.__func__, 1) if isinstance(fn, MethodType) else (fn, 0)
    if not isinstance(function, FunctionType):
        return None
    code, defaults = function.__code__, len(function.__defaults__ or ())
    named = set(function.__kwdefaults__ or ())
    count = code.co_argcount
    only_named = set(code.co_varnames[count : count + code.co_kwonlyargcount]) - named
    if only_named:
        return _NEVER
    return max(count - defaults - bound, 0), sys.maxsize if code.co_flags & _TAKES_MORE else count - bound
