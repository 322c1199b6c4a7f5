"""What a model is run on, where made-up tokens, a picture or a sound alone do not do.

By `model_type`, a batch of two as keyword arguments. Everything else `bind` finds by itself.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

_BATCH: Final = 2
_TOKENS: Final = 7


def example_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """Keyword arguments for one pass, or None where the model needs no help."""
    make = EXAMPLES.get(model.config.model_type) or EXAMPLES.get(type(model).__name__)
    return None if make is None else make(model.config)


def _tokens(length: int = _TOKENS, rows: int = _BATCH) -> Tensor:
    return torch.randint(8, 90, (rows, length), generator=torch.Generator().manual_seed(0))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _picture(*more: int) -> Tensor:
    return _noise(_BATCH, *more, 3, 32, 32)


def _with_picture_tokens(token: int, count: int) -> dict[str, Tensor]:
    """Text after as many placeholders as a picture takes."""
    ids = torch.cat([torch.full((_BATCH, count), token), _tokens()], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _queried(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "pixel_values": _picture(),
        **_with_picture_tokens(config.image_token_index, config.num_query_tokens),
    }


def _instructed(config: PreTrainedConfig) -> dict[str, Any]:
    return {**_queried(config), "qformer_input_ids": _tokens(5)}


def _instructed_film(config: PreTrainedConfig) -> dict[str, Any]:
    placeholders = _with_picture_tokens(config.video_token_index, 4 * config.num_query_tokens)
    return {"pixel_values": _picture(4), "qformer_input_ids": _tokens(5), **placeholders}


def _placed(config: PreTrainedConfig) -> dict[str, Any]:
    places = torch.zeros(_BATCH, _TOKENS + config.latent_query_num, dtype=torch.long)
    places[:, 1 : 1 + config.latent_query_num] = 1
    ids = _tokens(places.shape[1])
    mask = torch.ones_like(ids)
    return {
        "pixel_values": _picture(),
        "input_ids": ids,
        "attention_mask": mask,
        "image_embeds_position_mask": places,
    }


def _several_pictures(config: PreTrainedConfig) -> dict[str, Any]:
    ids = _tokens()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _picture(2),
        "image_attention_mask": torch.ones(_BATCH, _TOKENS, 2, dtype=torch.long),
    }


def _boxes(config: PreTrainedConfig) -> dict[str, Any]:
    ids = _tokens()
    corners = torch.rand(_BATCH, _TOKENS, 4, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "bbox": corners.sort(-1).values}


def _boxes_to_decode(config: PreTrainedConfig) -> dict[str, Any]:
    return {**_boxes(config), "decoder_input_ids": _tokens(5)}


def _flattened_patches(config: PreTrainedConfig) -> dict[str, Any]:
    patches = _noise(_BATCH, 6, 2 + config.vision_config.patch_embed_hidden_size)
    patches[:, :, 0], patches[:, :, 1] = torch.arange(6) // 3, torch.arange(6) % 3
    return {
        "flattened_patches": patches,
        "attention_mask": torch.ones(_BATCH, 6),
        "decoder_input_ids": _tokens(5),
    }


def _codebooks(config: PreTrainedConfig) -> dict[str, Any]:
    """One row of tokens per codebook."""
    count = getattr(config, "num_codebooks", None) or config.decoder.num_codebooks
    return {
        "input_ids": _tokens(rows=_BATCH * count),
        "attention_mask": torch.ones(_BATCH, _TOKENS, dtype=torch.long),
    }


def _queries(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "query_embeds": _noise(_BATCH, 8, config.hidden_size),
        "encoder_hidden_states": _noise(_BATCH, 5, config.encoder_hidden_size),
    }


def _decisions(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "states": _noise(_BATCH, 4, config.state_dim),
        "actions": _noise(_BATCH, 4, config.act_dim),
        "rewards": _noise(_BATCH, 4, 1),
        "returns_to_go": _noise(_BATCH, 4, 1),
        "timesteps": torch.arange(4).expand(_BATCH, 4),
        "attention_mask": torch.ones(_BATCH, 4, dtype=torch.long),
    }


def _regions(config: PreTrainedConfig) -> dict[str, Any]:
    """Text and what a detector saw in a picture."""
    ids = _tokens()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "visual_feats": _noise(_BATCH, 4, config.visual_feat_dim),
        "visual_pos": torch.rand(_BATCH, 4, 4, generator=torch.Generator().manual_seed(0)),
    }


def _embedded(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "input_values": _noise(_BATCH, _TOKENS, config.hidden_size),
        "decoder_input_values": _noise(_BATCH, 5, config.hidden_size),
    }


def _series(config: PreTrainedConfig) -> dict[str, Any]:
    return {"past_values": _noise(_BATCH, config.context_length, config.num_input_channels)}


def _forecast(config: PreTrainedConfig) -> dict[str, Any]:
    """A series that is known as far back as the model's lags reach, and what it is to foretell."""
    known, coming = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": _noise(_BATCH, known),
        "past_time_features": _noise(_BATCH, known, config.num_time_features),
        "past_observed_mask": torch.ones(_BATCH, known),
        "future_values": _noise(_BATCH, coming),
        "future_time_features": _noise(_BATCH, coming, config.num_time_features),
    }


