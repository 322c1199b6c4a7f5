"""Made-up tokens and numbers, the same each time: what the examples are made of."""

from typing import Final

import torch
from torch import Tensor

BATCH: Final = 2
TOKENS: Final = 7


def tokens(length: int = TOKENS, rows: int = BATCH) -> Tensor:
    """Ordinary tokens, none of which is special."""
    return torch.randint(8, 90, (rows, length), generator=torch.Generator().manual_seed(0))


def noise(*shape: int) -> Tensor:
    """Normally distributed numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
