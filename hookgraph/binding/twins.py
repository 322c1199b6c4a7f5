"""A copy of a model on which it is proven: in double precision, with weights that make errors show.

The mechanisms do not depend on the weights; on fresh models many activations are close to zero, norms
have no gain and no bias, and a wrong location could pass unnoticed.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def make_twin(
    model: PreTrainedModel, example: Mapping[str, Any], dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The copy, in evaluation mode, and the example in its precision."""
    twin = copy.deepcopy(model).eval()
    nn.Module.to(twin, dtype)
    _use_plain_experts(twin)
    _roughen(twin)
    precise = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in example.items()
    }
    return twin, precise


def _use_plain_experts(model: PreTrainedModel) -> None:
    """Fused kernels for mixtures of experts know no double precision."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and "_experts_implementation_internal" in vars(config):
            vars(config)["_experts_implementation_internal"] = "eager"


@torch.no_grad()
def _roughen(model: nn.Module) -> None:
    """Move every parameter a little, and enlarge matrices whose rows are close to zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
        if parameter.ndim < 2:
            parameter.add_(0.1 * noise)
            continue
        size = parameter.shape[-1] ** -0.5
        if float(parameter.std()) < 0.5 * size:
            parameter.copy_(noise * size)
