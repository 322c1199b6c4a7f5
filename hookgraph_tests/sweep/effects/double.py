"""Double precision throughout: a model in double precision, and its numbers that it asks to be in single."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hookgraph.binding.proving.twins import to_precision


@contextmanager
def doubled() -> Generator[None]:
    """Within this context whatever is asked for in single precision is made in double."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(before)


def in_double(value: Any) -> Any:
    """A tensor of floating numbers in double precision; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def make_double(model: nn.Module) -> None:
    """Double precision, without the fused kernels for mixtures of experts, which know none."""
    to_precision(model, torch.float64)
    for module in model.modules():
        config = getattr(module, "config", None)
        if "_experts_implementation_internal" in getattr(config, "__dict__", {}):
            vars(config)["_experts_implementation_internal"] = "eager"


@final
class _Double(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        return func(*map(_wider, args), **{k: _wider(v) for k, v in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
