"""What is masked among attention scores: how it is told, and with which number it is written down."""

from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_NEGLIGIBLE: Final = 800.0
"""exp(-800) is zero in double precision."""


def masked_cells(scores: Float[Tensor, "batch head pos key_pos"]) -> Bool[Tensor, "batch head pos key_pos"]:
    """The cells to which the softmax gives exactly zero, however the model writes that down: models mask
    with the lowest number of some precision, with minus infinity, or with a large negative number.
    """
    return scores < scores.amax(-1, keepdim=True) - _NEGLIGIBLE


def masked_score(dtype: torch.dtype) -> float:
    """The number for a masked cell: the lowest of a precision, but none that is lost in single precision.

    Some softmaxes are in single precision: there a lower number is minus infinity, and a row of padding,
    masked altogether, not a number.
    """
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
