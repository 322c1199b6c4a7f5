"""Proximities of very many parts, each a coefficient times a vector, without making them."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from hookgraph.algorithms.proximity import Number, norm_of

_CELLS = {"cpu": 1 << 18}
"""Numbers of a piece of work: on a CPU what its cache holds, elsewhere what keeps the device busy."""
_MANY_CELLS = 1 << 25


def proximities(
    coefficients: Float[Tensor, "pos ..."],
    vectors: Float[Tensor, "... d_model"],
    whole: Float[Tensor, "pos d_model"],
    norm: Number,
) -> Float[Tensor, "pos ..."]:
    """max(‖w_p‖ - ‖w_p - a_pj o_j‖, 0) for every position p and part j.

    For the Euclidean norm ‖w - a o‖² = |w|² - 2 a o·w + a²|o|² takes two products of matrices. Any other is
    computed piece by piece, over the parts whose coefficient is not zero: the causal half, mostly.

    Args:
        coefficients: a, (pos, part).
        vectors: o, (part, d_model).
        whole: w.
        norm: q of the norm.
    """
    if norm == 2:
        return _euclidean(coefficients, vectors, whole)
    return _streamed(coefficients, vectors, whole, norm)


def proximity(
    part: Float[Tensor, "... d_model"], whole: Float[Tensor, "... d_model"], norm: Number
) -> Float[Tensor, "..."]:
    """max(‖w‖ - ‖w - part‖, 0) of one part of each whole."""
    return (norm_of(whole, norm) - norm_of(whole - part, norm)).clamp(min=0)


def _euclidean(coefficients: Tensor, vectors: Tensor, whole: Tensor) -> Tensor:
    """‖w‖ - ‖w - p‖ = (2 p·w - |p|²) / (‖w‖ + ‖w - p‖), which does not cancel where p is small."""
    size = vector_norm(whole, dim=-1)[:, None]
    gain = (whole @ vectors.mT).mul_(coefficients).mul_(2)
    gain.addcmul_(coefficients.square(), vectors.square().sum(-1), value=-1)
    left = (size.square() - gain).clamp_(min=0).sqrt_().add_(size)
    return gain.clamp_(min=0).div_(left.masked_fill_(left == 0, 1))


def _streamed(coefficients: Tensor, vectors: Tensor, whole: Tensor, norm: Number) -> Tensor:
    """By pieces of parts and positions: one fused multiply-subtract and one norm for each."""
    (length, count), width = coefficients.shape, vectors.shape[-1]
    cells = _CELLS.get(whole.device.type, _MANY_CELLS)
    rows = max(1, min(count, cells // width))
    lines = max(1, min(length, cells // (rows * width)))
    buffer = whole.new_empty(lines, rows, width)
    size, negative = norm_of(whole, norm), -whole[:, None]
    found = torch.zeros_like(coefficients)
    for first in range(0, count, rows):
        parts = slice(first, first + rows)
        o, a = vectors[parts], coefficients[:, parts]
        for start in _live(a, lines):
            here = slice(start, start + lines)
            left = buffer[: len(a[here]), : len(o)]
            torch.addcmul(negative[here], a[here, :, None], o, out=left)
            found[here, parts] = size[here, None] - _consumed(left, norm)
    return found.clamp_(min=0).mul_(coefficients != 0)


def _consumed(x: Float[Tensor, "... d_model"], norm: Number) -> Float[Tensor, "..."]:
    """‖x‖ of what is not needed any more."""
    return x.abs_().sum(-1) if norm == 1 else norm_of(x, norm)


def _live(coefficients: Tensor, lines: int) -> list[int]:
    """Where the pieces of `lines` positions begin that have a coefficient other than zero."""
    used = (coefficients != 0).any(-1).nonzero().flatten() // lines
    return (used.unique() * lines).tolist()