def _captioned(config: PreTrainedConfig) -> dict[str, Any]:
    ids = _tokens()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _picture()}


def _phrases(config: PreTrainedConfig) -> dict[str, Any]:
    """A picture, and text whose tokens attend to each other as far as the next end of a phrase."""
    captioned = _captioned(config)
    captioned["input_ids"][:, 4] = 102
    return captioned


def _channels_to_decode(config: PreTrainedConfig) -> dict[str, Any]:
    """Text, and sound tokens in several channels."""
    ids = _tokens()
    channels = config.decoder_config.num_channels
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": _tokens(5 * channels).unflatten(1, (5, channels)),
        "use_cache": False,
    }


def _placed_patches(config: PreTrainedConfig) -> dict[str, Any]:
    """Patches of a picture, and where each lies in it."""
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).flatten(0, 1)
    return {
        "pixel_values": _noise(_BATCH, 36, 3 * config.patch_size**2),
        "pixel_position_ids": places.expand(_BATCH, -1, -1),
    }


def _frames(config: PreTrainedConfig) -> dict[str, Any]:
    size = getattr(config, "input_size", None) or config.num_mel_bins
    return {"input_features": _noise(_BATCH, 16, size), "input_features_mask": torch.ones(_BATCH, 16).bool()}


def _mel(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "audio_mel": _noise(_BATCH, 32, config.input_feat_size),
        "audio_mel_mask": torch.zeros(_BATCH, 32, dtype=torch.bool),
    }


def _stacked_frames(config: PreTrainedConfig) -> dict[str, Any]:
    config = getattr(config, "encoder_config", config)
    return {"input_features": _noise(_BATCH, 16, 4 * config.num_mel_bins)}


def _rectified(config: PreTrainedConfig) -> dict[str, Any]:
    """The patches of pictures side by side, and how many there are in height and width of each."""
    patch = config.patch_size
    return {
        "pixel_values": _noise(1, 3, patch, patch * _BATCH * 16),
        "target_sizes": torch.full((_BATCH, 2), 4),
    }


def _hidden(config: PreTrainedConfig) -> dict[str, Any]:
    """A picture of which the same patches are hidden each time."""
    count = (config.image_size // config.patch_size) ** 2
    noise = torch.linspace(0, 1, count).flip(0).expand(_BATCH, count)
    return {"pixel_values": _picture(), "noise": noise}


def _waves(config: PreTrainedConfig) -> dict[str, Any]:
    return {"input_values": _noise(_BATCH, 2048)}


def _even_frames(config: PreTrainedConfig) -> dict[str, Any]:
    return {"input_features": _noise(_BATCH, 32, 128), "input_features_mask": torch.ones(_BATCH, 32).bool()}


def _two_by_two(config: PreTrainedConfig) -> dict[str, Any]:
    """The pixels of pictures, four patches after four patches."""
    width = 2 * config.patch_size
    return {
        "pixel_values": _noise(_BATCH * 16, width, width, 3),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * _BATCH),
    }


