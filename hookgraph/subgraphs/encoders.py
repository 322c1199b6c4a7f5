"""What some dictionaries do beside one encoder: choose latents one after another, expect what comes next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hookgraph.errors import HookGraphError, ShapeMismatchError


@runtime_checkable
class Pursuit(Protocol):
    """Latents from an input and a decoder, without a single input of an activation function."""

    def __call__(
        self, x: Float[Tensor, "... d_model"], W_dec: Float[Tensor, "latent d_model"]
    ) -> Float[Tensor, "... latent"]:
        """The latents."""
        ...


@runtime_checkable
class Expectation(Protocol):
    """What a dictionary expects at each position from those before; only the rest is encoded."""

    def __call__(
        self,
        x: Float[Tensor, "... pos d_model"],
        W_enc: Float[Tensor, "d_model latent"],
        W_dec: Float[Tensor, "latent d_model"],
    ) -> Float[Tensor, "... pos d_model"]:
        """What is expected."""
        ...


@final
class MatchingPursuit(nn.Module):
    """Round by round, of the rest r: i = argmax r · d_i, a = max(r · d_i, 0), f_i += a, r -= a d_i.

    A position is done when its rest is shorter than `tolerance`, or when a round activates no new latent.

    Args:
        tolerance: the length of the rest at which to stop; 0 never stops for it.
        rounds: at most how many; by default as many as the input is wide.
        stops_on_repeat: whether a round that activates no new latent is the last one.

    Raises:
        HookGraphError: less than one round.

    Source: Mallat and Zhang, 1993; as an encoder, Costa et al., arXiv:2506.03093.
    """

    def __init__(
        self, tolerance: float = 1e-2, rounds: int | None = None, *, stops_on_repeat: bool = True
    ) -> None:
        super().__init__()
        if rounds is not None and rounds < 1:
            raise HookGraphError(f"rounds={rounds}: matching pursuit takes at least one round")
        self.tolerance = tolerance
        self.rounds = rounds
        self.stops_on_repeat = stops_on_repeat

    def forward(
        self, x: Float[Tensor, "... d_model"], W_dec: Float[Tensor, "latent d_model"]
    ) -> Float[Tensor, "... latent"]:
        """The latents; the gradient goes through their sizes, not through the choice."""
        rest = x.reshape(-1, x.shape[-1])
        going = torch.ones_like(rest[:, :1], dtype=torch.bool)
        chosen, sizes = rest.new_empty(len(rest), 0, dtype=torch.long), rest[:, :0]
        for _ in range(x.shape[-1] if self.rounds is None else self.rounds):
            with torch.no_grad():
                best = (rest @ W_dec.T).argmax(-1, keepdim=True)
            direction = W_dec[best[:, 0]]
            size = (rest * direction).sum(-1, keepdim=True).relu() * going
            rest = rest - size * direction
            going = going & ~self._done(rest, best, size, chosen)
            chosen, sizes = torch.cat((chosen, best), -1), torch.cat((sizes, size), -1)
            if not going.any():
                break
        latents = rest.new_zeros(len(rest), len(W_dec)).scatter_add(-1, chosen, sizes)
        return latents.reshape(*x.shape[:-1], len(W_dec))

    def _done(self, rest: Tensor, best: Tensor, size: Tensor, chosen: Tensor) -> Tensor:
        done = torch.zeros_like(size, dtype=torch.bool)
        if self.stops_on_repeat:
            done = (size == 0) | (chosen == best).any(-1, keepdim=True)
        if self.tolerance > 0:
            done = done | (rest.norm(dim=-1, keepdim=True) < self.tolerance)
        return done

    def extra_repr(self) -> str:
        """What `repr` says besides the name."""
        return f"tolerance={self.tolerance}, rounds={self.rounds}"


@final
@dataclass(frozen=True, slots=True)
class Projection:
    """One linear map: y = x weightᵀ + bias."""

    weight: Float[Tensor, "... latent"]
    bias: Float[Tensor, "..."]


@final
class CausalAttention(nn.Module):
    """z = Attention(queries of each latent code, keys and values of the codes before it) W_oᵀ + b_o.

    Position t attends to the codes of 0 .. t-1, and to a code of zeros that stands before the first.

    Args:
        query: latent -> bottleneck.
        key: latent -> bottleneck.
        value: latent -> latent.
        out: latent -> latent.
        heads: how many.

    Raises:
        ShapeMismatchError: the heads do not divide the bottleneck or the latents, or the maps do not fit.
    """

    def __init__(
        self, query: Projection, key: Projection, value: Projection, out: Projection, heads: int
    ) -> None:
        super().__init__()
        if heads < 1 or len(query.bias) % heads or len(value.bias) % heads:
            raise ShapeMismatchError(
                f"{heads} heads do not divide queries of {len(query.bias)} and values of {len(value.bias)}"
            )
        latents, bottleneck = len(value.bias), len(query.bias)
        for one, rows in ((query, bottleneck), (key, bottleneck), (value, latents), (out, latents)):
            if tuple(one.weight.shape) != (rows, latents) or len(one.bias) != rows:
                raise ShapeMismatchError(
                    f"a projection has shape {tuple(one.weight.shape)}; it has to be {(rows, latents)}"
                )
        self.heads = heads
        for name, one in {"query": query, "key": key, "value": value, "out": out}.items():
            self.register_parameter(f"{name}_weight", nn.Parameter(one.weight.detach(), requires_grad=False))
            self.register_parameter(f"{name}_bias", nn.Parameter(one.bias.detach(), requires_grad=False))

    def forward(self, code: Float[Tensor, "... pos latent"]) -> Float[Tensor, "... pos latent"]:
        """What is expected of each code."""
        before = nn.functional.pad(code[..., :-1, :], (0, 0, 1, 0))
        query, key, value = (
            self._heads("query", code),
            self._heads("key", before),
            self._heads("value", before),
        )
        found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self._project("out", found.transpose(-3, -2).flatten(-2))

    def _heads(self, name: str, code: Tensor) -> Tensor:
        return self._project(name, code).unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def _project(self, name: str, code: Tensor) -> Tensor:
        weight, bias = self.get_parameter(f"{name}_weight"), self.get_parameter(f"{name}_bias")
        return nn.functional.linear(code, weight, bias)


@final
class TemporalExpectation(nn.Module):
    """Layer by layer, of the rest r: with z = max(attention(max(r W_enc, 0)), 0) and p = z W_dec, the part
    of r along p, p (p · r) / (|p| + ε)², is expected, and the next layer reads what is left.

    It reads the positions of one pass: a dictionary that is injected refuses one that continues a cache.

    Args:
        layers: what predicts codes from those before.
        epsilon: ε.

    Source: Lubana et al., arXiv:2511.01836.
    """

    def __init__(self, layers: Sequence[CausalAttention], epsilon: float = 1e-6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.epsilon = epsilon

    def forward(
        self,
        x: Float[Tensor, "... pos d_model"],
        W_enc: Float[Tensor, "d_model latent"],
        W_dec: Float[Tensor, "latent d_model"],
    ) -> Float[Tensor, "... pos d_model"]:
        """What is expected."""
        expected = torch.zeros_like(x)
        for layer in self.layers:
            rest = x - expected
            towards = layer((rest @ W_enc).relu()).relu() @ W_dec
            length = towards.norm(dim=-1, keepdim=True) + self.epsilon
            expected = expected + towards * (towards * rest).sum(-1, keepdim=True) / length**2
        return expected
