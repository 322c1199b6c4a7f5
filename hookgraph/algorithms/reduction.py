"""Sums and collections over the processes of a group; alone, what went in."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def alone() -> bool:
    """Whether there is no group of processes."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def summed(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The sum over processes, the same bits in each."""
    if alone():
        return x
    x = x.clone()
    dist.all_reduce(x)
    dist.broadcast(x, 0)
    return x


def gathered(x: Float[Tensor, "batch ..."]) -> tuple[Float[Tensor, "... d_model"], int]:
    """The rows of all processes one after the other, and where those of this one start."""
    if alone():
        return x, 0
    count = torch.tensor([len(x)], device=x.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    rows = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return rows, sum(sizes[: dist.get_rank()])
