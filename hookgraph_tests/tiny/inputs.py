"""What a model is run on, where made-up tokens, a picture or a sound alone do not do.

By `model_type`, a batch of two as keyword arguments. Everything else `bind` finds by itself.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hookgraph_tests.tiny.made_up import BATCH, TOKENS, noise, tokens
from hookgraph_tests.tiny.signals import SIGNALS


def example_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """Keyword arguments for one pass, or None where the model needs no help."""
    make = EXAMPLES.get(model.config.model_type) or EXAMPLES.get(type(model).__name__)
    return None if make is None else make(model.config)


def _picture(*more: int) -> Tensor:
    return noise(BATCH, *more, 3, 32, 32)


def _with_picture_tokens(token: int, count: int) -> dict[str, Tensor]:
    """Text after as many placeholders as a picture takes."""
    ids = torch.cat([torch.full((BATCH, count), token), tokens()], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _tiled(config: PreTrainedConfig) -> dict[str, Any]:
    """Text after a picture that is given whole and in two tiles, and where its lines end."""
    sizes = {"image_sizes": torch.tensor([[32, 32]] * BATCH)}
    return {"pixel_values": _picture(3), **sizes, **_with_picture_tokens(config.image_token_index, 36)}


def _one_each(config: PreTrainedConfig) -> dict[str, Any]:
    """Text after a picture on an axis of its own, which takes one place."""
    there = torch.ones(BATCH, 1, dtype=torch.bool)
    return {
        "pixel_values": _picture(1),
        "pixel_attention_mask": there,
        **_with_picture_tokens(config.image_token_id, 1),
    }


def _placed_and_told(config: PreTrainedConfig) -> dict[str, Any]:
    """Text after the patches of a picture, of which nine become one place."""
    text = _with_picture_tokens(config.image_token_id, 4)
    seen = _placed_patches(config.vision_config)
    kinds = {"mm_token_type_ids": (text["input_ids"] == config.image_token_id).long()}
    return {
        "pixel_values": seen["pixel_values"],
        "image_position_ids": seen["pixel_position_ids"],
        **text,
        **kinds,
    }


def _queried(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "pixel_values": _picture(),
        **_with_picture_tokens(config.image_token_index, config.num_query_tokens),
    }


def _instructed(config: PreTrainedConfig) -> dict[str, Any]:
    return {**_queried(config), "qformer_input_ids": tokens(5)}


def _instructed_film(config: PreTrainedConfig) -> dict[str, Any]:
    placeholders = _with_picture_tokens(config.video_token_index, 4 * config.num_query_tokens)
    return {"pixel_values": _picture(4), "qformer_input_ids": tokens(5), **placeholders}


def _placed(config: PreTrainedConfig) -> dict[str, Any]:
    places = torch.zeros(BATCH, TOKENS + config.latent_query_num, dtype=torch.long)
    places[:, 1 : 1 + config.latent_query_num] = 1
    ids = tokens(places.shape[1])
    mask = torch.ones_like(ids)
    return {
        "pixel_values": _picture(),
        "input_ids": ids,
        "attention_mask": mask,
        "image_embeds_position_mask": places,
    }


def _several_pictures(config: PreTrainedConfig) -> dict[str, Any]:
    ids = tokens()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _picture(2),
        "image_attention_mask": torch.ones(BATCH, TOKENS, 2, dtype=torch.long),
    }


def _boxes(config: PreTrainedConfig) -> dict[str, Any]:
    ids = tokens()
    corners = torch.rand(BATCH, TOKENS, 4, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "bbox": corners.sort(-1).values}


def _boxes_to_decode(config: PreTrainedConfig) -> dict[str, Any]:
    return {**_boxes(config), "decoder_input_ids": tokens(5)}


def _flattened_patches(config: PreTrainedConfig) -> dict[str, Any]:
    patches = noise(BATCH, 6, 2 + config.vision_config.patch_embed_hidden_size)
    patches[:, :, 0], patches[:, :, 1] = torch.arange(6) // 3, torch.arange(6) % 3
    return {
        "flattened_patches": patches,
        "attention_mask": torch.ones(BATCH, 6),
        "decoder_input_ids": tokens(5),
    }


def _queries(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "query_embeds": noise(BATCH, 8, config.hidden_size),
        "encoder_hidden_states": noise(BATCH, 5, config.encoder_hidden_size),
    }


def _decisions(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "states": noise(BATCH, 4, config.state_dim),
        "actions": noise(BATCH, 4, config.act_dim),
        "rewards": noise(BATCH, 4, 1),
        "returns_to_go": noise(BATCH, 4, 1),
        "timesteps": torch.arange(4).expand(BATCH, 4),
        "attention_mask": torch.ones(BATCH, 4, dtype=torch.long),
    }


def _regions(config: PreTrainedConfig) -> dict[str, Any]:
    """Text and what a detector saw in a picture."""
    ids = tokens()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "visual_feats": noise(BATCH, 4, config.visual_feat_dim),
        "visual_pos": torch.rand(BATCH, 4, 4, generator=torch.Generator().manual_seed(0)),
    }


def _captioned(config: PreTrainedConfig) -> dict[str, Any]:
    ids = tokens()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _picture()}


def _placed_patches(config: PreTrainedConfig) -> dict[str, Any]:
    """Patches of a picture, and where each lies in it."""
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).flatten(0, 1)
    return {
        "pixel_values": noise(BATCH, 36, 3 * config.patch_size**2),
        "pixel_position_ids": places.expand(BATCH, -1, -1),
    }


def _rectified(config: PreTrainedConfig) -> dict[str, Any]:
    """The patches of pictures side by side, and how many there are in height and width of each."""
    patch = config.patch_size
    return {
        "pixel_values": noise(1, 3, patch, patch * BATCH * 16),
        "target_sizes": torch.full((BATCH, 2), 4),
    }


def _hidden(config: PreTrainedConfig) -> dict[str, Any]:
    """A picture of which the same patches are hidden each time."""
    count = (config.image_size // config.patch_size) ** 2
    noise = torch.linspace(0, 1, count).flip(0).expand(BATCH, count)
    return {"pixel_values": _picture(), "noise": noise}


def _two_by_two(config: PreTrainedConfig) -> dict[str, Any]:
    """The pixels of pictures, four patches after four patches."""
    width = 2 * config.patch_size
    return {
        "pixel_values": noise(BATCH * 16, width, width, 3),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
    }


def _large_picture(config: PreTrainedConfig) -> dict[str, Any]:
    return {"pixel_values": noise(BATCH, 3, 64, 64)}


def _described(config: PreTrainedConfig) -> dict[str, Any]:
    """Text, and a picture of the size that the backbone of the vision tower takes."""
    size = config.vision_config.backbone_config.image_size
    return {**_captioned(config), "pixel_values": noise(BATCH, 3, size, size)}


def _large_and_pointed_at(config: PreTrainedConfig) -> dict[str, Any]:
    return {**_pointed_at(config), **_large_picture(config)}


def _pointed_at(config: PreTrainedConfig) -> dict[str, Any]:
    """A picture, and a point in it."""
    return {"pixel_values": _picture(), "input_points": torch.full((BATCH, 1, 1, 2), 12.0)}


def _phrases(config: PreTrainedConfig) -> dict[str, Any]:
    """A picture, and text whose tokens attend to each other as far as the next end of a phrase."""
    captioned = _captioned(config)
    captioned["input_ids"][:, 4] = 102
    return captioned


def _prompted(config: PreTrainedConfig) -> dict[str, Any]:
    """A picture, another and what is masked in that."""
    return {name: _picture() for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def _pictures_to_match(config: PreTrainedConfig) -> dict[str, Any]:
    return {"pixel_values": noise(BATCH, 2, 3, 64, 64)}


def _told_what_to_mask(config: PreTrainedConfig) -> dict[str, Any]:
    return {**_large_picture(config), "task_inputs": tokens(config.task_seq_len)}


def _film_with_a_question(config: PreTrainedConfig) -> dict[str, Any]:
    """One example: the model takes no more at a time."""
    size = config.max_img_size
    ids = tokens(rows=1)
    film = noise(1, config.num_frames, 3, size, size)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": film}


def _drafted(config: PreTrainedConfig) -> dict[str, Any]:
    """What is to be filled in, after what another model's layers made of the text before."""
    return {
        "noise_embeds": noise(BATCH, config.block_size, config.hidden_size),
        "context_hidden_states": noise(BATCH, 5, config.hidden_size * len(config.target_layer_ids)),
    }


