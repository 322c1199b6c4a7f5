"""Operations that are sums of products in one are kept as these."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hookgraph.binding.tracing.sums import taken_apart
from hookgraph.binding.tracing.values import Value

A, B, C = (torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(n)).double() for n in range(3))
COMPUTED: dict[str, Callable[[Value, list[Tensor]], Tensor]] = {
    "mul": lambda value, x: x[0] * (x[1] if len(x) > 1 else value.scalars[0]),
    "rsub": lambda value, x: 1 - x[0],
    "add": lambda value, x: x[0] + x[1],
    "mm": lambda value, x: x[0] @ x[1],
    "bmm": lambda value, x: x[0] @ x[1],
}


def made(op: str, inputs: tuple[Value, ...], tensor: Tensor, **details: Any) -> Value:
    return Value(0, op, inputs, tensor, **details)


def computed(value: Value) -> Tensor:
    """What the operations that a value was taken apart into return."""
    known = value.op in COMPUTED
    return COMPUTED[value.op](value, [computed(v) for v in value.inputs]) if known else value.tensor


def apart(name: str, *args: Any, inputs: tuple[Value, ...] | None = None, **kwargs: Any) -> Value | None:
    given = inputs or tuple(made("given", (), x) for x in args if isinstance(x, Tensor))
    last = taken_apart(made, name, args, kwargs, given)
    return None if last is None else made(last[0], last[1], torch.empty(0))


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("addcmul", (A, B, C), {}),
        ("addcmul", (A, B, C), {"value": 0.5}),
        ("lerp", (A, B, 0.3), {}),
        ("lerp", (A, B, C), {}),
        ("add", (A, B), {"alpha": 0.5}),
        ("sub", (A, B), {"alpha": -0.5}),
        ("sub", (A, B), {}),
        ("rsub", (A, B), {"alpha": 2}),
        ("addmm", (A[0], B[0], C[0]), {"beta": 2, "alpha": 3}),
        ("baddbmm", (A, B, C), {}),
    ],
)
def test_what_an_operation_is_taken_apart_into_computes_the_same(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
):
    found = apart(name, *args, **kwargs)
    assert found is not None
    assert found.op == "add"
    torch.testing.assert_close(computed(found), getattr(torch, name)(*args, **kwargs))


@pytest.mark.parametrize("axis", [0, -1])
def test_a_sum_over_the_axis_of_a_stack_is_the_sum_of_what_was_stacked(axis: int):
    parts = tuple(made("given", (), x) for x in (A, B, C))
    stack = made("stack", parts, torch.stack([A, B, C], axis), scalars=(float(axis),))
    found = apart("sum", stack.tensor, [axis], inputs=(stack,))
    assert found is not None
    torch.testing.assert_close(computed(found), A + B + C)
    mean = apart("mean", stack.tensor, [axis], inputs=(stack,))
    assert mean is not None
    torch.testing.assert_close(computed(mean), (A + B + C) / 3)
    assert apart("sum", stack.tensor, [1], inputs=(stack,)) is None, "over another axis"
    assert apart("sum", stack.tensor, [axis], True, inputs=(stack,)) is None, "the axis is kept"
    assert apart("sum", A, [axis]) is None, "not of a stack"


def test_a_linear_map_with_a_bias_or_onto_nothing_stays_one_operation():
    assert apart("addmm", A[0, 0], B[0], C[0]) is None
    assert apart("baddbmm", A, B, C, beta=0) is None
    assert apart("baddbmm", A[:, :1], B, C) is None
    assert apart("mul", A, B) is None
