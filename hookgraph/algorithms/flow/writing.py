"""How an update of the stream is written: coefficients times vectors and a bias, through what follows."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.algorithms.flow.streaming import proximities, proximity
from hookgraph.algorithms.proximity import Number
from hookgraph.algorithms.streams import if_present
from hookgraph.errors import HookGraphError, UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import ATTN_OUT, ATTN_PATTERN, ATTN_V, MLP_OUT, MLP_POST
from hookgraph.ontology.weights import W_O, W_out, WeightType, b_O, b_out

_ROUNDS = 50
"""Of alternating least squares, which is exact after a few."""


def interior(graph: HookGraph, update: Location, *, heads: bool, neurons: bool) -> tuple[Location, ...]:
    """What has to be read to divide an update; nothing where it is one part."""
    layer = update.layer or 0
    if update.type == ATTN_OUT and heads:
        wanted, weight = (ATTN_PATTERN[layer], ATTN_V[layer]), W_O
    elif update.type == MLP_OUT and neurons:
        wanted, weight = (MLP_POST[layer],), W_out
    else:
        return ()
    if any(if_present(graph, x) is None for x in wanted):
        return ()
    return wanted if _weight(graph, weight, layer) is not None else ()


@final
@dataclass(frozen=True, eq=False)
class Row:
    """The tokens of one example that are no padding: what stands elsewhere may be no number at all."""

    number: int
    kept: Int[Tensor, " pos"]

    def of(self, value: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "..."]:
        """A value at these tokens."""
        return value[self.number, self.kept]


@final
@dataclass(frozen=True, eq=False)
class Written:
    """An update = gain · scale_p · (Σ_j a_pj o_j + bias), in one example.

    Args:
        coefficients: a: the pattern, by key and head, or the neurons.
        vectors: o: what each key's value is through each head, or the rows of the down projection.
        raw: Σ_j a_pj o_j + bias.
        bias: of the projection.
        scale: what multiplies it at each position.
        gain: what multiplies it in each dimension; both are those of a norm after the projection.
        shape: (key_pos, head) or (d_mlp); keys are tokens that are no padding, as positions are.
    """

    coefficients: Float[Tensor, "pos ..."]
    vectors: Float[Tensor, "... d_model"]
    raw: Float[Tensor, "pos d_model"]
    bias: Float[Tensor, " d_model"]
    scale: Float[Tensor, " pos"]
    gain: Float[Tensor, " d_model"]
    shape: tuple[int, ...]

    @staticmethod
    def of(graph: HookGraph, run: Run, update: Location, inside: tuple[Location, ...], row: Row) -> "Written":
        """How one example's update was written.

        Raises:
            HookGraphError: the update is not what its projection returns, nor a multiple of it in each
                dimension and position.
        """
        layer = update.layer or 0
        out = at_least_single(row.of(run[update]))
        if update.type == ATTN_OUT:
            pattern = row.of(run[inside[0]].movedim(1, 3))[:, row.kept].to(out)
            v = row.of(run[inside[1]]).to(out)
            weight = _needed(graph, W_O, layer).to(out)
            v = v.repeat_interleave(len(weight) // v.shape[1], dim=1)
            vectors = torch.einsum("khe,hed->khd", v, weight).flatten(0, 1)
            coefficients, shape = pattern.flatten(1), (len(v), len(weight))
            raw = torch.einsum("qhe,hed->qd", torch.einsum("qkh,khe->qhe", pattern, v), weight)
            bias = _weight(graph, b_O, layer)
        else:
            coefficients = row.of(run[inside[0]]).to(out)
            vectors, shape = _needed(graph, W_out, layer).to(out), coefficients.shape[1:]
            raw, bias = coefficients @ vectors, _weight(graph, b_out, layer)
        bias = out.new_zeros(out.shape[-1]) if bias is None else bias.to(out)
        raw = raw + bias
        factors = _multiple(raw, out, rounding(run[update].dtype))
        if factors is None:
            raise HookGraphError(
                f"{update} is neither what its projection returns nor a norm of it without a bias: it "
                "cannot be divided; with heads=False, and without neurons, every update is one part"
            )
        return Written(coefficients, vectors, raw, bias, *factors, shape)

    def proximities(
        self, whole: Float[Tensor, "pos d_model"], norm: Number
    ) -> tuple[Float[Tensor, "pos ..."], Float[Tensor, " pos"]]:
        """The proximity of each part to the stream, and that of the bias."""
        scaled = self.coefficients * self.scale[:, None]
        parts = proximities(scaled, self.vectors * self.gain, whole, norm)
        bias = self.scale[:, None] * (self.gain * self.bias)
        return parts.unflatten(1, self.shape), proximity(bias, whole, norm)

    def total(self) -> Float[Tensor, "pos d_model"]:
        """All parts and the bias, added up."""
        return self.scale[:, None] * self.gain * self.raw


def at_least_single(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Half precision as single: distances of parts to a whole are differences of nearly equal numbers."""
    return x.float() if x.dtype.itemsize < 4 else x


def rounding(dtype: torch.dtype) -> float:
    """What differs by no more of its size is the same; norms compute in single precision anyway."""
    return 2e-2 if dtype.itemsize < 4 else 1e-4


def same(a: Float[Tensor, "..."], b: Float[Tensor, "..."], share: float) -> bool:
    """Whether two tensors differ by no more than a share of the second."""
    return bool((a - b).norm() <= share * b.norm())


def _multiple(raw: Tensor, out: Tensor, share: float) -> tuple[Tensor, Tensor] | None:
    """(s, g) with out = g · s_p · raw, by alternating least squares; None if there is none.

    1 where they are equal; a multiplier; or the gain and scale of a norm that neither centres nor shifts.
    """
    gain, scale = torch.ones_like(out[0]), torch.ones_like(out[:, 0])
    if same(raw, out, share):
        return scale, gain
    tiny, eps = torch.finfo(raw.dtype).tiny, torch.finfo(raw.dtype).eps
    scale = raw.square().mean(-1).clamp(min=tiny).rsqrt()
    for _ in range(_ROUNDS):
        gain = _slope(raw * scale[:, None], out, 0)
        new = _slope(raw * gain, out, 1)
        settled = bool((new - scale).norm() <= 4 * eps * new.norm())
        scale = new
        if settled:
            break
    return (scale, gain) if same(raw * gain * scale[:, None], out, share) else None


def _slope(x: Tensor, y: Tensor, axis: int) -> Tensor:
    """The least-squares factors from x to y along one axis; 0 where x is."""
    size = x.square().sum(axis)
    return (x * y).sum(axis) / size.masked_fill(size == 0, 1)


def _weight(graph: HookGraph, kind: WeightType, layer: int) -> Tensor | None:
    try:
        return graph.weight(kind, layer).detach()
    except UnknownLocationError:
        return None


def _needed(graph: HookGraph, kind: WeightType, layer: int) -> Tensor:
    found = _weight(graph, kind, layer)
    if found is None:
        raise ValueError("the update is divided only where there is this weight")
    return found