def _known_values(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "past_values": _noise(_BATCH, 4 * config.patch_length),
        "past_values_padding": torch.zeros(_BATCH, 4 * config.patch_length, dtype=torch.long),
        "freq": torch.zeros(_BATCH, 1, dtype=torch.long),
    }


def _large_picture(config: PreTrainedConfig) -> dict[str, Any]:
    return {"pixel_values": _noise(_BATCH, 3, 64, 64)}


def _described(config: PreTrainedConfig) -> dict[str, Any]:
    """Text, and a picture of the size that the backbone of the vision tower takes."""
    size = config.vision_config.backbone_config.image_size
    return {**_captioned(config), "pixel_values": _noise(_BATCH, 3, size, size)}


def _heard(config: PreTrainedConfig) -> dict[str, Any]:
    """Text, and a sound that is no longer than the model takes."""
    ids = _tokens()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": _noise(_BATCH, 1, 256, config.audio_config.num_mel_bins),
        "is_longer": torch.zeros(_BATCH, 1, dtype=torch.bool),
    }


def _large_and_pointed_at(config: PreTrainedConfig) -> dict[str, Any]:
    return {**_pointed_at(config), **_large_picture(config)}


def _pointed_at(config: PreTrainedConfig) -> dict[str, Any]:
    """A picture, and a point in it."""
    return {"pixel_values": _picture(), "input_points": torch.full((_BATCH, 1, 1, 2), 12.0)}


def _array(config: PreTrainedConfig) -> dict[str, Any]:
    return {"inputs": _noise(_BATCH, 10, config.d_model)}


EXAMPLES: Final[Mapping[str, Callable[[PreTrainedConfig], dict[str, Any]]]] = {
    "MusicgenForCausalLM": _codebooks,
    "MusicgenMelodyForCausalLM": _codebooks,
    "PerceiverModel": _array,
    "align": _captioned,
    "autoformer": _forecast,
    "blip-2": _queried,
    "blip_2_qformer": _queries,
    "bros": _boxes,
    "clap": _heard,
    "decision_transformer": _decisions,
    "dia": _channels_to_decode,
    "fun_asr_nano_encoder": _frames,
    "gemma3n_audio": _mel,
    "gemma4_vision": _placed_patches,
    "granite_speech5_ctc": _stacked_frames,
    "granite_speech5_encoder": _stacked_frames,
    "informer": _forecast,
    "time_series_transformer": _forecast,
    "grounding-dino": _phrases,
    "idefics": _several_pictures,
    "instructblip": _instructed,
    "instructblipvideo": _instructed_film,
    "inkling2_vision": _two_by_two,
    "kosmos-2": _placed,
    "lw_detr": _large_picture,
    "lxmert": _regions,
    "mask2former": _large_picture,
    "maskformer": _large_picture,
    "minicpm_ocr_vision": _rectified,
    "minicpmv4_7_vision": _rectified,
    "mm-grounding-dino": _phrases,
    "muse_spark_audio": _waves,
    "nemotron3_5_transcribe_audio": _even_frames,
    "patchtsmixer": _series,
    "patchtst": _series,
    "pix2struct": _flattened_patches,
    "sam": _pointed_at,
    "sam2": _large_and_pointed_at,
    "sam2_hiera_det_model": _large_picture,
    "sam2_vision_model": _large_picture,
    "sam3": _described,
    "sam3_lite_text": _described,
    "speecht5": _embedded,
    "timesfm": _known_values,
    "udop": _boxes_to_decode,
    "vit_mae": _hidden,
}
"""By `model_type`, or by the name of a class where others of that type need none."""
