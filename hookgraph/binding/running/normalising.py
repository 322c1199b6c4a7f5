"""What a norm does to numbers: its scale, gain and bias, and what it returns.

norm(x) = gain · (x - centre) · s + bias, s = 1/sqrt(mean square + ε). Which modules are norms is found in
the trace, by `resolving/norms.py`.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from hookgraph.binding.data.layouts import Layout, arranged, restored
from hookgraph.binding.tracing.trace import tensors_in


def normalised(
    module: nn.Module, x: Float[Tensor, "... d_model"], layout: Layout = ""
) -> Float[Tensor, "... d_model"]:
    """What a norm makes of `x`, which it is given in a layout: the first tensor that it returns."""
    found = module.forward(restored(layout, x))
    return arranged(layout, found if isinstance(found, Tensor) else next(tensors_in(found)), x.shape[0])


def scale_of(x: Float[Tensor, "... d_model"], *, centred: bool, epsilon: float) -> Float[Tensor, "... one"]:
    """s = 1 / sqrt(mean over the last axis of (x - centre)² + ε), in at least single precision."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def affine_of(
    module: nn.Module, like: Shaped[Tensor, "... d_model"], *, centred: bool
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """(gain, bias) of a norm: what it returns for zeros, and for a row so large that no ε matters."""
    width = like.shape[-1]
    row = torch.linspace(1e4, 2e4, width, dtype=torch.float64)
    row[1::2] *= -1
    row = row.to(like.device, like.dtype).view(1, 1, width)
    bias = module.forward(torch.zeros_like(row))
    moved = row - row.mean(-1, keepdim=True) if centred else row
    gain = (module.forward(row) - bias) / (moved * scale_of(row, centred=centred, epsilon=0.0))
    return gain[0, 0], bias[0, 0]
