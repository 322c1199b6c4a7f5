"""Language models that see: by `model_type`, what makes their towers fit tiny pictures and tiny text."""

from collections.abc import Mapping
from typing import Any, Final

from hookgraph_tests.tiny.rules import PATCH, PICTURE, WIDTH

SEEING: Final[Mapping[str, Mapping[str, Any]]] = {
    "aria": {"projector_patch_to_query_dict": {(PICTURE // PATCH) ** 2: 4}},
    **{name: {"mm_tokens_per_image": 4} for name in ("gemma3", "shieldgemma2")},
    "kimi_k25": {"projection_hidden_size": WIDTH},
    "llama4": {
        "vision_config": {
            "intermediate_size": 4 * WIDTH,
            "projector_input_dim": WIDTH,
            "projector_output_dim": WIDTH,
            "vision_output_dim": WIDTH,
        }
    },
    **{name: {"out_hidden_size": 4 * WIDTH} for name in ("muse_glimmer", "muse_spark")},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    **{
        name: {"image_grid_pinpoints": [[PICTURE, 2 * PICTURE]]}
        for name in ("llava_next", "llava_next_video", "llava_onevision")
    },
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "blip-2": {"image_token_index": 100},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
}
