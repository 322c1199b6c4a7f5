"""Inputs on which a model can be traced: a few tokens, a small picture, a little sound.

What a model is given is told by the names of its arguments; of what shape, by trying.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hookgraph.binding.running.inputs import device_of, embedding_of, vocabulary_size
from hookgraph.errors import BindingError

_TOKENS: Final = 7
_BATCH: Final = 2
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


def example_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments for one forward pass, always the same ones: the first that the model can be run on.

    Raises:
        BindingError: it can be run on no tokens, picture or sound; give `example` to `bind`.
    """
    first: Exception | None = None
    for candidate in candidates(model):
        try:
            with torch.no_grad():
                model(**candidate)
            return candidate
        except Exception as error:  # whatever a model raises that is given what it was not made for
            first = first or error
    raise unrunnable(model, first) from first


def unrunnable(model: PreTrainedModel, error: Exception | None) -> BindingError:
    """What to raise for a model that runs on none of its examples; `error` is what the first one led to."""
    name = type(model).__name__
    if type(model).forward is PreTrainedModel.forward:
        inside = [n for n, part in model.named_children() if isinstance(part, PreTrainedModel)]
        bound = (
            f"the models inside it by themselves: {', '.join(inside)}" if inside else "a model that has one"
        )
        return BindingError(f"{name} has no forward pass: bind {bound}")
    if error is None:
        return BindingError(
            f"{name} takes none of {', '.join(_MAKERS)}: give bind(model, example=...) keyword arguments on "
            "which it can be run"
        )
    return BindingError(
        f"{name} is not a transformer that hookgraph can bind: running it on the example failed with "
        f"{type(error).__name__}: {error}; if it needs other inputs, give bind(model, example=...)"
    )


def candidates(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Examples to try, the simplest first: the main input alone, then what is required, then everything.

    A table of pictures is made together with the pictures.
    """
    parameters = inspect.signature(model.forward).parameters
    known = [name for name in _MAKERS if name in parameters]
    stated = model.main_input_name
    main = [n for n in ([stated] if isinstance(stated, str) else stated) if n in known]
    required = [n for n in known if parameters[n].default is inspect.Parameter.empty]
    tried: list[set[str]] = []
    tables = [n for n in required if _MAKERS[n] is _packed]
    for names in (tables, main or known[:1], [*main, *required], [*known[:1], *main, *required], known):
        if not names or set(names) in tried:
            continue
        tried.append(set(names))
        for made in product(*(_MAKERS[name](model) for name in dict.fromkeys(names))):
            arguments = {k: v for part in reversed(made) for k, v in part.items() if k in parameters}
            yield _completed(model, arguments, frozenset(parameters))


def _completed(model: PreTrainedModel, arguments: Arguments, accepted: frozenset[str]) -> dict[str, Any]:
    """The arguments on the model's device, with what a decoder reads and without a cache."""
    inputs: dict[str, Any] = dict(arguments)
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _token_ids(model)[:, :-2]
    device = device_of(model)
    inputs = {k: v.to(device) for k, v in inputs.items()}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _tokens(model: PreTrainedModel) -> list[Arguments]:
    ids = _token_ids(model)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def _token_ids(model: PreTrainedModel) -> Tensor:
    """Any tokens, and the one that ends a text: some models read their result there."""
    known = vocabulary_size(model, embedding_of(model))
    generator = torch.Generator().manual_seed(0)
    length = _TOKENS * _config(model, "downsampling_rate", default=1)
    ids = torch.randint(min(8, known - 1), max(9, known - 8), (_BATCH, length), generator=generator)
    end, padding = (_config(model, f"{x}_token_id", default=-1) for x in ("eos", "pad"))
    if 0 <= end < known and end != padding:
        ids[:, -1] = end
    return ids


def _pictures(model: PreTrainedModel) -> list[Arguments]:
    """A picture, a film of a few, or the patches of a picture."""
    height, width = _size(model)
    channels = _config(model, "num_channels", "in_channels", "in_chans", default=3)
    patch = _config(model, "patch_size", default=16)
    patches = {
        "pixel_values": _noise(model, _PATCHES, channels * patch**2),
        "pixel_attention_mask": torch.ones(_BATCH, _PATCHES, dtype=torch.long),
        "spatial_shapes": torch.tensor([[2, _PATCHES // 2]] * _BATCH),
    }
    frames = _config(model, "num_frames", default=_FRAMES)
    shapes = [(channels, height, width), (frames, channels, height, width)]
    return [*({"pixel_values": _noise(model, *shape)} for shape in shapes), patches]


def _packed(model: PreTrainedModel) -> list[Arguments]:
    """The patches of pictures one after another, and how many there are of each in time, height and width."""
    channels = _config(model, "num_channels", "in_channels", "in_chans", default=3)
    patch = _config(model, "patch_size", default=16)
    depth = _config(model, "temporal_patch_size", default=1)
    sizes = torch.tensor([[1, *_GRID]] * _BATCH)
    several = {
        "grid_thw": sizes,
        "image_grid_thw": sizes,
        "merge_sizes": torch.full((_BATCH,), _GRID[0] // 2),
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
    mask = torch.ones(_BATCH, longest, dtype=torch.long)
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


_MAKERS: Final[Mapping[str, Callable[[PreTrainedModel], list[Arguments]]]] = {
    "grid_thw": _packed,
    "image_grid_thw": _packed,
    "input_ids": _tokens,
    "pixel_values": _pictures,
    "pixel_values_videos": _films,
    "input_features": _features,
    "input_values": _sounds,
}
"""By the name of an argument, ways to make it together with what belongs to it."""


def _config(model: PreTrainedModel, *names: str, default: int) -> int:
    """The first of these numbers that the configuration, or one inside it, states."""
    for value in _stated(model, *names):
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int):
            return value
    return default


def _size(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width of the pictures that a model takes."""
    for value in _stated(model, "image_size", "input_size"):
        if isinstance(value, int):
            return value, value
        if isinstance(value, (list, tuple)) and len(value) == 2:
            return int(value[0]), int(value[1])
    return 64, 64  # of which backbones that halve it five times leave four positions


def _stated(model: PreTrainedModel, *names: str) -> Iterator[Any]:
    """These fields of the configuration and of those inside it, as far as they are there."""
    config: Any = model.config
    inner = [getattr(config, n, None) for n in getattr(config, "sub_configs", {}) or {}]
    for place in (config, *inner):
        for name in names:
            value = getattr(place, name, None)
            if value is not None:
                yield value


def _noise(model: PreTrainedModel, *shape: int) -> Tensor:
    drawn = torch.randn(_BATCH, *shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(model.dtype)


def one_row(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The first of `batch` examples. An example may take several rows, as one per codebook."""
    return {
        k: v[: max(1, v.shape[0] // max(1, batch))] if isinstance(v, Tensor) and v.ndim else v
        for k, v in inputs.items()
    }
