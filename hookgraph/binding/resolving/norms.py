"""Recognise a norm by what it does: norm(x) = gain · (x - centre) · s + bias, s = 1/sqrt(mean square + ε).

Neither the name nor the class of a module is looked at: it is called on made-up inputs. The epsilon is
the one of its numbers that explains what it returns.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hookgraph.binding.data.layouts import Layout, arranged
from hookgraph.binding.running.normalising import normalised, scale_of
from hookgraph.binding.tracing.trace import Call
from hookgraph.binding.tracing.values import Slot, Value

_SCALES = (1e-3, 1.0, 30.0)

_FLAT = 2
"""How many axes an activation has with positions of all examples on one."""


@final
@dataclass(frozen=True, slots=True)
class Norm:
    """A call of a module that normalises its input."""

    call: Call
    input: Value
    slot: Slot
    output: Value
    returned: Slot
    """Which element of what it returns is normalised: None where it returns a tensor."""
    centred: bool
    epsilon: float
    layout: Layout = ""
    """How what it is given lies."""


def find_norm(call: Call, layout: Layout = "") -> Norm | None:
    """The norm that a module call is, or None, given how the activations lie."""
    given = [(s, v) for s, v in call.inputs.items() if v.tensor.is_floating_point()]
    # Positions of all examples may lie on one axis.
    shaped = [x for x in given if x[1].is_activation] or [x for x in given if x[1].tensor.ndim == _FLAT]
    composed = any(True for child in call.module.children() for _ in child.parameters())
    if len(shaped) != 1 or len(call.outputs) != 1 or composed:
        return None
    slot, value = shaped[0]
    returned, out = next(iter(call.outputs.items()))
    same = out.tensor.shape == value.tensor.shape and out.tensor.is_floating_point()
    if out is value or not same:
        return None
    lying: Layout = "features first" if layout == "features first" and value.tensor.ndim == 3 else ""
    found = _recognise(call.module, value.tensor, lying)
    return None if found is None else Norm(call, value, slot, out, returned, *found, lying)


def _recognise(module: nn.Module, like: Float[Tensor, "..."], layout: Layout) -> tuple[bool, float] | None:
    """(centred, epsilon) of a module that behaves like a norm, or None."""
    width = arranged(layout, like, like.shape[0]).shape[-1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 4, width, generator=generator).to(like.device, like.dtype)
    try:
        with torch.no_grad():
            bias = normalised(module, torch.zeros_like(rows[:, :1]), layout)
            responses = {scale: normalised(module, rows * scale, layout) for scale in _SCALES}
            shifted = normalised(module, rows + 3.0, layout)
    except Exception:
        return None
    tolerance = 2e-2 if like.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if any(r.shape != rows.shape for r in (*responses.values(), shifted)):
        return None
    if not torch.isfinite(bias).all() or _differ(responses[30.0], responses[1.0]) > 0.05:
        return None
    centred = _differ(shifted, responses[1.0]) < tolerance
    candidates = {float(v) for v in vars(module).values() if isinstance(v, float) and 0 <= v < 0.1}
    best: tuple[float, float] | None = None
    for epsilon in sorted({*candidates, 1e-5, 1e-6, 1e-12, 0.0}, key=lambda e: e not in candidates):
        error = _unexplained(responses, rows, bias, centred, epsilon)
        if best is None or error < best[0] * 0.5:
            best = (error, epsilon)
    return (centred, best[1]) if best is not None and best[0] < tolerance else None


def _unexplained(
    responses: dict[float, Tensor], rows: Tensor, bias: Tensor, centred: bool, epsilon: float
) -> float:
    """How much the gain implied by each response differs between inputs of different size."""
    moved = rows - rows.mean(-1, keepdim=True) if centred else rows
    worst = 0.0
    reference: Tensor | None = None
    for scale, response in sorted(responses.items(), key=lambda pair: -pair[0]):
        s = scale_of(rows * scale, centred=centred, epsilon=epsilon)
        expected = moved.to(s.dtype) * scale * s
        got = (response - bias).to(s.dtype)
        gain = (got * expected).sum((0, 1)) / expected.square().sum((0, 1))
        reference = gain if reference is None else reference
        worst = max(worst, _differ(got, expected * reference))
    return worst


def _differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
