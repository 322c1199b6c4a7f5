"""How far two ways to compute the same may differ, by the precision in which they are computed."""

from collections.abc import Mapping
from typing import Final

import torch

_ROUNDINGS: Final = 10
"""How many roundings a pass may add up to."""


def rounding(dtype: torch.dtype) -> float:
    """The relative error of a pass."""
    return _ROUNDINGS * torch.finfo(dtype).eps


def tolerated(dtype: torch.dtype, known: Mapping[torch.dtype, float]) -> float:
    """What is known of double and single precision; below that no less than a pass rounds."""
    return known.get(dtype, max(known[torch.float32], rounding(dtype)))
