"""What an architecture needs beyond the rules: by `model_type`, the fields of its configuration.

A field that is `UNSET` keeps its default. The configuration inside another is a mapping of its own fields;
with a `model_type` where any class would do.
"""

from collections.abc import Mapping
from typing import Any, Final

from hookgraph_tests.tiny.detectors import DETECTORS
from hookgraph_tests.tiny.rules import EXPERTS, HEAD_WIDTH, HEADS, NEURONS, PICTURE, VOCABULARY, WIDTH
from hookgraph_tests.tiny.seeing import SEEING
from hookgraph_tests.tiny.towers import TOWERS

UNSET: Final = object()

_ROPE: Final = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONS: Final = {**_ROPE, "mrope_section": [2, 1, 1]}
_GRANITE: Final = {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 4.0}
_ALTERNATING: Final = ["sliding_attention", "full_attention"] * 2
_MIXED: Final = ["linear_attention", "full_attention"]
_SHARING: Final = {
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 4,
    "layer_types": _ALTERNATING,
    "global_head_dim": 2 * HEAD_WIDTH,
}
_HYBRID: Final = ["linear_attention", "hybrid"] * 2

_WINDOWED: Final = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
_ALL_HEADS: Final = (
    "dots3_note_text",
    "esmc",
    "moonshine_streaming",
    "nemotron3_5_transcribe_asr_audio",
    "nemotron3_diarization_audio",
)
"""Each of their heads has keys and values of its own, whatever the number of these may be."""
_SLIM: Final = {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 8, *[32] * 5], "expand_ratio": 2.0}
_SHORT: Final = {"speaking_speed": 0.01, "model_config": {"speaking_speed": 0.01}}
_SECTIONED: Final = (
    "cosmos3_edge_text",
    "glm4v_text",
    "glm_image_text",
    "glm_ocr_text",
    "hunyuan_vl_text",
    "paddleocr_vl_text",
    "qwen2_5_omni_text",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
)

