"""Weights by name in their normal form, read off what a projection does rather than what it is called."""

from collections.abc import Iterator
from typing import Any, Final

import torch
from accelerate.utils import align_module_device
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hookgraph.binding.data.findings import WeightSource
from hookgraph.binding.data.views import Columns, Span
from hookgraph.binding.tracing.trace import evaluating

_WIDTHS = ("in_features", "infeatures", "nx")

_CLOSE: Final = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How close a product with a parameter is to what a module returns, if that is it. Coarser dtypes: 0.02."""


def affine_map(
    module: nn.Module,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """(W, b) of a module that computes x W + b in evaluation. W is a view of its parameter where it has such
    a one.

    Where no parameter explains what the module does (quantised or adapted layers), W is what it returns
    for the unit vectors.
    """
    with align_module_device(module), evaluating(module):  # weights may lie elsewhere between passes
        return _affine_map(module)


def has_table(module: nn.Module) -> bool:
    """Whether a module has a table, or says how wide its input is: whether it may be affine."""
    return any(True for _ in _widths(module))


def may_be_affine(module: nn.Module, width: int) -> bool:
    """Whether a module tells that its input may be so wide: else nobody knows how to ask for its weight."""
    return width in _widths(module)


def _affine_map(module: nn.Module) -> tuple[Tensor, Tensor]:
    for table in _tables(module):
        for matrix in (table.mT, table):
            bias = _bias_if_affine(module, matrix)
            if bias is not None:
                return matrix, bias
    for width in dict.fromkeys(_widths(module)):
        bias = _returned(module, torch.zeros(1, width, **_like(module)))
        if bias is not None:
            unit = torch.eye(width, dtype=bias.dtype, device=bias.device)
            return module.forward(unit) - bias, bias[0]
    raise LookupError(f"{type(module).__name__} does not tell how wide its input is")


def _bias_if_affine(module: nn.Module, matrix: Tensor) -> Tensor | None:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        row = torch.randn(1, matrix.shape[0], generator=generator).to(matrix.device, matrix.dtype)
        bias = _returned(module, torch.zeros_like(row))
        if bias is None or bias.shape[-1] != matrix.shape[1]:
            return None
        got, expected = module.forward(row) - bias, row @ matrix
        close = (got - expected).norm() <= _CLOSE.get(matrix.dtype, 2e-2) * expected.norm()
        return bias[0] if bool(close) else None


def _returned(module: nn.Module, rows: Tensor) -> Tensor | None:
    """What a module returns; None where it takes no rows so wide."""
    try:
        return module.forward(rows)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return None


def _tables(module: nn.Module) -> list[Tensor]:
    """The matrices that may be all that a module multiplies with: its own, or the only one inside it."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(True for _ in module.children()):
        inside = [p for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()]
        own = inside if sum(p.ndim > 1 for p in inside) == 1 and len(inside) <= 2 else []
    return [p for p in own if p.ndim == 2 and p.is_floating_point()]


def _widths(module: nn.Module) -> Iterator[int]:
    """How wide the input of a module may be: as it says, or as its tables are."""
    said = (getattr(module, name, None) for name in _WIDTHS)
    yield from (width for width in said if isinstance(width, int))
    for table in (*module.parameters(), *module.buffers()):
        yield from reversed(table.shape if table.ndim > 1 else ())


def _like(module: nn.Module) -> dict[str, Any]:
    """Precision and device of what a module is given, as its weights have them."""
    every = [*module.parameters(), *module.buffers()]
    one = next((p for p in every if p.is_floating_point()), None)
    device = every[0].device if one is None and every else None
    return {"device": device} if one is None else {"dtype": one.dtype, "device": one.device}


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
