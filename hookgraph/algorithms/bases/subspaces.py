"""Remove a subspace: to zero, to the mean, or to another state's part; as a function and as a hook."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.errors import HookGraphError, ShapeMismatchError, nearest
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location

Removal: TypeAlias = Literal["zero", "mean", "resample"]
Unit: TypeAlias = Literal["batch", "token"]


def remove_subspace(
    x: Float[Tensor, "... d_model"], A: Float[Tensor, "..."], mode: Removal = "mean", *, seed: int = 0
) -> Float[Tensor, "... d_model"]:
    """x + P (target - x), P = A (AᵀA)⁻¹ Aᵀ: `x` without what it says in the span of the columns of A.

    target is 0, the mean of all vectors of `x`, or `x` with its vectors permuted so that none stays.

    Args:
        x: vectors along its last axis.
        A: (d_model, rank), columns that need not be orthonormal; with one axis, one column.
        mode: see above.
        seed: of the permutation.

    Raises:
        HookGraphError: an unknown mode, columns that are not independent, or fewer than two vectors to
            take a mean of or to permute.
        ShapeMismatchError: A has another width than x.

    Source: Belrose et al., arXiv:2303.08112, section 4.1.
    """
    columns = (A[:, None] if A.ndim == 1 else A).to(x)
    if columns.ndim != 2 or columns.shape[0] != x.shape[-1]:
        raise ShapeMismatchError(
            f"the subspace has shape {tuple(A.shape)} and the vectors width {x.shape[-1]}: "
            "pass a matrix of one row per coordinate and one column per direction"
        )
    dual = _dual(columns)
    rest = away_from_target(x.reshape(-1, x.shape[-1]), mode, seed)
    return x - ((rest @ dual) @ columns.mT).view_as(x)


def away_from_target(
    states: Float[Tensor, "... d_model"], mode: Removal, seed: int
) -> Float[Tensor, "... d_model"]:
    """states - target, the target of `remove_subspace`.

    Raises:
        HookGraphError: an unknown mode, or fewer than two vectors.
    """
    if mode not in get_args(Removal):
        raise HookGraphError(f"unknown ablation {mode!r}: {nearest(mode, get_args(Removal))}")
    if mode == "zero":
        return states
    if len(states) < 2:
        raise HookGraphError(
            f"ablation {mode!r} needs at least two vectors, there is {len(states)}: "
            "pass more tokens, or 'zero'"
        )
    if mode == "mean":
        return states - states.mean(0)
    return states - states[deranged(len(states), seed).to(states.device)]


def deranged(count: int, seed: int) -> Int[Tensor, "..."]:
    """A permutation of `count` things in which none stays in its place."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    result = torch.empty_like(order)
    result[order] = order.roll(1)
    return result


def ablate_subspace(
    graph: HookGraph, at: Location, A: Float[Tensor, "..."], mode: Removal = "mean", *, seed: int = 0
) -> HookGraph:
    """A graph in which a location says nothing within the span of A: `remove_subspace` as a hook.

    The mean, or the permutation, is that of all vectors of the pass, padding included.

    Raises:
        HookGraphError: an unknown mode or dependent columns; when it is run, fewer than two vectors.
        UnknownLocationError: the graph has no such location.
        ShapeMismatchError: when it is run, A has another width than the location.
    """
    _known(mode)
    _dual(A[:, None] if A.ndim == 1 else A)
    return graph.hook(at, _Remove(A, mode, seed))


def ablate_layer(
    graph: HookGraph, at: Location, mode: Removal = "mean", *, unit: Unit = "batch", seed: int = 0
) -> HookGraph:
    """A graph in which an update (`attn.out`, `mlp.out`) is replaced by zero, its mean, or another one.

    Args:
        graph: the hooked model.
        at: the update.
        mode: `zero`; `mean` over the unit; `resample`: permuted over the unit so that none stays.
        unit: `batch`, examples at each position, or `token`, all examples and positions alike.
        seed: of the permutation.

    Raises:
        HookGraphError: an unknown mode or unit; when it is run, fewer than two of the unit.
        UnknownLocationError: the graph has no such location.
    """
    _known(mode)
    if unit not in get_args(Unit):
        raise HookGraphError(f"unknown unit {unit!r}: {nearest(unit, get_args(Unit))}")
    return graph.hook(at, _Replace(mode, unit, seed))


@final
@dataclass(frozen=True, eq=False)
class _Remove:
    A: Float[Tensor, "..."]
    mode: Removal
    seed: int

    def __call__(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return remove_subspace(value, self.A, self.mode, seed=self.seed)


@final
@dataclass(frozen=True, eq=False)
class _Replace:
    mode: Removal
    unit: Unit
    seed: int

    def __call__(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        flat = value.flatten(0, 1) if self.unit == "token" else value
        return (flat - away_from_target(flat, self.mode, self.seed)).view_as(value)


def _known(mode: str) -> None:
    if mode not in get_args(Removal):
        raise HookGraphError(f"unknown ablation {mode!r}: {nearest(mode, get_args(Removal))}")


def _dual(columns: Float[Tensor, "d_model ..."]) -> Float[Tensor, "d_model ..."]:
    """A (AᵀA)⁻¹, from A = QR as Q R⁻ᵀ."""
    Q, R = torch.linalg.qr(columns.double())
    if columns.shape[1] > columns.shape[0] or bool(R.diagonal().abs().min() < 1e-9 * R.abs().max()):
        raise HookGraphError(f"the {columns.shape[1]} columns of a subspace are dependent: leave some out")
    return torch.linalg.solve_triangular(R.mT, Q, upper=False, left=False).to(columns)
