"""What detectors of objects and of masks need beyond the rules: a small backbone, and widths that fit it.

By `model_type`, as in `overrides`.
"""

from collections.abc import Mapping
from typing import Any, Final

from hookgraph_tests.tiny.rules import WIDTH

_RESNET: Final = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
_DETECTED: Final = {"backbone_config": {**_RESNET, "out_features": ["stage4"]}}
_HGNET: Final = {
    "stem_channels": [3, 4, 4],
    "stage_in_channels": [4, 8, 16, 16],
    "stage_mid_channels": [4, 4, 4, 4],
    "stage_out_channels": [8, 16, 16, 16],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 16, 16],
    "embedding_size": 4,
    "depths": [1, 1, 1, 1],
}
_HYBRID_DETECTOR: Final = {
    "encoder_in_channels": [16, 16, 16],
    "encoder_hidden_dim": WIDTH,
    "decoder_in_channels": [WIDTH, WIDTH, WIDTH],
    "num_denoising": 0,
}
_SWIN: Final = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
_GROUNDED: Final = {"backbone_config": {**_SWIN, "out_indices": [2, 3, 4]}, "d_model": 64}
_MASKED: Final = {
    "backbone_config": {**_SWIN, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    "feature_size": WIDTH,
    "mask_feature_size": WIDTH,
}

DETECTORS: Final[Mapping[str, Mapping[str, Any]]] = {
    **dict.fromkeys(("conditional_detr", "dab-detr", "detr"), _DETECTED),
    "deformable_detr": {
        "backbone_config": {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]},
        "d_model": 64,
    },
    **{
        name: {**_HYBRID_DETECTOR, "backbone_config": {k: v for k, v in _RESNET.items() if k != "model_type"}}
        for name in ("rt_detr", "rt_detr_v2")
    },
    **{
        name: {**_HYBRID_DETECTOR, "backbone_config": _HGNET}
        for name in ("d_fine", "deimv2", "pp_doclayout_v4")
    },
    "pp_doclayout_v3": {**_HYBRID_DETECTOR, "backbone_config": _HGNET, "x4_feat_dim": 8},
    **dict.fromkeys(("grounding-dino", "mm-grounding-dino"), _GROUNDED),
    "mask2former": _MASKED,
    "oneformer": {**_MASKED, "conv_dim": WIDTH, "hidden_dim": WIDTH, "mask_dim": WIDTH},
    "rf_detr": {"backbone_config": {"num_hidden_layers": 2, "out_indices": [1, 2], "num_windows": 4}},
    "sam": {
        "vision_config": {"output_channels": WIDTH, "num_pos_feats": WIDTH // 2, "global_attn_indexes": [1]},
        "mask_decoder_config": {"iou_head_hidden_dim": WIDTH},
    },
}
