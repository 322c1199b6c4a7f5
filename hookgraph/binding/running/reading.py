"""Logits of some positions, and of some tokens, only: what is not read is not computed."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from hookgraph.binding.data.anchors import Anchor
from hookgraph.binding.running.mechanisms import element, replaced
from hookgraph.graph.measuring import Reads, take
from hookgraph.hooks.handles import installed

_FEW = 32
"""Of more tokens than this, or than this share of all of them, all logits are computed."""


@contextmanager
def reading(
    head: nn.Module, anchor: Anchor, reads: Reads, tokens: Int[Tensor, "..."] | None
) -> Generator[None]:
    """Within this context the unembedding sees these positions only; logits of other tokens may be 0.

    Args:
        head: the unembedding.
        anchor: that of what it reads.
        reads: the positions.
        tokens: the tokens; None for all of them.
    """

    def choose(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Of rows that do not lie side by side, a linear layer takes a product with its weight each.
        taken = take(element(args, kwargs, anchor.slot), reads).contiguous()
        return replaced(args, kwargs, anchor.slot, taken)

    forward = None if tokens is None else _narrow(head, tokens)
    # Not prepended: the taps at this place see every position.
    with installed(lambda: head.register_forward_pre_hook(choose, with_kwargs=True)):
        if forward is None:
            yield
            return
        vars(head)["forward"] = forward
        try:
            yield
        finally:
            del vars(head)["forward"]


def _narrow(head: nn.Module, tokens: Int[Tensor, "..."]) -> Callable[[Tensor], Tensor] | None:
    """The forward of a linear layer that computes some of its outputs; None where it is no plain one."""
    if type(head) is not nn.Linear or "forward" in vars(head) or head.weight.device.type == "meta":
        return None
    chosen = tokens.to(head.weight.device).unique()
    size = head.weight.shape[0]
    if len(chosen) > min(_FEW, size // _FEW) or not 0 <= int(chosen[0]) <= int(chosen[-1]) < size:
        return None
    weight, bias = head.weight[chosen], None if head.bias is None else head.bias[chosen]

    def forward(x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos vocab"]:
        return _zeros(x, size).index_copy_(-1, chosen, linear(x, weight, bias))

    return forward


def _zeros(like: Float[Tensor, "batch pos d_model"], size: int) -> Float[Tensor, "batch pos vocab"]:
    """Zeros. On the CPU they take memory only where something is written: PyTorch would write all of them."""
    shape = (*like.shape[:-1], size)
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    held = np.zeros(math.prod(shape) * like.element_size(), dtype=np.uint8)
    return torch.from_numpy(held).view(like.dtype).view(shape)
