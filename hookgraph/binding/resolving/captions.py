"""Examples of text with a picture in it, for models that put what they make of one among the tokens."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, count
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hookgraph.binding.resolving.making import BATCH, Arguments, packed, pictures, stated, token_ids
from hookgraph.binding.running.inputs import device_of
from hookgraph.binding.running.outputs import read_output
from hookgraph.binding.tracing.trace import evaluating
from hookgraph.graph.examples import rows_of

_BEFORE: Final = 2
"""How many tokens stand before the picture."""

_MOST: Final = 300
"""Up to this many patches a picture may have, and places in the text: with more, a large model takes long."""

_MATRIX: Final = 2
"""How many axes patches that lie packed have."""
_BATCHED: Final = 4
"""How many axes pictures with an axis for the batch have."""

_ROUNDINGS: Final = 100
"""By how many roundings what is made of an example may differ by its place in a batch."""

_NAMED: Final = (
    *("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id"),
    *("vision_start_token_id", "vision_end_token_id", "image_start_token_id", "image_end_token_id"),
)
"""Fields for tokens that stand for parts of pictures, films and sounds, or around them; pictures first."""

_KINDS: Final = ("mm_token_type_ids", "token_type_ids")
"""Arguments that mark the places of pictures by 1."""


def captioned(model: PreTrainedModel) -> Iterator[Arguments]:
    """Text with as many places for a picture as the model's `get_image_features` returns vectors, and it.

    Nothing, if the configuration names no token that stands for a part of a picture, or if pictures have
    more patches than are cheap.
    """
    token = next(stated(model, *_NAMED[:2]), None)
    look = getattr(model, "get_image_features", None)
    if not isinstance(token, int) or look is None:
        return
    accepted, given = (inspect.signature(f).parameters for f in (model.forward, look))
    needed = {k for k, p in given.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in given.values())
    device = device_of(model)
    for made in _pictures(model):
        shown = {k: v.to(device) for k, v in made.items() if k in accepted and (open_ended or k in given)}
        if "pixel_values" not in shown or not needed <= shown.keys():
            continue
        with evaluating(model), torch.no_grad():
            places = _places(look, shown)
        if 0 < places <= _MOST:
            yield {**_text(model, token, places, accepted), **shown}


def _pictures(model: PreTrainedModel) -> Iterator[Arguments]:
    """Arguments for a picture per row of the batch, the simplest first; also with an axis of pictures."""
    patch = next(stated(model, "patch_size"), 1)
    area = patch**2 if isinstance(patch, int) else 1
    for made in chain(pictures(model), packed(model)):
        pixels = made["pixel_values"]
        if pixels.ndim > _MATRIX and pixels.shape[-2:].numel() > _MOST * area:
            continue
        yield made
        if pixels.ndim == _BATCHED:
            sizes = {"image_sizes": torch.tensor([pixels.shape[-2:]] * pixels.shape[0])}
            yield {**made, **sizes}
            yield {"pixel_values": pixels[:, None]}


def _places(look: Callable[..., Any], shown: Mapping[str, Tensor]) -> int:
    """How many vectors the model makes of each picture; 0 if it cannot see these."""
    try:
        found = look(**shown)
        outputs = (getattr(found, name, None) for name in ("pooler_output", "last_hidden_state"))
        found = next((x for x in outputs if x is not None), found)
        vectors = [found] if isinstance(found, Tensor) else list(found)
        width = vectors[0].shape[-1]
        total = sum(x.numel() // width for x in vectors)
    except Exception:  # whatever a model raises that is shown what it was not made for
        return 0
    return total // BATCH


def stands_alone(model: PreTrainedModel, example: Mapping[str, Any]) -> bool:
    """Whether an example with pictures is read alike wherever it lies in a batch: not if they are counted."""
    token, ids = next(stated(model, *_NAMED[:2]), None), example.get("input_ids")
    if not isinstance(token, int) or ids is None or not bool((ids == token).any()):
        return True
    with evaluating(model), torch.no_grad():
        straight, turned = (
            read_output(model(**rows_of(example, torch.tensor(order), BATCH))) for order in ([0, 1], [1, 0])
        )
    rounding = _ROUNDINGS * torch.finfo(straight.dtype).eps * float(straight.abs().max())
    return bool(((straight - turned.flip(0)).abs() <= rounding).all())


def _text(model: PreTrainedModel, token: int, places: int, accepted: Any) -> Arguments:
    ids = token_ids(model)
    named = [x for x in stated(model, *_NAMED) if isinstance(x, int)]
    ordinary = next(x for x in count(_BEFORE) if x not in named)
    ids = torch.where(torch.isin(ids, torch.tensor(named)), ordinary, ids)
    ids = torch.cat([ids[:, :_BEFORE], torch.full((len(ids), places), token), ids[:, _BEFORE:]], 1)
    kinds = {k: (ids == token).long() for k in _KINDS if k in accepted}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds}
