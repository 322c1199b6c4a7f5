"""What is better than what, when several numbers count at once."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def dominated(values: Float[Tensor, "batch ..."]) -> Bool[Tensor, " batch"]:
    """Which rows another one dominates: at least as large everywhere, and larger somewhere.

    Equal rows do not dominate each other.
    """
    found = [bool(((values >= row).all(1) & (values > row).any(1)).any()) for row in values]
    return torch.tensor(found, dtype=torch.bool, device=values.device)


def ranks(values: Float[Tensor, "batch ..."]) -> Int[Tensor, " batch"]:
    """The front that each row belongs to: 0 is dominated by none, 1 only by those of front 0, and so on.

    Source: non-dominated sorting, Deb et al., "NSGA-II", IEEE Trans. Evol. Comput. 6 (2002).
    """
    found = torch.zeros(len(values), dtype=torch.long, device=values.device)
    left = torch.arange(len(values), device=values.device)
    while len(left):
        worse = dominated(values[left])
        found[left[worse]] += 1
        left = left[worse]
    return found
