"""Greedy maximisation over unit vectors, each orthogonal to those before."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms import reduction
from hookgraph.algorithms.progress import Progress

Energy: TypeAlias = Callable[[Float[Tensor, " d_model"]], tuple[Float[Tensor, ""], int]]
"""v -> the sum of the losses over this process's states, and how many there are."""

_ROUND = 20
_SLACK = 1e-6
"""An energy above the one before it by more than this share is a better direction found late."""


def evaluated(energy: Energy, v: Float[Tensor, " d_model"]) -> tuple[float, Float[Tensor, " d_model"]]:
    """The mean energy over the states of all processes, and its gradient."""
    at = v.detach().clone().requires_grad_()
    with torch.enable_grad():
        total, count = energy(at)
        (gradient,) = torch.autograd.grad(total, at)
    packed = torch.cat(
        [gradient.double(), torch.stack([total.detach().double(), total.new_tensor(count).double()])]
    )
    summed = reduction.summed(packed)
    return float(summed[-2] / summed[-1]), summed[:-2] / summed[-1]


def greedy(
    energies: Callable[[int], Energy],
    starts: Float[Tensor, "... d_model"],
    k: int,
    *,
    tries: int,
    max_iter: int,
    tolerance: float,
    min_energy: float,
    progress: bool | None,
) -> tuple[Float[Tensor, "d_model rank"], Float[Tensor, " rank"]]:
    """v_j = argmax E_j(v) over unit v orthogonal to v_1..v_{j-1}; stops where E_j < min_energy.

    A vector that does better than the one before it was missed there: that one is sought again from it.

    Args:
        energies: E_j by j.
        starts: where the search may start; the best are used.
        k: how many vectors at most.
        tries: how many starts are followed.
        max_iter: L-BFGS iterations per start.
        tolerance: relative change of the energy at which a search ends.
        min_energy: energies below end the basis.
        progress: whether a bar is shown.
    """
    basis = starts.new_zeros(starts.shape[1], 0, dtype=torch.float64)
    extra: dict[int, list[Tensor]] = {}
    found: list[float] = []
    restarts = 2 * k
    with Progress("causal basis", k, shown=progress) as bar:
        while len(found) < k:
            j = len(found)
            energy = energies(j)
            pool = [*extra.pop(j, []), *_best(energy, starts, basis, tries)]
            best = max((maximised(energy, x, basis, max_iter, tolerance) for x in pool), key=lambda x: x[1])
            if best[1] < min_energy:
                break
            if j and best[1] > found[-1] * (1 + _SLACK) and restarts:
                restarts -= 1
                before = basis[:, :-1]
                better = maximised(energies(j - 1), best[0], before, max_iter, tolerance)
                if better[1] > found[-1] * (1 + _SLACK):
                    extra[j - 1] = [better[0]]
                    basis, found = before, found[:-1]
                    continue
            basis, found = torch.cat([basis, best[0][:, None]], 1), [*found, best[1]]
            bar.advance()
    basis = orthonormal(basis)
    final = [evaluated(energies(j), basis[:, j])[0] for j in range(len(found))]
    return basis, torch.tensor(final, dtype=torch.float64)


def maximised(
    energy: Energy,
    start: Float[Tensor, " d_model"],
    basis: Float[Tensor, "d_model rank"],
    max_iter: int,
    tolerance: float,
) -> tuple[Float[Tensor, " d_model"], float]:
    """The unit vector orthogonal to a basis to which L-BFGS climbs from a start, and its energy."""
    raw = projected(start.double(), basis)
    raw = (raw / raw.norm()).requires_grad_()
    scale = max(abs(evaluated(energy, raw)[0]), 1e-12)
    optimizer = torch.optim.LBFGS(
        [raw], max_iter=_ROUND, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        with torch.no_grad():
            u = projected(raw, basis)
            v = u / u.norm()
            value, gradient = evaluated(energy, v)
            raw.grad = -projected(gradient - v * (v @ gradient), basis) / u.norm() / scale
        return -value / scale

    last = -torch.inf
    for _ in range(0, max_iter, _ROUND):
        now = -float(optimizer.step(closure))
        if abs(now - last) <= tolerance * abs(now):
            break
        last = now
    u = projected(raw.detach(), basis)
    v = u / u.norm()
    return v, evaluated(energy, v)[0]


def projected(
    v: Float[Tensor, " d_model"], basis: Float[Tensor, "d_model rank"]
) -> Float[Tensor, " d_model"]:
    """v less its part in the span of an orthonormal basis, taken off twice for the sake of rounding."""
    v = v - basis @ (basis.mT @ v)
    return v - basis @ (basis.mT @ v)


def orthonormal(basis: Float[Tensor, "d_model rank"]) -> Float[Tensor, "d_model rank"]:
    """QR, each column with its largest entry positive."""
    if not basis.shape[1]:
        return basis
    Q = torch.linalg.qr(basis).Q
    return Q * Q.gather(0, Q.abs().argmax(0, keepdim=True)).sign()


def _best(
    energy: Energy, starts: Float[Tensor, "... d_model"], basis: Float[Tensor, "d_model rank"], tries: int
) -> Sequence[Tensor]:
    """The starts with the highest energies, made orthogonal to the basis."""
    able = [u / u.norm() for x in starts.double() if (u := projected(x / x.norm(), basis)).norm() > 1e-4]
    return sorted(able, key=lambda v: -evaluated(energy, v)[0])[:tries]
