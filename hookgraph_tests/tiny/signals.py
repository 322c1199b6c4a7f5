"""What models of sounds and of time series are run on, where made-up tokens or a sound alone do not do.

By `model_type`, as in `inputs`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from transformers import PreTrainedConfig

from hookgraph_tests.tiny.made_up import BATCH, TOKENS, noise, tokens


def _codebooks(config: PreTrainedConfig) -> dict[str, Any]:
    """One row of tokens per codebook."""
    count = getattr(config, "num_codebooks", None) or config.decoder.num_codebooks
    return {
        "input_ids": tokens(rows=BATCH * count),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
    }


def _embedded(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "input_values": noise(BATCH, TOKENS, config.hidden_size),
        "decoder_input_values": noise(BATCH, 5, config.hidden_size),
    }


def _series(config: PreTrainedConfig) -> dict[str, Any]:
    return {"past_values": noise(BATCH, config.context_length, config.num_input_channels)}


def _forecast(config: PreTrainedConfig) -> dict[str, Any]:
    """A series that is known as far back as the model's lags reach, and what it is to foretell."""
    known, coming = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": noise(BATCH, known),
        "past_time_features": noise(BATCH, known, config.num_time_features),
        "past_observed_mask": torch.ones(BATCH, known),
        "future_values": noise(BATCH, coming),
        "future_time_features": noise(BATCH, coming, config.num_time_features),
    }


def _channels_to_decode(config: PreTrainedConfig) -> dict[str, Any]:
    """Text, and sound tokens in several channels."""
    ids = tokens()
    channels = config.decoder_config.num_channels
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": tokens(5 * channels).unflatten(1, (5, channels)),
        "use_cache": False,
    }


def _frames(config: PreTrainedConfig) -> dict[str, Any]:
    size = getattr(config, "input_size", None) or config.num_mel_bins
    return {"input_features": noise(BATCH, 16, size), "input_features_mask": torch.ones(BATCH, 16).bool()}


def _mel(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "audio_mel": noise(BATCH, 32, config.input_feat_size),
        "audio_mel_mask": torch.zeros(BATCH, 32, dtype=torch.bool),
    }


def _stacked_frames(config: PreTrainedConfig) -> dict[str, Any]:
    config = getattr(config, "encoder_config", config)
    return {"input_features": noise(BATCH, 16, 4 * config.num_mel_bins)}


def _waves(config: PreTrainedConfig) -> dict[str, Any]:
    return {"input_values": noise(BATCH, 2048)}


def _even_frames(config: PreTrainedConfig) -> dict[str, Any]:
    return {"input_features": noise(BATCH, 32, 128), "input_features_mask": torch.ones(BATCH, 32).bool()}


def _known_values(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "past_values": noise(BATCH, 4 * config.patch_length),
        "past_values_padding": torch.zeros(BATCH, 4 * config.patch_length, dtype=torch.long),
        "freq": torch.zeros(BATCH, 1, dtype=torch.long),
    }


def _heard(config: PreTrainedConfig) -> dict[str, Any]:
    """Text, and a sound that is no longer than the model takes."""
    ids = tokens()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": noise(BATCH, 1, 256, config.audio_config.num_mel_bins),
        "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
    }


def _known(config: PreTrainedConfig) -> dict[str, Any]:
    return {"past_values": noise(BATCH, 4 * config.patch_length)}


def _text_and_frames(config: PreTrainedConfig) -> dict[str, Any]:
    """Tokens, and as many frames of a sound as are heard while they are spoken."""
    frames = TOKENS * config.audio_length_per_tok
    return {"input_ids": tokens(), "input_features": noise(BATCH, config.audio_config.num_mel_bins, frames)}


def _text_beside_codebooks(config: PreTrainedConfig) -> dict[str, Any]:
    ids = tokens(TOKENS * (1 + config.num_codebooks)).unflatten(1, (TOKENS, -1)) % 16
    return {"input_ids": ids, "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)}


def _sound_and_spectrogram(config: PreTrainedConfig) -> dict[str, Any]:
    frames = 8
    return {
        "input_values": noise(BATCH, 1, frames * config.hop_length),
        "input_features": noise(BATCH, frames, config.semantic_model_config.feature_projection_input_dim),
    }


def _spoken(config: PreTrainedConfig) -> dict[str, Any]:
    return {"input_ids": tokens(), "input_features": noise(BATCH, config.decoder_config.feature_size, 32)}


def _latents(config: PreTrainedConfig) -> dict[str, Any]:
    return {"latents": noise(BATCH, getattr(config, "latent_dim", config.hidden_size), 4)}


def _heard_before(config: PreTrainedConfig) -> dict[str, Any]:
    return {"inputs_embeds": noise(BATCH, 8, config.hidden_size)}


SIGNALS: Final[Mapping[str, Callable[[PreTrainedConfig], dict[str, Any]]]] = {
    "MusicgenForCausalLM": _codebooks,
    "MusicgenMelodyForCausalLM": _codebooks,
    "autoformer": _forecast,
    "clap": _heard,
    "dia": _channels_to_decode,
    "fun_asr_nano_encoder": _frames,
    "gemma3n_audio": _mel,
    "granite_speech5_ctc": _stacked_frames,
    "granite_speech5_encoder": _stacked_frames,
    "informer": _forecast,
    "time_series_transformer": _forecast,
    "mimi_decoder": _latents,
    "pocket_tts_audio_tokenizer_decoder": _latents,
    "nemotron3_5_transcribe_word_timestamp": _heard_before,
    "muse_spark_audio": _waves,
    "nemotron3_5_transcribe_audio": _even_frames,
    "patchtsmixer": _series,
    "patchtst": _series,
    "speecht5": _embedded,
    "timesfm": _known_values,
    "timesfm2_5": _known,
    "clvp": _spoken,
    "neucodec": _sound_and_spectrogram,
    "xcodec2": _sound_and_spectrogram,
    "kyutai_speech_to_text": _text_beside_codebooks,
    "voxtral_realtime": _text_and_frames,
}