def _acted(config: PreTrainedConfig) -> dict[str, Any]:
    """A picture and what to do, the state of a robot, and noise that becomes its actions."""
    vision = config.vlm_config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2
    return {
        **_with_picture_tokens(config.vlm_config.image_token_id, count),
        "pixel_values": _picture(1),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
        "state": noise(BATCH, config.max_state_dim),
        "noise": noise(BATCH, config.chunk_size, config.max_action_dim),
        "timestep": torch.full((BATCH,), 0.5),
    }


def _array(config: PreTrainedConfig) -> dict[str, Any]:
    return {"inputs": noise(BATCH, 10, config.d_model)}


EXAMPLES: Final[Mapping[str, Callable[[PreTrainedConfig], dict[str, Any]]]] = {
    **SIGNALS,
    "PerceiverModel": _array,
    "align": _captioned,
    "blip-2": _queried,
    "blip_2_qformer": _queries,
    "bros": _boxes,
    "decision_transformer": _decisions,
    "gemma4_vision": _placed_patches,
    "grounding-dino": _phrases,
    "idefics": _several_pictures,
    "instructblip": _instructed,
    "instructblipvideo": _instructed_film,
    "inkling2_vision": _two_by_two,
    "kosmos-2": _placed,
    "depth_pro": _large_picture,
    "efficientloftr": _pictures_to_match,
    "lightglue": _pictures_to_match,
    "lw_detr": _large_picture,
    "lxmert": _regions,
    "mask2former": _large_picture,
    "maskformer": _large_picture,
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _tiled),
    "granite_docling": _one_each,
    "gemma4": _placed_and_told,
    "minicpm_ocr_vision": _rectified,
    "minicpmv4_7_vision": _rectified,
    "muse_glimmer_assistant": _drafted,
    "mm-grounding-dino": _phrases,
    "pi0": _acted,
    "oneformer": _told_what_to_mask,
    "pix2struct": _flattened_patches,
    "sam": _pointed_at,
    "sam2": _large_and_pointed_at,
    "sam2_hiera_det_model": _large_picture,
    "sam2_vision_model": _large_picture,
    "sam3_tracker": _pointed_at,
    "sam_hq": _pointed_at,
    "seggpt": _prompted,
    "tvp": _film_with_a_question,
    "sam3": _described,
    "sam3_lite_text": _described,
    "udop": _boxes_to_decode,
    "vit_mae": _hidden,
}
"""By `model_type`, or by the name of a class where others of that type need none."""
