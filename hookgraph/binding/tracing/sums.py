"""Operations that are several in one, as sums of products: what they are made of.

A trace keeps the sums and products that they are, so that the residual stream is followed through them as
through sums that are written out.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, Final, TypeAlias

import torch

from hookgraph.binding.tracing.values import Value

Add: TypeAlias = Callable[..., Value]
"""Keeps one more value, given what computes it, from what, the tensor, and numbers that take part."""

Last: TypeAlias = tuple[str, tuple[Value, ...]]
"""The operation that returns what all of them return, and its operands."""


def taken_apart(
    add: Add, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: tuple[Value, ...]
) -> Last | None:
    """The last of the operations that one is made of, those before it kept; None if it is one by itself.

    Args:
        add: keeps a value.
        name: the operation.
        args: what it is called with.
        kwargs: what it is called with by name.
        inputs: the tensors among these.
    """
    make = _MADE.get(name)
    return None if make is None else make(add, args, kwargs, inputs)


def _product(
    add: Add, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: tuple[Value, ...]
) -> Last | None:
    """addcmul(x, a, b) = x + value · a b."""
    base, left, right = inputs
    product = add("mul", (left, right), left.tensor * right.tensor)
    return "add", (base, _times(add, product, float(kwargs.get("value", 1))))


def _between(
    add: Add, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: tuple[Value, ...]
) -> Last | None:
    """lerp(x, y, w) = (1 - w) x + w y."""
    start, end = inputs[:2]
    if len(inputs) == 2:
        weight = float(args[2])
        return "add", (_times(add, start, 1 - weight), _times(add, end, weight))
    gate = inputs[2]
    rest = add("rsub", (gate,), 1 - gate.tensor)
    kept = add("mul", (start, rest), start.tensor * rest.tensor)
    return "add", (kept, add("mul", (end, gate), end.tensor * gate.tensor))


def _onto(add: Add, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: tuple[Value, ...]) -> Last | None:
    """addmm(x, a, b) = beta · x + alpha · a b, where x is no bias but as large as the product."""
    base, left, right = inputs
    beta = float(kwargs.get("beta", 1))
    shape = (*left.tensor.shape[:-1], right.tensor.shape[-1])
    if base.is_source or tuple(base.tensor.shape) != shape or beta == 0:
        return None
    product = add("mm" if len(shape) == 2 else "bmm", (left, right), left.tensor @ right.tensor)
    return "add", (_times(add, base, beta), _times(add, product, float(kwargs.get("alpha", 1))))


def _stacked(
    add: Add,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: tuple[Value, ...],
    *,
    mean: bool = False,
) -> Last | None:
    """The sum, or the mean, of tensors that were stacked, over the axis on which they were."""
    stack, axes = inputs[0], list(args[1]) if len(args) > 1 and args[1] is not None else []
    count = stack.tensor.ndim
    along = int(stack.scalars[0]) if stack.scalars else 0
    kept = bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
    if stack.op != "stack" or kept or [axis % count for axis in axes] != [along % count]:
        return None
    if len(stack.inputs) < 2:
        return None
    share = 1 / len(stack.inputs) if mean else 1.0
    *first, last = (_times(add, part, share) for part in stack.inputs)
    return "add", (reduce(lambda a, b: add("add", (a, b), torch.add(a.tensor, b.tensor)), first), last)


def _weighed(
    add: Add,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: tuple[Value, ...],
    *,
    sign: float,
    turned: bool = False,
) -> Last | None:
    """add(x, y) = x + alpha · y, sub(x, y) = x - alpha · y, and rsub(x, y), which is that `turned` about."""
    factor = sign * float(kwargs.get("alpha", 1))
    if len(inputs) != 2 or factor == 1 or not all(v.tensor.is_floating_point() for v in inputs):
        return None
    base, other = inputs[::-1] if turned else inputs
    return "add", (base, _times(add, other, factor))


def _times(add: Add, value: Value, factor: float) -> Value:
    """A value times a number; itself if that is 1."""
    return value if factor == 1 else add("mul", (value,), factor * value.tensor, scalars=(factor,))


_Make: TypeAlias = Callable[[Add, Sequence[Any], Mapping[str, Any], tuple[Value, ...]], Last | None]

_MADE: Final[Mapping[str, _Make]] = {
    "addcmul": _product,
    "lerp": _between,
    "addmm": _onto,
    "baddbmm": _onto,
    "sum": _stacked,
    "mean": partial(_stacked, mean=True),
    "add": partial(_weighed, sign=1.0),
    "sub": partial(_weighed, sign=-1.0),
    "rsub": partial(_weighed, sign=-1.0, turned=True),
}
"""By the name of an operation, what takes it apart."""
