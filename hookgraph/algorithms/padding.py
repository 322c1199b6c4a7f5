"""Which tokens of a batch are real."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hookgraph.errors import InputError, MetricError
from hookgraph.graph.abstract import Prepared
from hookgraph.graph.examples import has_features
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.hooks.positions import KEYS_ELSEWHERE, Place, read_at
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import MAIN_STACK, Location
from hookgraph.ontology.transformer import ENCODER, VISION

_DECODED = ("decoder_input_ids", "decoder_inputs_embeds")


def real_tokens(
    inputs: Prepared, value: Shaped[Tensor, "batch pos ..."], stack: str = MAIN_STACK
) -> Bool[Tensor, "batch pos"]:
    """Which tokens the attention mask keeps; all of them where no mask has one entry for each of them."""
    mask = mask_of(stack, inputs)
    if mask is not None and mask.shape == value.shape[:2]:
        return mask.bool().to(value.device)
    return torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)


def weights_at(
    graph: HookGraph, location: Location, value: Float[Tensor, "..."], inputs: Prepared
) -> Float[Tensor, "..."]:
    """1 at real tokens, 0 at padding, over the axes of `location` with size 1 where it has neither."""
    mask = mask_of(location.root.type.stack, inputs)
    axes = location.type.dims
    if Dimension.POS not in axes or mask is None or not _fits(mask, location, value):
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


def _fits(mask: Shaped[Tensor, "batch pos"], location: Location, value: Tensor) -> bool:
    """Whether a mask has an entry for each example, and for each position where the location has them all."""
    if len(mask) != len(value):
        return False
    whole = Dimension.POS not in dict(location.index)
    return not whole or mask.shape[1] == value.shape[location.dims.index(Dimension.POS)]


def mask_of(stack: str, inputs: Prepared) -> Shaped[Tensor, "batch pos"] | None:
    """The mask of what a stack reads; None where there is none, or none of two axes.

    The decoder has one of its own where there is an encoder. A mask of tokens says nothing of patches or
    frames: of what is no text, `pixel_attention_mask` is that of a vision tower, and there is no other.
    """
    decoding = any(inputs.get(name) is not None for name in _DECODED)
    if stack == MAIN_STACK:
        found = inputs.get("decoder_attention_mask" if decoding else "attention_mask")
    elif stack == VISION.EMBED.type.stack:
        found = inputs.get("pixel_attention_mask")
    else:
        found = inputs.get("attention_mask") if decoding or not has_features(inputs) else None
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


def check_aligned(place: Location, inputs: Prepared) -> None:
    """Refuse columns that are another position in each row.

    Raises:
        InputError: a row begins with padding.
    """
    told = dict(place.index)
    stack = place.root.type.stack
    keys = ENCODER.EMBED.type.stack if place.type in KEYS_ELSEWHERE else stack
    for dim, name in ((Dimension.POS, stack), (Dimension.KEY_POS, keys)):
        mask = mask_of(name, inputs)
        if dim in place.dims and dim not in told and mask is not None and not bool((mask[:, 0] != 0).all()):
            raise InputError(
                f"{place}: with padding on the left a column is another position in each row: pad on the "
                "right, name positions with .at(pos=...), or do not tell positions apart"
            )


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
