"""What models of several parts need beyond the rules, so that the parts are small and fit each other.

By `model_type`, as in `overrides`.
"""

from collections.abc import Mapping
from typing import Any, Final

from hookgraph_tests.tiny.rules import WIDTH

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
    "maskformer": {"backbone_config": _SWIN, "fpn_feature_size": WIDTH, "mask_feature_size": WIDTH},
    "sam2_hiera_det_model": _HIERARCHY,
    "sam2_vision_model": {
        "backbone_config": _HIERARCHY,
        "backbone_channel_list": [32, 24, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": WIDTH,
    },
    "sam3": _TOWERS,
    "sam3_lite_text": _TOWERS,
}
