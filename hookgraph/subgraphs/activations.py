"""What makes latents of the numbers that an encoder computes."""

from typing import Literal, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@runtime_checkable
class Activation(Protocol):
    """latents_pre -> latents."""

    def __call__(self, pre: Float[Tensor, "... latent"]) -> Float[Tensor, "... latent"]:
        """The latents."""
        ...

    def part(self, chosen: Int[Tensor, " latent"]) -> "Activation | None":
        """The same for some latents only; None where latents depend on each other."""
        ...


@final
class ReLU(nn.Module):
    """f = max(pre, 0)."""

    def forward(self, pre: Float[Tensor, "... latent"]) -> Float[Tensor, "... latent"]:
        """The latents."""
        return pre.relu()

    def part(self, chosen: Int[Tensor, " latent"]) -> "ReLU":
        """The same."""
        return self


@final
class JumpReLU(nn.Module):
    """f = max(pre, 0) where pre > θ, otherwise 0; θ per latent, or one for all of them.

    Source: Rajamanoharan et al., arXiv:2407.14435. Batch-top-k dictionaries become this after training
    (Bussmann et al., arXiv:2412.06410).
    """

    threshold: Tensor

    def __init__(self, threshold: Float[Tensor, "..."]) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)

    def forward(self, pre: Float[Tensor, "... latent"]) -> Float[Tensor, "... latent"]:
        """The latents."""
        return pre.relu() * (pre > self.threshold)

    def part(self, chosen: Int[Tensor, " latent"]) -> "JumpReLU":
        """With the thresholds of some latents."""
        return JumpReLU(self.threshold[chosen] if self.threshold.ndim else self.threshold)


@final
class TopK(nn.Module):
    """f = max(pre, 0) at the k largest of each position, 0 elsewhere.

    Args:
        k: how many.
        by: whether the largest are told by `value` or by `size`, that is, without their signs.
        rectified: False keeps negative values as they are.

    Source: Gao et al., arXiv:2406.04093.
    """

    def __init__(self, k: int, *, by: Literal["value", "size"] = "value", rectified: bool = True) -> None:
        super().__init__()
        self.k = k
        self.by = by
        self.rectified = rectified

    def forward(self, pre: Float[Tensor, "... latent"]) -> Float[Tensor, "... latent"]:
        """The latents."""
        pre = pre.relu() if self.rectified else pre
        ranked = pre.abs() if self.by == "size" else pre
        chosen = ranked.topk(min(self.k, pre.shape[-1]), dim=-1, sorted=False).indices
        return torch.zeros_like(pre).scatter(-1, chosen, pre.gather(-1, chosen))

    def part(self, chosen: Int[Tensor, " latent"]) -> None:
        """None: whether a latent is active depends on the others."""

    def extra_repr(self) -> str:
        """What `repr` says besides the name."""
        return f"k={self.k}"


@final
class GroupMax(nn.Module):
    """Latents stand in k groups of equal size; f = max(pre, 0) at the largest of each group, 0 elsewhere."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Float[Tensor, "... latent"]) -> Float[Tensor, "... latent"]:
        """The latents."""
        groups = pre.relu().unflatten(-1, (self.k, -1))
        largest = groups.max(dim=-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, largest.indices, largest.values).flatten(-2)

    def part(self, chosen: Int[Tensor, " latent"]) -> None:
        """None: whether a latent is active depends on its group."""


@final
class Gated(nn.Module):
    """f = max(exp(r) · pre + b_magnitude, 0) where pre + b_gate > 0, otherwise 0.

    Source: Rajamanoharan et al., arXiv:2404.16014.
    """

    gate_bias: Tensor
    magnitude_scale: Tensor
    magnitude_bias: Tensor

    def __init__(
        self,
        gate_bias: Float[Tensor, " latent"],
        magnitude_scale: Float[Tensor, " latent"],
        magnitude_bias: Float[Tensor, " latent"],
    ) -> None:
        super().__init__()
        self.register_buffer("gate_bias", gate_bias)
        self.register_buffer("magnitude_scale", magnitude_scale)
        self.register_buffer("magnitude_bias", magnitude_bias)

    def forward(self, pre: Float[Tensor, "... latent"]) -> Float[Tensor, "... latent"]:
        """The latents."""
        magnitude = (pre * self.magnitude_scale.exp() + self.magnitude_bias).relu()
        return magnitude * (pre + self.gate_bias > 0)

    def part(self, chosen: Int[Tensor, " latent"]) -> "Gated":
        """With the parameters of some latents."""
        return Gated(self.gate_bias[chosen], self.magnitude_scale[chosen], self.magnitude_bias[chosen])
