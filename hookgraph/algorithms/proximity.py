"""Contributions of parts to a whole, from tensors alone: names and shapes as they were published.

A whole w = Σ parts. The proximity of a part is z = max(‖w‖ - ‖w - part‖, 0), and its contribution z / Σ z.
Where every z is 0 the residual part gets 1; `eps_mode="compat"` raises every z to 1e-5 instead, and measures
distances as torch's `pairwise_distance` does, as the published functions do.

Source: Ferrando and Voita, "Information Flow Routes", arXiv:2403.00824; names and shapes of the functions
as in facebookresearch/llm-transparency-tool.
"""

from typing import Literal, TypeAlias, get_args

from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pairwise_distance

from hookgraph.errors import HookGraphError, ShapeMismatchError, nearest

EpsMode: TypeAlias = Literal["exact", "compat"]
"""What stands in for a proximity of zero: nothing, or the published 1e-5."""

Number: TypeAlias = float | int

_FLOOR = 1e-5


def get_contributions(
    parts: Float[Tensor, "..."],
    whole: Float[Tensor, "..."],
    distance_norm: Number = 1,
    eps_mode: EpsMode = "exact",
) -> Float[Tensor, "..."]:
    """The contribution of each part to its whole; over the parts of a whole they sum to 1.

    Where no part lies towards the whole, all parts get the same: none of them is the residual.

    Args:
        parts: (p_1 ... p_k, v_1 ... v_n, d): parts along the first axes, independent cases along the others.
        whole: (v_1 ... v_n, d).
        distance_norm: q of the norm; 1 sums absolute values, 2 is Euclidean.
        eps_mode: see the module.

    Raises:
        ShapeMismatchError: the last axes of the parts are not those of the whole.
    """
    axes = _part_axes(parts, whole)
    found = _proximities(parts, whole, distance_norm, eps_mode)
    total = found.sum(axes, keepdim=True) if axes else found
    nothing = total == 0
    equal = 1 / max(1, parts.shape[: len(axes)].numel())
    return (found / total.masked_fill(nothing, 1)).masked_fill(nothing, equal)


