"""Tiny random models of four families, built offline, on which wrong algebra shows.

GPT-2 (one fused projection, absolute positions), Llama (grouped-query, gated MLP, biases), GPT-NeoX
(parallel attention and MLP, partial rotary embedding, interleaved heads) and Gemma-2 (norms before and
after each update, soft-caps, a sliding window). Gains and biases are random, matrices are of size
1/sqrt(width): no term is negligible, nothing saturates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, final

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from hookgraph.binding import HuggingFaceBinding, bind
from hookgraph.graph.hook_graph import HookGraph

VOCABULARY: Final = 48
PADDING: Final = 0
LAYERS: Final = 3


@final
@dataclass(frozen=True, slots=True)
class Size:
    """How large a model is."""

    layers: int = LAYERS
    heads: int = 4
    d_head: int = 8


SMALL: Final = Size()
STORY_SIZE: Final = Size(layers=10, heads=10, d_head=4)
"""Large enough for the layers and heads that the stories of the README name."""


@final
@dataclass(frozen=True, slots=True)
class Family:
    """How to build a family, and where HuggingFace keeps what the tests look up independently."""

    name: str
    config: Callable[[Size], PreTrainedConfig]
    attention: str
    layers: str
    """Path of the list of layers."""
    attention_module: str
    """Path of the attention module inside a layer."""
    projection: str
    """Path of attention's output projection inside a layer."""
    down: str
    """Path of the MLP's down projection inside a layer."""
    double_throughout: bool
    """Whether a model in double precision computes in it throughout, norms included."""


def _gpt2(size: Size) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=40,
        n_embd=size.heads * size.d_head,
        n_layer=size.layers,
        n_head=size.heads,
        n_inner=40,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PADDING,
    )


def _llama(size: Size) -> PreTrainedConfig:
    return LlamaConfig(
        **_shared(size),
        num_key_value_heads=size.heads // 2,
        attention_bias=True,
        mlp_bias=True,
    )


def _neox(size: Size) -> PreTrainedConfig:
    return GPTNeoXConfig(**_shared(size), rotary_pct=0.5, use_parallel_residual=True)


def _gemma2(size: Size) -> PreTrainedConfig:
    return Gemma2Config(
        **_shared(size),
        num_key_value_heads=size.heads // 2,
        head_dim=size.d_head,
        query_pre_attn_scalar=size.d_head,
        sliding_window=4,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    )


def _shared(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": size.heads * size.d_head,
        "intermediate_size": 40,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": 40,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": PADDING,
    }


FAMILIES: Final[Mapping[str, Family]] = {
    family.name: family
    for family in (
        Family("gpt2", _gpt2, "sdpa", "transformer.h", "attn", "attn.c_proj", "mlp.c_proj", True),
        Family(
            "llama",
            _llama,
            "sdpa",
            "model.layers",
            "self_attn",
            "self_attn.o_proj",
            "mlp.down_proj",
            False,
        ),
        Family(
            "neox",
            _neox,
            "sdpa",
            "gpt_neox.layers",
            "attention",
            "attention.dense",
            "mlp.dense_4h_to_h",
            True,
        ),
        Family(
            "gemma2",
            _gemma2,
            "eager",
            "model.layers",
            "self_attn",
            "self_attn.o_proj",
            "mlp.down_proj",
            False,
        ),
    )
}


def build(
    family: str, dtype: torch.dtype = torch.float32, size: Size = SMALL, seed: int = 0
) -> PreTrainedModel:
    """A new random model, in evaluation mode."""
    found = FAMILIES[family]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        found.config(size), attn_implementation=found.attention
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(drawn * weight.shape[-1] ** -0.5)
            else:
                weight.copy_(0.3 * drawn + (0.0 if name.endswith("bias") else 1.0))
    return nn.Module.to(model, dtype).eval()


@cache
def bound(family: str, dtype: torch.dtype = torch.float32, size: Size = SMALL) -> HookGraph:
    """The graph of a model that all tests of a process share: none may change the model.

    Those in double precision are proven; the others, to save time, are bound only.
    """
    return bind(build(family, dtype, size), check=dtype == torch.float64)


def model_of(graph: HookGraph) -> PreTrainedModel:
    """The model that a graph is bound to."""
    return binding_of(graph).model


def binding_of(graph: HookGraph) -> HuggingFaceBinding:
    """The binding of a HuggingFace model."""
    binding = graph.binding
    if not isinstance(binding, HuggingFaceBinding):
        raise TypeError(type(binding))
    return binding


def layers_of(family: str, model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model, found by their HuggingFace name."""
    return list(model.get_submodule(FAMILIES[family].layers).children())


def tokens(batch: int = 2, pos: int = 6, seed: int = 0) -> Int[Tensor, "batch pos"]:
    """Token ids that every family knows, without padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, pos), generator=generator)
