"""Arguments for a pass of a model, made up: a few tokens, a small picture, a little sound."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hookgraph.binding.running.inputs import embedding_of, vocabulary_size

_TOKENS: Final = 7
BATCH: Final = 2
"""How many examples there are."""
_FRAMES: Final = 4
_SAMPLES: Final = 2000
_PATCHES: Final = 4
_GRID: Final = (4, 4)
"""How many patches a picture has in height and width, where pictures lie one after another."""
_BINS: Final = (
    "num_mel_bins",
    "feature_size",
    "input_feat_per_channel",
    "feature_projection_input_dim",
    "input_dim",
)
"""Fields that state how many bins a spectrogram has."""

Arguments: TypeAlias = dict[str, Tensor]


def _tokens(model: PreTrainedModel) -> list[Arguments]:
    ids = token_ids(model)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def token_ids(model: PreTrainedModel) -> Tensor:
    """Any tokens, and the one that ends a text: some models read their result there."""
    known = vocabulary_size(model, embedding_of(model))
    generator = torch.Generator().manual_seed(0)
    length = _TOKENS * _config(model, "downsampling_rate", default=1)
    ids = torch.randint(min(8, known - 1), max(9, known - 8), (BATCH, length), generator=generator)
    end, padding = (_config(model, f"{x}_token_id", default=-1) for x in ("eos", "pad"))
    if 0 <= end < known and end != padding:
        ids[:, -1] = end
    return ids


def pictures(model: PreTrainedModel) -> list[Arguments]:
    """A picture, a film of a few, or the patches of a picture."""
    height, width = _size(model)
    channels = _config(model, "num_channels", "in_channels", "in_chans", default=3)
    patch = _config(model, "patch_size", default=16)
    patches = {
        "pixel_values": _noise(model, _PATCHES, channels * patch**2),
        "pixel_attention_mask": torch.ones(BATCH, _PATCHES, dtype=torch.long),
        "spatial_shapes": torch.tensor([[2, _PATCHES // 2]] * BATCH),
    }
    frames = _config(model, "num_frames", default=_FRAMES)
    shapes = [(channels, height, width), (frames, channels, height, width)]
    return [*({"pixel_values": _noise(model, *shape)} for shape in shapes), patches]


def packed(model: PreTrainedModel) -> list[Arguments]:
    """The patches of pictures one after another, and how many there are of each in time, height and width."""
    channels = _config(model, "num_channels", "in_channels", "in_chans", default=3)
    patch = _config(model, "patch_size", default=16)
    depth = _config(model, "temporal_patch_size", default=1)
    sizes = torch.tensor([[1, *_GRID]] * BATCH)
    merged = torch.full((BATCH,), _GRID[0] // 2)
    several = {
        "grid_thw": sizes,
        "image_grid_thw": sizes,
        "merge_sizes": merged,
        "image_merge_sizes": merged,
    }
    # How many frames a patch spans is not always stated.
    shapes = [*((channels * d * patch**2,) for d in dict.fromkeys((depth, 1, 2))), (channels, patch, patch)]
    made: list[Arguments] = []
    for shape in shapes:
        patches = _noise(model, math.prod(_GRID), *shape).flatten(0, 1)
        made.append({"hidden_states": patches, "pixel_values": patches, **several})
    return made


def _films(model: PreTrainedModel) -> list[Arguments]:
    """Pictures, one after the other."""
    channels = _config(model, "num_channels", "in_channels", "in_chans", default=3)
    frames = _config(model, "num_frames", "frames_per_clip", default=_FRAMES)
    return [{"pixel_values_videos": _noise(model, frames, channels, *_size(model))}]


def _features(model: PreTrainedModel) -> list[Arguments]:
    """A spectrogram, with its frames on the last axis or on the one before, as long as a model may want."""
    stated = _config(model, *_BINS, default=80)
    longest = 2 * _config(model, "max_source_positions", default=50)
    mask = torch.ones(BATCH, longest, dtype=torch.long)
    made: list[Arguments] = []
    for shape in ((stated, longest), (longest, stated), (longest, 128)):
        made.append({"input_features": _noise(model, *shape)})
        made.append({**made[-1], "attention_mask": mask, "input_features_mask": mask.bool()})
    return made


def _sounds(model: PreTrainedModel) -> list[Arguments]:
    """A wave, with or without an axis of channels, or a spectrogram."""
    frames = _config(model, "max_length", default=_SAMPLES)
    bins = _config(model, *_BINS, default=80)
    return [{"input_values": _noise(model, *shape)} for shape in ((_SAMPLES,), (1, _SAMPLES), (frames, bins))]


MAKERS: Final[Mapping[str, Callable[[PreTrainedModel], list[Arguments]]]] = {
    "grid_thw": packed,
    "image_grid_thw": packed,
    "input_ids": _tokens,
    "pixel_values": pictures,
    "pixel_values_videos": _films,
    "input_features": _features,
    "input_values": _sounds,
}
"""By the name of an argument, ways to make it together with what belongs to it."""


def _config(model: PreTrainedModel, *names: str, default: int) -> int:
    """The first of these numbers that the configuration, or one inside it, states."""
    for value in stated(model, *names):
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int):
            return value
    return default


def _size(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width of the pictures that a model takes."""
    for value in stated(model, "image_size", "input_size"):
        if isinstance(value, int):
            return value, value
        if isinstance(value, (list, tuple)) and len(value) == 2:
            return int(value[0]), int(value[1])
    return 64, 64  # of which backbones that halve it five times leave four positions


def stated(model: PreTrainedModel, *names: str) -> Iterator[Any]:
    """These fields of the configuration and of those inside it, as far as they are there."""
    waiting: list[Any] = [model.config]
    while waiting:
        config = waiting.pop(0)
        found = (getattr(config, name, None) for name in names)
        yield from (value for value in found if value is not None)
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", {}) or {}]


def _noise(model: PreTrainedModel, *shape: int) -> Tensor:
    drawn = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(model.dtype)
