"""Which tokens of a batch are real."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hookgraph.graph.abstract import Prepared
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location


def real_tokens(inputs: Prepared, batch: int, length: int) -> Bool[Tensor, "batch pos"]:
    """Which tokens the attention mask keeps; all of them where there is no mask of one row per example."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == (batch, length):
        return mask.bool()
    return torch.ones(batch, length, dtype=torch.bool)


def weights_at(location: Location, value: Float[Tensor, "..."], inputs: Prepared) -> Float[Tensor, "..."]:
    """1 at real tokens, 0 at padding, over the axes of `location` with size 1 where it has neither."""
    positions = Dimension.POS in location.type.dims
    mask = inputs.get("attention_mask")
    if not positions or not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != len(value):
        return value.new_ones([1] * value.ndim).expand(len(value), *([1] * (value.ndim - 1)))
    part = dict(location.index).get(Dimension.POS, slice(None))
    kept = mask[:, list(part) if isinstance(part, tuple) else part].to(value)
    shape = [1] * value.ndim
    dims = list(location.dims)
    shape[0] = kept.shape[0]
    if Dimension.POS in dims:
        shape[dims.index(Dimension.POS)] = kept.shape[1]
    return kept.reshape(shape)
