"""Shapes and types are checked in tests as jaxtyping's import hook has it, at a fraction of the time.

The hook binds the arguments of every call, and checks them twice: once before it, and once more with what
is returned. Here one check does both, as by the decorators that jaxtyping had before, `@jaxtyped` over
`@typechecker`; and a function none of whose annotations is an array has no axes to compare.
"""

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial, wraps
from typing import Any, get_args

import jaxtyping
from jaxtyping import config

_whole: Callable[..., Any] = jaxtyping.jaxtyped


def jaxtyped(fn: Any = None, *, typechecker: Any = None) -> Any:
    """What the import hook of jaxtyping decorates every function and class with."""
    if fn is None:
        return partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(fn):
        if is_dataclass(fn) and inspect.isfunction(fn.__init__) and not hasattr(fn.__init__, "__wrapped__"):
            fn.__init__ = jaxtyped(fn.__init__, typechecker=typechecker)
        return fn
    if not inspect.isfunction(fn) or inspect.isgeneratorfunction(fn):
        return _whole(fn, typechecker=typechecker)
    checked = typechecker(fn)
    return _within_its_axes(fn, checked) if _has_arrays(fn) else _where_checked(fn, checked)


def _where_checked(fn: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return fn(*args, **kwargs) if config.jaxtyping_disable else checked(*args, **kwargs)

    return fn if checked is fn else called


def _within_its_axes(fn: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if config.jaxtyping_disable:
            return fn(*args, **kwargs)
        with _whole("context"):
            return checked(*args, **kwargs)

    return called


def _has_arrays(fn: Callable[..., Any]) -> bool:
    return any(map(_is_array, fn.__annotations__.values()))


def _is_array(annotation: Any) -> bool:
    """Whether an annotation is an array, or holds one; one in quotes may be."""
    if isinstance(annotation, str):
        return "[" in annotation
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    if isinstance(annotation, list):  # the arguments of a function
        return any(map(_is_array, annotation))
    return any(map(_is_array, get_args(annotation)))
