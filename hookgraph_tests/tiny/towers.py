"""What models of several parts need beyond the rules, so that the parts are small and fit each other.

By `model_type`, as in `overrides`.
"""

from collections.abc import Mapping
from typing import Any, Final

from hookgraph_tests.tiny.rules import HEADS, WIDTH

_HIERARCHY: Final = {
    "hidden_size": 8,
    "embed_dim_per_stage": [8, 16, 24, 32],
    "num_attention_heads_per_stage": [1, 2, 3, 4],
    "blocks_per_stage": [1, 1, 2, 1],
    "global_attention_blocks": [3],
    "window_size_per_stage": [8, 4, 4, 4],
    "window_positional_embedding_background_size": [8, 8],
    "num_query_pool_stages": 3,
    "query_stride": [2, 2],
    "image_size": [64, 64],
}
_SWIN: Final = {
    "model_type": "swin",
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 4,
    "image_size": 64,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_CODEC: Final = {
    "encoder_hidden_size": 4,
    "downsampling_ratios": [2, 2, 2, 2, 2],
    "num_key_value_heads": HEADS,
    "quantization_dim": 2 * WIDTH,
    "semantic_model_config": {"num_hidden_layers": 2},
}
_ROTATED: Final = {"hidden_size": 2 * WIDTH, "num_attention_heads": 2}
_TOWERS: Final = {"vision_config": {"fpn_hidden_size": WIDTH}}

TOWERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "align": {
        "projection_dim": WIDTH,
        "vision_config": {"hidden_dim": WIDTH, "width_coefficient": 0.1, "depth_coefficient": 0.1},
    },
    "clap": {
        "audio_config": {
            "patch_embeds_hidden_size": 8,
            "hidden_size": 64,
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "spec_size": 128,
            "num_mel_bins": 32,
            "enable_fusion": False,
            "window_size": 4,
            "patch_size": 4,
            "patch_stride": [4, 4],
        }
    },
    "lw_detr": {
        "backbone_config": {
            "num_hidden_layers": 2,
            "out_indices": [1, 2],
            "num_windows": 4,
            "window_block_indices": [0],
            "image_size": 64,
        },
        "d_model": WIDTH,
        "num_queries": 8,
        "group_detr": 1,
        "projector_scale_factors": [1.0],
    },
    "clvp": {
        "text_config": _ROTATED,
        "speech_config": _ROTATED,
        "decoder_config": {"decoder_fixing_codes": [83, 45, 45, 24]},
    },
    "depth_pro": {
        "patch_size": 16,
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [16, 16],
        "scaled_images_feature_dims": [16, 16, 16],
        "fusion_hidden_size": 16,
        **{f"{part}_model_config": {"image_size": 16, "patch_size": 4} for part in ("image", "patch", "fov")},
    },
    "efficientloftr": {
        "stage_num_blocks": [1, 1, 1, 1],
        "out_features": [8, 8, 16, WIDTH],
        "num_attention_layers": 2,
        "num_attention_heads": 8,
    },
    "lightglue": {
        "descriptor_dim": WIDTH,
        "keypoint_detector_config": {
            "encoder_hidden_sizes": [8, 8, 8, 16],
            "decoder_hidden_size": 16,
            "descriptor_decoder_dim": WIDTH,
            "keypoint_threshold": 0.0,
            "max_keypoints": 12,
        },
    },
    **dict.fromkeys(("neucodec", "xcodec2"), _CODEC),
    "maskformer": {"backbone_config": _SWIN, "fpn_feature_size": WIDTH, "mask_feature_size": WIDTH},
    "sam2_hiera_det_model": _HIERARCHY,
    "sam2_vision_model": {
        "backbone_config": _HIERARCHY,
        "backbone_channel_list": [32, 24, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": WIDTH,
    },
    "sam_hq": {
        "vision_config": {"output_channels": WIDTH, "num_pos_feats": WIDTH // 2, "global_attn_indexes": [1]},
        "mask_decoder_config": {"iou_head_hidden_dim": WIDTH, "vit_dim": WIDTH},
    },
    "tvp": {
        "backbone_config": {
            "hidden_sizes": [8, 16, 16, WIDTH],
            "depths": [1, 1, 1, 1],
            "embedding_size": 8,
            "out_features": ["stage4"],
        },
        "visual_prompt_size": 4,
        "max_img_size": 64,
        "num_frames": 2,
    },
    "sam3_tracker": {
        "vision_config": {
            "fpn_hidden_size": WIDTH,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        "mask_decoder_config": {"iou_head_hidden_dim": WIDTH},
    },
    "sam3": _TOWERS,
    "sam3_lite_text": _TOWERS,
}
