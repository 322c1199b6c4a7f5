"""How large what stands in for locations is: norms, and maps of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure

_REPEATED = (Dimension.BATCH, Dimension.POS)
"""Axes over which norms are averaged: along all others lies one vector."""
_DRAWN = (Dimension.HEAD, Dimension.KV_HEAD, Dimension.EXPERT, Dimension.STREAM, Dimension.POS)
"""Axes of which a map shows the first that a location has."""


def norm(
    value: Float[Tensor, "..."], dims: Sequence[Dimension], keep: Dimension | None = None
) -> Float[Tensor, "..."]:
    """√ mean over examples and positions of Σ x² along all other axes, less the one that is kept.

    What is NaN is left out: positions that an example does not have.
    """
    squares, gone = value.double().square(), [i for i, d in enumerate(dims) if d != keep]
    within = [i for i in gone if dims[i] not in _REPEATED]
    if within:
        squares = squares.sum(within, keepdim=True)
    among = [i for i in gone if dims[i] in _REPEATED]
    if among:
        squares = squares.nanmean(among, keepdim=True)
    return squares.sqrt().flatten() if keep in dims else squares.sqrt().squeeze()


def norm_maps(
    values: Mapping[Location, Float[Tensor, "..."]],
    dims: Mapping[Location, Sequence[Dimension]],
    labels: Mapping[str, Sequence[str]] | None = None,
) -> "matplotlib.figure.Figure":
    """A map of norms per kind of location: layers on y, heads on x, or else positions, if told apart.

    Raises:
        HookGraphError: there is nothing to draw, or matplotlib is not installed.
    """
    numbers: dict[Location, Tensor] = {}
    axes: dict[Location, tuple[Dimension, ...]] = {}
    for place, value in values.items():
        sizes = dict(zip(dims[place], value.shape, strict=True))
        kept = next((d for d in _DRAWN if sizes.get(d, 1) > 1), None)
        numbers[place], axes[place] = norm(value, dims[place], kept), (kept,) if kept else ()
    grids = [replace(x, unit="norm") for x in plotting.layer_maps(numbers, axes, labels)]
    return plotting.draw(grids, figure=plotting.new_figure())


def without_padding(
    values: Float[Tensor, "batch ..."], lengths: Int[Tensor, " batch"], axis: int
) -> Float[Tensor, "batch ..."]:
    """Samples with NaN behind the last token of each."""
    columns = torch.arange(values.shape[axis], device=values.device)
    gone = columns >= lengths.to(values.device)[:, None]
    shape = [values.shape[i] if i in (0, axis) else 1 for i in range(values.ndim)]
    return values.masked_fill(gone.view(shape), torch.nan)
