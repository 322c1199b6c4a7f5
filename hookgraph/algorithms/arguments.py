"""Numbers as users write them, in Python's own types, which can be compared and stored."""

import operator
from math import isfinite
from typing import SupportsFloat, SupportsIndex

from hookgraph.errors import HookGraphError


def whole_number(name: str, value: SupportsIndex, least: int = 1) -> int:
    """An argument that counts something.

    Raises:
        HookGraphError: it is no whole number, or below the least.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least:
        raise HookGraphError(f"{name}={value!r}: it has to be a whole number, at least {least}")
    return found


def positive_number(name: str, value: SupportsFloat) -> float:
    """An argument that measures something; an array or a tensor may hold it.

    Raises:
        HookGraphError: it is not.
    """
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError):
        found = 0.0
    if not (isfinite(found) and found > 0):
        raise HookGraphError(f"{name}={value!r}: it has to be a positive number")
    return found