def get_contributions_with_one_off_part(
    parts: Float[Tensor, "..."],
    one_off: Float[Tensor, "..."],
    whole: Float[Tensor, "..."],
    distance_norm: Number = 1,
    eps_mode: EpsMode = "exact",
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The contributions of the parts and of one part more, usually the residual stream.

    Args:
        parts: (p_1 ... p_k, v_1 ... v_n, d), as in `get_contributions`.
        one_off: (v_1 ... v_n, d), the part that gets 1 where no part lies towards the whole.
        whole: (v_1 ... v_n, d).
        distance_norm: q of the norm.
        eps_mode: see the module.

    Returns:
        (p_1 ... p_k, v_1 ... v_n) for the parts, and (v_1 ... v_n) for the one-off part.

    Raises:
        ShapeMismatchError: the shapes do not agree.
    """
    if one_off.shape != whole.shape:
        raise ShapeMismatchError(
            f"the one-off part has shape {tuple(one_off.shape)}, the whole {tuple(whole.shape)}"
        )
    axes = _part_axes(parts, whole)
    others = _proximities(parts, whole, distance_norm, eps_mode)
    return shares(others, _proximities(one_off, whole, distance_norm, eps_mode), axes)


def get_attention_contributions(
    resid_pre: Float[Tensor, "batch pos d_model"],
    resid_mid: Float[Tensor, "batch pos d_model"],
    decomposed_attn: Float[Tensor, "batch pos key_pos head d_model"],
    distance_norm: Number = 1,
    eps_mode: EpsMode = "exact",
) -> tuple[Float[Tensor, "batch pos key_pos head"], Float[Tensor, "batch pos"]]:
    """What each token adds through each head, and what the residual stream keeps.

    `hookgraph.contributions` finds the same without the decomposed tensor, which for GPT-2 small and 1024
    tokens takes 38 GB per layer.

    Raises:
        ShapeMismatchError: the shapes do not agree.
    """
    parts = decomposed_attn.permute(2, 3, 0, 1, 4)
    found, residual = get_contributions_with_one_off_part(
        parts, resid_pre, resid_mid, distance_norm, eps_mode
    )
    return found.permute(2, 3, 0, 1), residual


def get_mlp_contributions(
    resid_mid: Float[Tensor, "batch pos d_model"],
    resid_post: Float[Tensor, "batch pos d_model"],
    mlp_out: Float[Tensor, "batch pos d_model"],
    distance_norm: Number = 1,
    eps_mode: EpsMode = "exact",
) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """What the MLP adds to each token, and what the residual stream keeps.

    Raises:
        ShapeMismatchError: the shapes do not agree.
    """
    found, residual = get_contributions_with_one_off_part(
        mlp_out[None], resid_mid, resid_post, distance_norm, eps_mode
    )
    return found[0], residual


def get_decomposed_mlp_contributions(
    resid_mid: Float[Tensor, " d_model"],
    resid_post: Float[Tensor, " d_model"],
    decomposed_mlp_out: Float[Tensor, "d_mlp d_model"],
    distance_norm: Number = 1,
    eps_mode: EpsMode = "exact",
) -> tuple[Float[Tensor, " d_mlp"], float]:
    """What each neuron adds to one token, and what the residual stream keeps.

    Raises:
        ShapeMismatchError: the shapes do not agree.
    """
    found, residual = get_contributions_with_one_off_part(
        decomposed_mlp_out, resid_mid, resid_post, distance_norm, eps_mode
    )
    return found, float(residual)


def apply_threshold_and_renormalize(
    threshold: Number,
    c_blocks: Float[Tensor, "..."],
    c_residual: Float[Tensor, "..."],
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Contributions of at most the threshold dropped, and the others scaled to a sum of 1 again.

    Where none is left, the residual gets 1.

    Args:
        threshold: what a contribution has to exceed.
        c_blocks: (v_1 ... v_n, p_1 ... p_k): of the blocks; no p axis, or several.
        c_residual: (v_1 ... v_n): of the residual stream.

    Raises:
        ShapeMismatchError: the first axes of the blocks are not those of the residual.
    """
    count = c_residual.ndim
    if c_blocks.shape[:count] != c_residual.shape:
        raise ShapeMismatchError(
            f"the first axes of the blocks, {tuple(c_blocks.shape)}, are not those of the residual, "
            f"{tuple(c_residual.shape)}"
        )
    blocks, residual = c_blocks * (c_blocks > threshold), c_residual * (c_residual > threshold)
    order = [*range(count, blocks.ndim), *range(count)]
    back = [*range(blocks.ndim - count, blocks.ndim), *range(blocks.ndim - count)]
    found, rest = shares(blocks.permute(order), residual, tuple(range(blocks.ndim - count)))
    return found.permute(back), rest


def shares(
    parts: Float[Tensor, "..."], residual: Float[Tensor, "..."], axes: tuple[int, ...]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Non-negative numbers and that of the residual, divided by their sum; the residual gets 1 where it is 0.

    Args:
        parts: the numbers.
        residual: one for each case.
        axes: those of the parts that enumerate them; the others are those of the residual.
    """
    total = residual + (parts.sum(axes) if axes else parts)
    nothing = total == 0
    divisor = total.masked_fill(nothing, 1)
    kept = divisor
    for axis in sorted(axes):
        kept = kept.unsqueeze(axis)
    return parts / kept, (residual / divisor).masked_fill(nothing, 1)


def norm_of(x: Float[Tensor, "..."], norm: Number) -> Float[Tensor, "..."]:
    """‖x‖ along the last axis. Of q = 1, torch's own takes six times as long and rounds more."""
    return x.abs().sum(-1) if norm == 1 else vector_norm(x, norm, dim=-1)


def check_norm(norm: Number) -> None:
    """Refuse what is no norm.

    Raises:
        HookGraphError: q is less than 1.
    """
    if not norm >= 1:
        raise HookGraphError(f"norm={norm}: the norm Σ(|x|^q)^(1/q) takes q from 1 to infinity")


def _part_axes(parts: Tensor, whole: Tensor) -> tuple[int, ...]:
    """The axes that enumerate parts."""
    count = parts.ndim - whole.ndim
    if count < 0 or parts.shape[count:] != whole.shape:
        raise ShapeMismatchError(
            f"the last axes of the parts, {tuple(parts.shape)}, are not those of the whole, "
            f"{tuple(whole.shape)}: parts are (p_1 ... p_k, v_1 ... v_n, d), the whole is (v_1 ... v_n, d)"
        )
    return tuple(range(count))


def _proximities(parts: Tensor, whole: Tensor, norm: Number, eps_mode: EpsMode) -> Float[Tensor, "..."]:
    check_norm(norm)
    if eps_mode not in get_args(EpsMode):
        raise HookGraphError(f"unknown eps_mode {eps_mode!r}: {nearest(eps_mode, get_args(EpsMode))}")
    size = norm_of(whole, norm)
    if eps_mode == "compat":
        return (size - pairwise_distance(parts, whole.expand(parts.shape), p=norm)).clamp(min=_FLOOR)
    return (size - norm_of(whole - parts, norm)).clamp(min=0)
