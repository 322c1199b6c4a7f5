"""Weights by name in their normal form, read off what a projection does rather than what it is called."""

import torch
from accelerate.utils import align_module_device
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hookgraph.binding.data.findings import WeightSource
from hookgraph.binding.data.views import Columns, Span

_WIDTHS = ("in_features", "nx")


def affine_map(
    module: nn.Module,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """(W, b) of a module that computes x W + b. W is a view of its parameter where it has such a one.

    Where no parameter explains what the module does (quantised or adapted layers), W is what it returns
    for the unit vectors.
    """
    with align_module_device(module):  # weights may lie elsewhere between passes
        return _affine_map(module)


def has_table(module: nn.Module) -> bool:
    """Whether a module has a table of its own, or says how wide its input is: whether it may be affine."""
    own = any(p.ndim == 2 for p in module.parameters(recurse=False))
    return own or any(isinstance(getattr(module, name, None), int) for name in _WIDTHS)


def _affine_map(module: nn.Module) -> tuple[Tensor, Tensor]:
    tables = [p for p in module.parameters(recurse=False) if p.ndim == 2]
    for table in tables:
        for matrix in (table.mT, table):
            bias = _bias_if_affine(module, matrix)
            if bias is not None:
                return matrix, bias
    width, like = _width_in(module, tables), tables[0] if tables else next(module.parameters())
    bias = module.forward(torch.zeros(1, width, dtype=like.dtype, device=like.device))
    return module.forward(torch.eye(width, dtype=bias.dtype, device=bias.device)) - bias, bias[0]


def _bias_if_affine(module: nn.Module, matrix: Tensor) -> Tensor | None:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        row = torch.randn(1, matrix.shape[0], generator=generator).to(matrix.device, matrix.dtype)
        try:
            bias = module.forward(torch.zeros_like(row))
            got = module.forward(row) - bias
        except RuntimeError:
            return None
        if got.shape[-1] != matrix.shape[1]:
            return None
        expected = row @ matrix
        close = (got - expected).norm() <= 2e-2 * expected.norm()
        return bias[0] if bool(close) else None


def _width_in(module: nn.Module, tables: list[nn.Parameter]) -> int:
    for name in _WIDTHS:
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    return tables[0].shape[-1]


def normal_form(module: nn.Module, source: WeightSource, *, bias: bool) -> Float[Tensor, "..."]:
    """The weight, or the bias, of a projection in the form that `WeightType` states."""
    if source.side == "table":
        with align_module_device(module):
            table = next(module.parameters())
            return module.forward(torch.arange(table.shape[0], device=table.device))
    matrix, offset = affine_map(module)
    view = source.view
    if source.side == "input":
        if bias:
            return offset
        if isinstance(view, Columns):
            return rearrange(view.get(matrix.mT[None]), "1 out head d -> head d out")
        return matrix
    if isinstance(view, Columns):
        if bias:
            return view.get(offset[None, None])[0, 0]
        return rearrange(view.get(matrix[None]), "1 into head d -> head into d")
    if isinstance(view, Span):
        return view.get(offset if bias else matrix)
    return offset if bias else matrix
