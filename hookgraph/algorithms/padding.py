"""Which tokens of a batch are real."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hookgraph.errors import MetricError
from hookgraph.graph.abstract import Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.hooks.positions import Place, read_at
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import MAIN_STACK, Location


def real_tokens(
    inputs: Prepared, value: Shaped[Tensor, "batch pos ..."], stack: str = MAIN_STACK
) -> Bool[Tensor, "batch pos"]:
    """Which tokens the attention mask keeps; all of them where there is no mask of one row per example."""
    mask = inputs.get(_mask_of(stack, inputs))
    if isinstance(mask, Tensor) and mask.shape == value.shape[:2]:
        return mask.bool().to(value.device)
    return torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)


def weights_at(
    graph: HookGraph, location: Location, value: Float[Tensor, "..."], inputs: Prepared
) -> Float[Tensor, "..."]:
    """1 at real tokens, 0 at padding, over the axes of `location` with size 1 where it has neither."""
    mask = inputs.get(_mask_of(location.root.type.stack, inputs))
    axes = location.type.dims
    if Dimension.POS not in axes or not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != len(value):
        return value.new_ones([len(value), *([1] * (value.ndim - 1))])
    known = {Dimension.BATCH: mask.shape[0], Dimension.POS: mask.shape[1]}
    kept = mask.to(value).view([known.get(d, 1) for d in axes])
    part = {d.value: i for d, i in location.index if d is Dimension.POS}
    place = graph.binding.place(inputs) or Place(alone=True)
    kept = read_at(location.whole.at(**part) if part else location.whole, kept, place)
    if kept is None:
        raise ValueError("the pass held this part")
    sizes = dict(zip(location.dims, value.shape, strict=True))
    return kept.reshape([sizes[d] if d in known else 1 for d in location.dims])


def _mask_of(stack: str, inputs: Prepared) -> str:
    """The name of the mask of a stack: that of the decoder has one of its own where there is an encoder."""
    own = stack == MAIN_STACK and "decoder_input_ids" in inputs
    return "decoder_attention_mask" if own else "attention_mask"


def check_finite(values: Mapping[Location, Shaped[Tensor, "..."]]) -> None:
    """Refuse values that are no numbers.

    Raises:
        MetricError: one is NaN or infinite.
    """
    for location, value in values.items():
        if not bool(value.isfinite().all()):
            raise MetricError(
                f"{location} is not finite everywhere in this run: look at these inputs; a masked row or an "
                "overflow in half precision are usual reasons"
            )
