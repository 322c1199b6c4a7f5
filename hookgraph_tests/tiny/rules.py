"""How small a field of a configuration becomes, by its name. The first rule that applies is used."""

import re
from dataclasses import dataclass
from typing import Final, final

VOCABULARY: Final = 128
WIDTH: Final = 32
HEADS: Final = 4
KV_HEADS: Final = 2
HEAD_WIDTH: Final = 8
NEURONS: Final = 48
LAYERS: Final = 2
EXPERTS: Final = 4
POSITIONS: Final = 64
PICTURE: Final = 32
PATCH: Final = 8
RANK: Final = 16


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """Fields whose whole name matches `pattern` become `value`, where the default is a larger integer."""

    pattern: str
    value: int
    above: int = 0
    """A default that is not larger than this stays as it is."""
    unset: bool = False
    """Whether a default of None, which stands for a number computed elsewhere, is replaced too."""
    lists: bool = False
    """Whether in a list each integer is replaced."""


# fmt: off
RULES: Final = (
    # Vocabulary and positions
    Rule(r"(decoder_|text_|t2u_|audio_|entity_|shape_|pronunciation_|unpadded_|unit_hifi_gan_)?vocab_size"
         r"|vocab_size_per_layer_input|encoder_hash_byte_group_vocab", VOCABULARY),
    Rule(r"(t2u_|original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions"
         r"|context_length|max_sequence_length|seq_length", POSITIONS),
    Rule(r"sliding_window(_size)?|local_attention|attention_window(_size)?|window_size|attention_chunk_size"
         r"|keep_window_size|local_attention_window_len|local_radius|(global_)?block_size", 4, above=4),

    # Heads
    Rule(r"num_key_value_heads", KV_HEADS, unset=True),
    Rule(r"(swa|decoder|encoder)_num_key_value_heads|num_kv_heads|num_global_key_value_heads", KV_HEADS),
    Rule(r"((num_)?((en|de)coder|swa|speech_encoder|t2u_(en|de)coder|self|cross)_)?(num_)?attention_heads"
         r"|n_heads?|num_heads|index_n_heads|linear_num_heads|num_attention_groups", HEADS),
    Rule(r"head_dim", HEAD_WIDTH, unset=True),
    Rule(r"mamba_head_dim|mamba_d_head|mamba_headdim", 2 * WIDTH // HEADS, unset=True),
    Rule(r"qk_(nope|rope)_head_dim|((swa_)?v|swa|index(er)?|global|linear(_key|_value)?)_head_dim|d_kv|dim_head"
         r"|d_head|attention_head_size|kv_channels|rotary_dim|query_pre_attn_scalar", HEAD_WIDTH),
    Rule(r"linear_num_key_heads", 2),
    Rule(r"linear_num_value_heads", HEADS),

    # Layers
    Rule(r"(num_hidden_|n_|num_)?layers|n_layer|((num_)?((en|de)coder|speech_encoder|t2u_(en|de)coder)_)layers"
         r"|num_blocks|depth|num_self_attends_per_block", LAYERS),
    Rule(r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),

    # Widths
    Rule(r"((true|encoder|decoder|backbone|out|output|cross_attention|vision|text|audio|mm|llm|lm|bottleneck"
         r"|encoder_seq|attention|relation|mit)_)?hidden_size|upsample_groups|hidden_size_global|d_model|n_embd|dim|condition_dim"
         r"|adapter_(in|out)_dim|adapter_input_size|text_(embed|config)_dim|(text|vision)_embed_dim"
         r"|(input_|output_)?embedding_(size|dim)|emb(ed)?_dim|word_embed_proj_dim|lru_width|d_latents"
         r"|projection_dim|output_dim|audio_embed_dim|entity_emb_size|(pronunciation|shape)_embed_dim"
         r"|prediction_head_size", WIDTH),
    Rule(r"hidden_size_per_layer_input|subsampling_conv_channels|latent_query_num|num_query_tokens", 8),
    Rule(r"projector_(hidden_size|input_dim|output_dim)|vision_output_dim", WIDTH),
    Rule(r"post_conv_(in|mid|out)_channels", WIDTH),
    Rule(r"conv_dim", 16, lists=True),
    Rule(r"(q|kv|o)_lora_rank", RANK),
    Rule(r"((shared|moe|dense|expert|prefix_dense)_.*)?(intermediate_size.*|ffn_hidden_size)"
         r"|(((en|de)coder|t2u_(en|de)coder)_)?ffn_dim|speech_encoder_intermediate_size|d_ff|dim_ff|dff|n_inner"
         r"|d_inner|hidden_dim|feed_forward_size|prompt_mid_dim|mlp_dim|router_hidden_size|adapter_rank",
         NEURONS),

    # Experts
    Rule(r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", EXPERTS),
    Rule(r"num_experts_per_tok|moe_k|moe_topk|top_k_experts|experts_top_k|n_group", 2, above=1),
    Rule(r"topk_group", 1),

    # Mixers
    Rule(r"mamba_d_state|state_size|ssm_state_size", 8),
    Rule(r"mamba_n_heads|mamba_num_heads|n_mamba_heads", HEADS, above=2),
    Rule(r"mamba_d_ssm", 2 * WIDTH),
    Rule(r"(mamba_)?chunk_size", 8, above=8),
    Rule(r"n_groups|mamba_ngroups", 2, above=2),

    # Low ranks and selections
    Rule(r"num_queries|num_object_queries", 8, above=8),
    Rule(r"index_topk(_blocks)?|laurel_rank|d_rel|num_centroids|embedding_rank|prompt_length|hc_lowrank"
         r"|gated_norm_rank|num_latents", 8, above=8),

    # Pictures
    Rule(r"image_size|input_size|input_resolution", PICTURE, lists=True),
    Rule(r"num_frames|frames_per_clip", 4, above=4),
    Rule(r"patch_size", PATCH, above=PATCH, lists=True),
)
# fmt: on

TOKENS: Final = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 3,
    "cls_token_id": 4,
    "mask_token_id": 5,
    "unk_token_id": 6,
}
"""Special tokens; any other `..._token_id` gets one from the end of the vocabulary."""

LAYER_KINDS: Final = ("layer_types", "layers_block_type")
"""Fields that list the kind of each layer: the kinds take turns."""

LAYER_KINDS_ONCE: Final = ("mlp_layer_types", "indexer_types")
"""The same, but the last kind stays: what comes first comes once."""

DEPTHS: Final = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "decoder_layers")
"""Fields that say how many layers there are."""


def rule_for(field: str, default: object) -> object:
    """The small value of a field, or None where it keeps its default."""
    for rule in RULES:
        if re.fullmatch(rule.pattern, field):
            if default is None and rule.unset:
                return rule.value
            if _larger(default, rule.above):
                return rule.value
            if rule.lists and isinstance(default, (list, tuple)) and all(_larger(x, 0) for x in default):
                return [rule.value if _larger(x, rule.above) else x for x in default]
    return None


def _larger(number: object, bound: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > bound
