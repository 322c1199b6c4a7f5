"""Operations that are several in one, as sums of products: what they are made of.

A trace keeps the sums and products that they are, so that the residual stream is followed through them as
through sums that are written out.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, Final, TypeAlias

import torch

from hookgraph.binding.tracing.values import Value

Add: TypeAlias = Callable[..., Value]
"""Keeps one more value, given what computes it, from what, the tensor, and numbers that take part."""

Last: TypeAlias = tuple[str, tuple[Value, ...], float]
"""The operation that returns what all of them return, its operands, and the factor of the second one."""


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
    return "add", (base, product), float(kwargs.get("value", 1))


def _between(
    add: Add, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: tuple[Value, ...]
) -> Last | None:
    """lerp(x, y, w) = (1 - w) x + w y."""
    start, end = inputs[:2]
    if len(inputs) == 2:
        weight = float(args[2])
        kept = add("mul", (start,), (1 - weight) * start.tensor, scalars=(1 - weight,))
        return "add", (kept, end), weight
    gate = inputs[2]
    rest = add("rsub", (gate,), 1 - gate.tensor)
    kept = add("mul", (start, rest), start.tensor * rest.tensor)
    return "add", (kept, add("mul", (end, gate), end.tensor * gate.tensor)), 1.0


def _onto(add: Add, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: tuple[Value, ...]) -> Last | None:
    """addmm(x, a, b) = beta · x + alpha · a b, where x is no bias but as large as the product."""
    base, left, right = inputs
    beta = float(kwargs.get("beta", 1))
    shape = (*left.tensor.shape[:-1], right.tensor.shape[-1])
    if base.is_source or tuple(base.tensor.shape) != shape or beta == 0:
        return None
    product = add("mm" if len(shape) == 2 else "bmm", (left, right), left.tensor @ right.tensor)
    if beta != 1:
        base = add("mul", (base,), beta * base.tensor, scalars=(beta,))
    return "add", (base, product), float(kwargs.get("alpha", 1))


def _stacked(
    add: Add, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: tuple[Value, ...]
) -> Last | None:
    """The sum of tensors that were stacked, over the axis on which they were."""
    stack, axes = inputs[0], list(args[1]) if len(args) > 1 and args[1] is not None else []
    count = stack.tensor.ndim
    along = int(stack.scalars[0]) if stack.scalars else 0
    kept = bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
    if stack.op != "stack" or kept or [axis % count for axis in axes] != [along % count]:
        return None
    if len(stack.inputs) < 2:
        return None
    *first, last = stack.inputs
    return "add", (reduce(lambda a, b: add("add", (a, b), torch.add(a.tensor, b.tensor)), first), last), 1.0


_Make: TypeAlias = Callable[[Add, Sequence[Any], Mapping[str, Any], tuple[Value, ...]], Last | None]

_MADE: Final[Mapping[str, _Make]] = {
    "addcmul": _product,
    "lerp": _between,
    "addmm": _onto,
    "baddbmm": _onto,
    "sum": _stacked,
}
"""By the name of an operation, what takes it apart."""
