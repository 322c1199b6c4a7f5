"""Rules for integrals over [0, 1]: where to evaluate, and with which weight."""

from collections.abc import Callable, Mapping
from typing import Final, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.arguments import whole_number
from hookgraph.errors import HookGraphError, nearest

Quadrature: TypeAlias = Literal["gauss-legendre", "midpoint", "trapezoid", "left", "right"]

Nodes: TypeAlias = Float[Tensor, "..."]


def nodes_and_weights(rule: Quadrature, steps: int) -> tuple[Nodes, Nodes]:
    """Nodes in [0, 1] and their weights, which sum to 1, in double precision.

    `gauss-legendre` is exact for polynomials of degree 2 steps - 1, `trapezoid` (which needs two steps)
    and `midpoint` for degree 1, `left` and `right` for constants.

    Raises:
        HookGraphError: an unknown rule, or a number of steps that it cannot have.
    """
    check_rule(rule, steps)
    return _RULES[rule](steps)


def check_rule(rule: Quadrature, steps: int) -> None:
    """Refuse what is no rule.

    Raises:
        HookGraphError: an unknown rule, too few steps, or no whole number of them.
    """
    if rule not in _RULES:
        raise HookGraphError(f"unknown quadrature {rule!r}: {nearest(str(rule), get_args(Quadrature))}")
    least = least_steps(rule)
    if whole_number("steps", steps, least=0) < least:
        raise HookGraphError(f"{rule} needs at least {least} steps, not {steps}")


def least_steps(rule: Quadrature) -> int:
    """The fewest steps that a rule can have."""
    return 2 if rule == "trapezoid" else 1


def _gauss_legendre(steps: int) -> tuple[Nodes, Nodes]:
    """Golub and Welsch (1969): nodes are eigenvalues of the recurrence of the Legendre polynomials."""
    k = torch.arange(1, steps, dtype=torch.float64)
    beside = k / (4 * k.square() - 1).sqrt()
    found, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (found + 1) / 2, vectors[0].square()


def _midpoint(steps: int) -> tuple[Nodes, Nodes]:
    return (torch.arange(steps, dtype=torch.float64) + 0.5) / steps, _equal(steps)


def _trapezoid(steps: int) -> tuple[Nodes, Nodes]:
    weights = torch.full((steps,), 1 / (steps - 1), dtype=torch.float64)
    weights[[0, -1]] /= 2
    return torch.linspace(0, 1, steps, dtype=torch.float64), weights


def _left(steps: int) -> tuple[Nodes, Nodes]:
    return torch.arange(steps, dtype=torch.float64) / steps, _equal(steps)


def _right(steps: int) -> tuple[Nodes, Nodes]:
    return torch.arange(1, steps + 1, dtype=torch.float64) / steps, _equal(steps)


def _equal(steps: int) -> Nodes:
    return torch.full((steps,), 1 / steps, dtype=torch.float64)


_RULES: Final[Mapping[str, Callable[[int], tuple[Nodes, Nodes]]]] = {
    "gauss-legendre": _gauss_legendre,
    "midpoint": _midpoint,
    "trapezoid": _trapezoid,
    "left": _left,
    "right": _right,
}
