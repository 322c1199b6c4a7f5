"""Inputs on which a model can be traced: a few tokens, a small picture, a little sound."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hookgraph.binding.inputs import device_of, embedding_of, vocabulary_size
from hookgraph.errors import BindingError

_TOKENS = 7
_BATCH = 2


def example_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments for one forward pass, always the same ones.

    Raises:
        BindingError: the model takes no tokens, picture or sound; give `example` to `bind`.
    """
    accepted = inspect.signature(model.forward).parameters
    makers: dict[str, Callable[[PreTrainedModel], Tensor]] = {
        "input_ids": _token_ids,
        "pixel_values": _picture,
        "input_features": _sound_features,
        "input_values": _sound,
    }
    name = model.main_input_name if model.main_input_name in makers else "input_ids"
    name = name if name in accepted else next((n for n in makers if n in accepted), "")
    if not name:
        raise BindingError(
            f"{type(model).__name__} takes none of {', '.join(makers)}: give bind(model, example=...) "
            "keyword arguments on which it can be run"
        )
    inputs: dict[str, Any] = {name: makers[name](model)}
    if name == "input_ids" and "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(inputs[name])
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _token_ids(model)[:, :-2]
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    device = device_of(model)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _token_ids(model: PreTrainedModel) -> Tensor:
    known = vocabulary_size(model, embedding_of(model))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(8, known - 1), max(9, known - 8), (_BATCH, _TOKENS), generator=generator)


def _config(model: PreTrainedModel, *names: str, default: int) -> int:
    """The first of these numbers that the configuration, or one inside it, states."""
    config: Any = model.config
    inner = [getattr(config, n, None) for n in getattr(config, "sub_configs", {}) or {}]
    for place in (config, *inner):
        for name in names:
            value = getattr(place, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
    return default


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _picture(model: PreTrainedModel) -> Tensor:
    size = _config(model, "image_size", default=32)
    picture = _noise(_BATCH, _config(model, "num_channels", "in_channels", default=3), size, size)
    return picture.to(model.dtype)


def _sound_features(model: PreTrainedModel) -> Tensor:
    bins = _config(model, "num_mel_bins", "feature_size", default=80)
    frames = 2 * _config(model, "max_source_positions", default=50)
    return _noise(_BATCH, bins, frames).to(model.dtype)


def _sound(model: PreTrainedModel) -> Tensor:
    return _noise(_BATCH, 2000).to(model.dtype)


def one_row(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The first of `batch` examples. An example may take several rows, as one per codebook."""
    return {
        k: v[: max(1, v.shape[0] // max(1, batch))] if isinstance(v, Tensor) and v.ndim else v
        for k, v in inputs.items()
    }
