"""The energy of a direction through a lens: removing it is a rank-1 update of the logits.

A lens ends in a norm and an unembedding, logits = g ⊙ (z - κ mean z) / s W_U + β,
s² = mean (z - κ mean z)² + ε with z = M h + b. With R_v h = h - c v the numerator is N - c u,
u the image of v: V numbers per state instead of a product with W_U.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.bases.energies import Decode, Loss
from hookgraph.algorithms.readouts.lenses import Translation
from hookgraph.errors import UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import FINAL_LN_OUT
from hookgraph.ontology.weights import W_U

_AGREES = 1e-4


@final
@dataclass(frozen=True, eq=False)
class Ending:
    """A model's last norm and unembedding in closed form.

    Args:
        table: g ⊙ W_U.
        bias: β.
        centred: κ, 1 for a layer norm and 0 for an RMS norm.
        epsilon: ε.
    """

    table: Float[Tensor, "d_model vocab"]
    bias: Float[Tensor, " vocab"]
    centred: bool
    epsilon: float

    def numerator(self, z: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """z - κ mean z."""
        return z - z.mean(-1, keepdim=True) if self.centred else z

    def __call__(self, z: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """The logits."""
        x = self.numerator(z)
        return x @ self.table * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() + self.bias


class RankOne(torch.autograd.Function):
    """loss(L - c uᵀ), scaled by r: Σ_n Σ_V w (log p - log softmax(r_n (N_n - c_n u) + β)).

    With G = softmax - w, the gradients are r = Σ_V G ⊙ (N - c u), c = -r Σ_V G u and u = -Σ_n r c G.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        c: Float[Tensor, "..."],
        u: Float[Tensor, " vocab"],
        r: Float[Tensor, "..."],
        numerator: Float[Tensor, "... vocab"],
        bias: Float[Tensor, " vocab"],
        weights: Float[Tensor, "... vocab"],
        entropy: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """The loss, given Σ w log p. One buffer holds the logits, then G."""
        buffer = torch.addr(numerator, c, u, alpha=-1)
        scaled = buffer.mul_(r[:, None]).add_(bias)
        top = scaled.logsumexp(-1)
        spoken = torch.linalg.vecdot(weights, scaled).sum()
        total = weights.sum(-1) @ top
        loss = entropy - spoken + total
        # Σ_V G x for x = N - c u comes from the logits themselves: x = (scaled - bias) / r.
        G = torch.exp(scaled - top[:, None]).sub_(weights)
        by_scale = (torch.linalg.vecdot(G, scaled) - G @ bias) / r
        ctx.save_for_backward(-r * (G @ u), -((r * c) @ G), by_scale)
        return loss

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Each gradient was computed together with the loss."""
        by_c, by_u, by_r = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
        (g,) = grads
        return g * by_c, g * by_u, g * by_r, None, None, None, None


@final
class LensEnergy:
    """E(v) through a lens with a closed form.

    Args:
        rows: the states h.
        rest: h - target.
        loss: against the unablated lens.
        ending: what comes after the translation.
        translation: M and b; None for none.
    """

    def __init__(
        self,
        rows: Float[Tensor, "... d_model"],
        rest: Float[Tensor, "... d_model"],
        loss: Loss,
        ending: Ending,
        translation: Translation | None,
    ) -> None:
        self.rest, self.ending = rest, ending
        self.matrix = None if translation is None else translation.linear(rest)
        z = rows if translation is None else translation(rows)
        self._x = ending.numerator(z)
        self._numerator = self._x @ ending.table
        self._square = self._x.square().mean(-1) + ending.epsilon
        self._weights = loss.weights
        self._entropy = (self._weights * loss.log_probs).sum()

    def __call__(self, v: Float[Tensor, " d_model"]) -> tuple[Float[Tensor, ""], int]:
        """The sum over states, and their number."""
        v = v.to(self.rest)
        c = self.rest @ v
        w = self.ending.numerator(v if self.matrix is None else self.matrix @ v)
        width = len(w)
        square = self._square - 2 * c * (self._x @ w) / width + c.square() * (w @ w) / width
        u = w @ self.ending.table
        loss = RankOne.apply(
            c, u, square.rsqrt(), self._numerator, self.ending.bias, self._weights, self._entropy
        )
        return loss, len(self.rest)  # pyright: ignore[reportReturnType]


def ending(graph: HookGraph, decode: Decode, shaped: Float[Tensor, "batch pos d_model"]) -> Ending | None:
    """The model's end in closed form, read off from what it does; None where that does not explain it.

    β, g, κ and ε follow from the logits' own parts at chosen residuals; the whole is then compared with the
    model on its states, and with a soft-cap, say, does not agree.

    Args:
        graph: the model.
        decode: the last residual -> logits.
        shaped: residuals to compare on.
    """
    try:
        table = graph.weight(W_U).detach().double()
        graph.check(FINAL_LN_OUT)
    except UnknownLocationError:
        return None
    for centred in (True, False):
        found = _fitted(decode, shaped, table, centred)
        if found is not None:
            return found
    return None


def _fitted(
    decode: Decode,
    shaped: Float[Tensor, "batch pos d_model"],
    table: Float[Tensor, "d_model vocab"],
    centred: bool,
) -> Ending | None:
    width = shaped.shape[-1]
    # Through the Gram matrix: the pseudo-inverse of the whole table would be most of the work of a basis.
    gram = torch.linalg.pinv(table @ table.mT, hermitian=True)
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(table)

    def said(x: Tensor) -> Tensor:
        with torch.no_grad():
            return decode(x.to(shaped).expand_as(shaped))[0, 0].double()

    base = said(torch.zeros_like(drawn))
    x = drawn - drawn.mean() if centred else drawn
    large = gram @ (table @ (said(1e3 * drawn) - base))
    gain = large / x * x.square().mean().sqrt()
    scaled = table * gain[:, None]
    small = said(1e-3 * drawn) - base
    expected = (1e-3 * x) @ scaled
    epsilon = float((expected @ expected / (small @ expected)) ** 2 - (1e-3 * x).square().mean())
    found = Ending(scaled.to(shaped), base.to(shaped), centred, max(epsilon, 0.0))
    with torch.no_grad():
        true = decode(shaped)
        gap = (found(shaped) - true).abs().max()
    return found if bool(gap <= _AGREES * true.abs().max()) else None