OVERRIDES: Final[Mapping[str, Mapping[str, Any]]] = {
    **DETECTORS,
    **SEEING,
    **TOWERS,
    # Layers of several kinds
    "bailing_hybrid": {"layer_group_size": 2, "layer_types": _MIXED},
    "bamba": {"attn_layer_indices": [1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_hidden_layers": UNSET},
    "hrm_text": {"num_hidden_layers": 2, "H_cycles": 1, "L_cycles": 2, "prefix_lm": False},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "pegasus_x": {"block_size": 4},
    "kimi_linear": {"layer_types": _MIXED},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": _HYBRID,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "num_key_value_heads": HEADS,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": _HYBRID,
        "n_mamba_heads": 4,
        "num_key_value_heads": HEADS,
        "head_dim": UNSET,
        "mamba_ngroups": 1,
    },
    # Mixers
    "mamba2": {"num_heads": HEADS, "head_dim": 16, "expand": 2, "n_groups": 2},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 90,
        "vision_end_token_id": 91,
        "vision_config": {"window_size": PICTURE},
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 90, "vision_end_token_id": 91},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_WIDTH,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "num_hidden_layers": 3,
        "hc_count": 2,
    },
    "xlstm": {
        "hidden_size": 2 * WIDTH,
        "num_heads": HEADS,
        "qk_dim_factor": 1.0,
        "v_dim_factor": 1.0,
        "chunk_size": 7,
        "ffn_round_up_to_multiple_of": 8,
        "mode": "train",
    },
    # Attention
    "neomme": {"head_dim": 16},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh", "local"],
        "num_hidden_layers": 3,
        "num_buckets": 4,
        "lsh_attn_chunk_length": 7,
        "local_attn_chunk_length": 7,
    },
    # Experts
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": WIDTH,
            "ffn_hidden_size": NEURONS,
            "moe_num_experts": EXPERTS,
            "moe_top_k": 2,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "granitemoehybrid": {
        **_GRANITE,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_hidden_layers": 3,
        "mamba_n_heads": 4,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "mamba_d_head": 16,
    },
    # Multipliers and caps that the defaults leave out
    "gemma2": {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3_text": {"final_logit_softcapping": 10.0},
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoeshared": _GRANITE,
    # Keys and values shared between layers
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": _ALTERNATING,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [NEURONS] * 4,
    },
    "gemma4_text": _SHARING,
    "gemma4_unified_text": _SHARING,
    # Tokens and languages
    "esm": {
        "vocab_size": VOCABULARY,
        "pad_token_id": 1,
        "mask_token_id": 5,
        "position_embedding_type": "rotary",
    },
    "xmod": {"default_language": "en_XX"},
    # Positions of several axes
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _SECTIONS, "sliding_attention": _SECTIONS},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    **{name: {"rope_parameters": _SECTIONS} for name in _SECTIONED},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "glm4v_moe_text": {"rope_parameters": _SECTIONS, "head_dim": 16},
    # In their last layers one position would be left of a smaller picture
    **{name: {"image_size": 2 * PICTURE} for name in ("glpn", "pvt_v2", "segformer")},
    "pp_formulanet_vision": {"image_size": 3 * PICTURE, "output_channels": WIDTH},
    "mobilevit": {"image_size": 3 * PICTURE, **_SLIM},
    "videoprism_vision_model": {"image_size": 36},  # of patches of 18
    # Parts that have to fit each other
    "audio-spectrogram-transformer": {"max_length": 64},
    "mgp-str": {"image_size": [32, 64]},
    "blt": {"encoder_hash_byte_group_size": [3, 4], "encoder_config": {"hidden_size": WIDTH}},
    "chameleon": {
        "vocabulary_map": {"<image>": 100, "IMGIMGA": 101},
        "vq_config": {
            "base_channels": WIDTH,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "resolution": PICTURE,
            "embed_dim": WIDTH,
            "latent_channels": WIDTH,
            "num_embeddings": 16,
        },
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {
        "global_head_dim": 2 * HEAD_WIDTH,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": NEURONS,
    },
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense", "sparse"]},
        "audio_config": {"num_key_value_heads": HEADS},
    },
    "emu3": {
        "vocabulary_map": {"<image>": 100, "<|visual token 000000|>": 101},
        "vq_config": {
            "base_channels": WIDTH,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "embed_dim": WIDTH,
            "latent_channels": WIDTH,
            "z_channels": WIDTH,
            "codebook_size": 16,
        },
    },
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        }
    },
    "gemma3n_audio": {"conf_num_hidden_layers": 2},
    "glm5_next_text": {"index_topk": 16},
    "granite4_vision": {
        "vision_config": {"hidden_size": 2 * WIDTH},
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "downsample_rate": "1/2",
        "image_grid_pinpoints": [[PICTURE, 2 * PICTURE]],
    },
    "granite_speech5_encoder": {
        "context_size": 8,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": 4,
        "subsample_layers": [0],
    },
    "bros": {"hidden_size": 2 * WIDTH},
    "mimi": {"num_filters": 4, "num_quantizers": 4, "codebook_size": 16},
    "moshi": {"num_codebooks": 4},
    "pocket_tts_audio_tokenizer": {"num_filters": 4},
    "levit": {
        "image_size": 128,
        "patch_size": 16,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
    },
    "exaone4_5_vision": {"window_size": PICTURE},
    "qwen2_5_vl_vision": {"window_size": PICTURE},
    "informer": {"prediction_length": 4, "input_size": 1},
    "autoformer": {"prediction_length": 4, "context_length": 8, "input_size": 1, "label_length": 2},
    "time_series_transformer": {"prediction_length": 4, "input_size": 1},
    "inkling2_text": {
        "n_layers_per_attn_res_block": 2,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "inkling2": {"vision_config": {"text_hidden_size": WIDTH}},
    **{name: {"num_key_value_heads": HEADS} for name in _ALL_HEADS},
    "mimi_decoder": {"num_filters": 4, "upsampling_ratios": [2, 2]},
    "muse_glimmer_assistant": {"sliding_window": 64, "target_layer_ids": [0, 1]},
    "pi0": {
        "vlm_config": {
            "text_config": {"model_type": "gemma"},
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
            "image_token_id": 100,
        },
        "chunk_size": 4,
    },
    "kyutai_speech_to_text": {"num_codebooks": 2, "codebook_vocab_size": 16, "audio_pad_token_id": 160},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {
        "num_hidden_layers": 4,
        "patch_sizes": [4, 2, 2, 2],
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
    },
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "nemotron_h_omni": {"audio_config": None, "vision_hidden_size": WIDTH, "projector_hidden_size": NEURONS},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    **dict.fromkeys(("donut-swin", "maskformer-swin", "swin", "swin2sr", "swinv2"), _WINDOWED),
    **{
        name: {
            "t2u_pad_token_id": 0,
            "t2u_bos_token_id": 1,
            "t2u_eos_token_id": 2,
            "vocoder_offset": 4,
            "unit_embed_dim": WIDTH,
        }
        for name in ("seamless_m4t", "seamless_m4t_v2")
    },
    "bridgetower": {
        "hidden_size": 64,
        "text_config": {"hidden_size": 64},
        "vision_config": {"hidden_size": 64},
    },
    "dia": {
        "decoder_config": {
            "cross_hidden_size": WIDTH,
            "cross_head_dim": HEAD_WIDTH,
            "cross_num_attention_heads": HEADS,
            "cross_num_key_value_heads": HEADS,
        }
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "lilt": {"hidden_size": 48},
    # Parts that are large by default
    "florence_vision": {
        "embed_dim": [16, 16, 32, 32],
        "num_heads": [2, 2, 4, 4],
        "num_groups": [2, 2, 4, 4],
        "depths": [1, 1, 1, 1],
    },
    "janus_vqgan": {"base_channels": WIDTH, "channel_multiplier": [1, 1]},
    **{
        name: {
            "hidden_size": 16,
            "num_filters": 4,
            "downsampling_ratios": [2, 2],
            "depths": [1, 1, 1],
        }
        for name in (
            "vibevoice_acoustic_tokenizer",
            "vibevoice_acoustic_tokenizer_encoder",
            "vibevoice_acoustic_tokenizer_decoder",
        )
    },
    "seggpt": {
        "image_size": [2 * PICTURE, PICTURE],
        "pretrain_image_size": PICTURE,
        "intermediate_hidden_state_indices": [0, 1],
        "num_hidden_layers": 3,
        "merge_index": 0,
    },
    "cvt": {"embed_dim": [32, 48, 96], "num_heads": [1, 3, 6], "depth": [1, 2, 4]},
    "pvt": {
        "image_size": 2 * PICTURE,
        "hidden_sizes": [16, 16, 32, 32],
        "num_attention_heads": [1, 2, 2, 4],
        "depths": [1, 1, 1, 1],
        "mlp_ratios": [2, 2, 2, 2],
    },
    "qwen3_asr_encoder": {"downsample_hidden_size": 8},
    # Tokens sound shortly, and each time the same.
    **dict.fromkeys(("fastspeech2_conformer", "fastspeech2_conformer_with_hifigan"), _SHORT),
    "vits": {
        "hidden_size": 32,
        "flow_size": 32,
        "spectrogram_bins": 16,
        "upsample_initial_channel": 16,
        "upsample_rates": [4, 4],
        "upsample_kernel_sizes": [8, 8],
        "duration_predictor_filter_channels": 16,
        "duration_predictor_num_flows": 2,
        "prior_encoder_num_flows": 2,
        "prior_encoder_num_wavenet_layers": 2,
        "posterior_encoder_num_wavenet_layers": 2,
        "use_stochastic_duration_prediction": False,
        "speaking_rate": 100.0,
        "noise_scale": 0.0,
    },
    "xclip": {
        "projection_dim": WIDTH,
        "vision_config": {"mit_hidden_size": WIDTH, "mit_intermediate_size": NEURONS, "num_frames": 2},
    },
    "univnet": {
        "model_hidden_channels": 4,
        "kernel_predictor_hidden_channels": 4,
        "model_in_channels": 4,
        "resblock_kernel_sizes": [3, 3],
        "resblock_stride_sizes": [4, 4],
        "resblock_dilation_sizes": [[1, 3], [1, 3]],
    },
    "vjepa2": {"pred_hidden_size": WIDTH, "pred_num_attention_heads": HEADS, "pred_num_hidden_layers": 2},
    "step3p5": {"sliding_window": 4},
}
