"""Copies of a model on which it is proven: whole, tiny, or of some of its layers.

The mechanisms do not depend on the weights, nor on the sizes of tensors. A copy is in double precision where
that is possible, and its weights are such that errors show: on fresh models many activations are close to
zero, norms have no gain and no bias, and a wrong location could pass unnoticed.
"""

import copy
import math
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hookgraph.binding.data.findings import Findings, Layer
from hookgraph.binding.proving.shrinking import shrinkings
from hookgraph.binding.running.mechanisms import element

_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def make_twin(
    model: PreTrainedModel, example: Mapping[str, Any], dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The copy, in evaluation mode, and the example in its precision."""
    return _made_precise(copy.deepcopy(model), dtype), in_precision(example, dtype)


def in_precision(example: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """An example with its numbers in some precision."""
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in example.items()
    }


def tiny_twins(model: PreTrainedModel, depths: Mapping[int, int], limit: int) -> Iterator[PreTrainedModel]:
    """Models of the same class on the CPU, with fewer layers and narrower ones, the smallest first.

    Args:
        model: the large one; only its class and its configuration are used.
        depths: how many layers a stack of some number of layers is to keep.
        limit: how many parameters a twin may have.
    """
    for shrinking in shrinkings(model.config, depths):
        with quietly():
            try:
                with torch.device("meta"):
                    size = sum(p.numel() for p in type(model)(shrinking.of(model.config)).parameters())
                if size > limit:
                    continue
                with torch.device("cpu"):
                    twin = type(model)(shrinking.of(model.config))
            except Exception:
                continue  # These numbers do not make a model of this class.
        yield twin.eval()


@contextmanager
def quietly() -> Generator[None]:
    """Within this context random numbers are drawn apart, and transformers does not comment."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def make_excerpt(
    model: PreTrainedModel, findings: Findings, kept: Collection[str], dtype: torch.dtype
) -> PreTrainedModel:
    """A copy of some layers, and of what is outside the layers; other layers hand their input on.

    Args:
        model: the large model.
        findings: what was found in it.
        kept: the paths of the layers to copy.
        dtype: the precision of the copy.
    """
    layers = {x.module: x for stack in findings.layers.values() for x in stack}
    shells = {
        id(model.get_submodule(path)): _shell(model.get_submodule(path), layer)
        for path, layer in layers.items()
        if path not in kept and not layer.shared
    }
    return _made_precise(copy.deepcopy(model, dict(shells)), dtype)


def _shell(module: nn.Module, layer: Layer) -> nn.Module:
    """A layer without content, which hands its input on."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = element(args, kwargs, layer.input_slot)
        if layer.output_slot is None:
            return result
        return tuple(result if i == layer.output_slot else None for i in range(layer.output_size))

    empty = nn.Module()
    shell = object.__new__(type(module))
    # The rest are settings, which the code around a layer may read.
    shell.__dict__.update({**module.__dict__, **empty.__dict__, "forward": forward})
    return shell


def _made_precise(twin: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    to_precision(twin.eval(), dtype)
    _use_plain_experts(twin)
    _roughen(twin)
    return twin


def to_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring a model to some precision, with what its modules keep undeclared, as a table once computed."""
    nn.Module.to(model, dtype)
    for module in model.modules():
        for name, kept in vars(module).items():
            if isinstance(kept, Tensor) and kept.is_floating_point():
                vars(module)[name] = kept.to(dtype)


def _use_plain_experts(model: PreTrainedModel) -> None:
    """Fused kernels for mixtures of experts know no double precision."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if "_experts_implementation_internal" in getattr(config, "__dict__", {}):
            vars(config)["_experts_implementation_internal"] = "eager"


@torch.no_grad()
def _roughen(model: nn.Module) -> None:
    """Move every parameter a little, and enlarge matrices whose rows are close to zero.

    A kernel of a convolution sums over its window too: with more than its share a few of them in a row let
    the activations grow until the next norm drowns what else comes in.
    """
    generator = torch.Generator().manual_seed(0)
    kernels = kernels_of(model)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
        if parameter.ndim < 2:
            parameter.add_(0.1 * noise)
            continue
        size = kernels.get(id(parameter), parameter.shape[-1]) ** -0.5
        if float(parameter.std()) < 0.5 * size:
            parameter.copy_(noise * size)


def kernels_of(model: nn.Module) -> dict[int, int]:
    """Over how many numbers each kernel of a convolution sums, by the identity of its weight."""
    found: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS):
            found[id(module.weight)] = math.prod(module.weight.shape[1:])
        elif isinstance(module, _TRANSPOSED):
            strides = math.prod(module.stride)
            found[id(module.weight)] = max(1, module.weight[:, 0].numel() // (module.groups * strides))
    return found
