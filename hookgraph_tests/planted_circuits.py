"""Transformers in which a circuit is planted: which edges there are is known.

Every writer adds one number along a direction of its own, orthogonal to those of all others, and every reader
reads the directions of the planted edges and nothing else. A large constant in the stream keeps the scale of
the norms nearly fixed, so that nothing else acts through it.
"""

from collections.abc import Mapping
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hookgraph.locations import ATTN_K, ATTN_Q, ATTN_V, ATTN_Z, EMBED, LOGITS, MLP_IN, MLP_OUT
from hookgraph.ontology.locations import Location

D_MODEL: Final = 32
CONSTANT: Final = 400.0
_VOCABULARY: Final = 12


def _head(layer: int, head: int) -> Location:
    return ATTN_Z[layer].at(head=head)


WRITERS: Final = (EMBED, *(x for i in (0, 1) for x in (_head(i, 0), _head(i, 1), MLP_OUT[i])))
DIRECTIONS: Final[Mapping[Location, int]] = {writer: i + 1 for i, writer in enumerate(WRITERS)}
"""The pair of coordinates (2 i, 2 i + 1) along which each writes +1 and -1; pair 0 is the constant's."""


def edges_of(kv: str) -> Mapping[tuple[Location, Location], float]:
    """The planted edges, with the weight by which the reader reads the writer."""
    return {
        (EMBED, ATTN_V[0].at(**{kv: 0})): 1.0,
        (_head(0, 0), MLP_IN[0]): 1.2,
        (MLP_OUT[0], ATTN_V[1].at(**{kv: 1})): 0.8,
        (MLP_OUT[0], ATTN_Q[1].at(head=1)): 0.6,
        (EMBED, ATTN_K[1].at(**{kv: 1})): 0.9,
        (_head(1, 1), MLP_IN[1]): 1.0,
        (_head(0, 0), LOGITS): 0.7,
        (MLP_OUT[1], LOGITS): 1.1,
    }


EDGES: Final = edges_of("kv_head")
_UNREAD: Final = {(EMBED, ATTN_V[0].at(kv_head=1)): 1.0, (_head(0, 0), ATTN_V[1].at(kv_head=0)): 1.0}
"""Heads that read and write, and that nothing reads."""


def direction(writer: Location) -> Float[Tensor, " d_model"]:
    """The unit vector along which a writer writes."""
    found = torch.zeros(D_MODEL, dtype=torch.float64)
    found[2 * DIRECTIONS[writer]], found[2 * DIRECTIONS[writer] + 1] = 1.0, -1.0
    return found / 2**0.5


def _constant() -> Float[Tensor, " d_model"]:
    found = torch.zeros(D_MODEL, dtype=torch.float64)
    found[0], found[1] = CONSTANT, -CONSTANT
    return found


def _read(reader: Location) -> Float[Tensor, " d_model"]:
    """What a reader computes of the normed stream, the scale of the norm undone."""
    size = _constant().square().mean().sqrt()
    parts = [w * direction(u) for (u, v), w in {**EDGES, **_UNREAD}.items() if v == reader]
    return size * torch.stack([*parts, torch.zeros(D_MODEL, dtype=torch.float64)]).sum(0)


def _embedding() -> Float[Tensor, "vocab d_model"]:
    values = torch.linspace(-1.0, 1.5, _VOCABULARY, dtype=torch.float64)
    return _constant() + values[:, None] * direction(EMBED)


def planted_gpt2() -> PreTrainedModel:
    """Two layers of two heads of GPT-2."""
    config = GPT2Config(
        vocab_size=_VOCABULARY, n_positions=16, n_embd=D_MODEL, n_layer=2, n_head=2, n_inner=4,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = nn.Module.to(GPT2LMHeadModel(config), torch.float64).eval()
    with torch.no_grad():
        _empty(model)
        model.transformer.wte.weight.copy_(_embedding())
        for i, layer in enumerate(model.transformer.h):
            d_head = D_MODEL // 2
            for head in (0, 1):
                start = head * d_head
                for part, kind in enumerate((ATTN_Q, ATTN_K, ATTN_V)):
                    axis = "head" if kind == ATTN_Q else "kv_head"
                    layer.attn.c_attn.weight[:, part * D_MODEL + start] = _read(kind[i].at(**{axis: head}))
                layer.attn.c_proj.weight[start] = direction(_head(i, head))
            layer.mlp.c_fc.weight[:, 0] = _read(MLP_IN[i])
            layer.mlp.c_fc.bias[0] = 0.5
            layer.mlp.c_proj.weight[0] = direction(MLP_OUT[i])
        model.lm_head.weight[3] = _read(LOGITS)
    return model


def planted_llama() -> PreTrainedModel:
    """The same of Llama: a gated MLP whose gate is open, rotary positions."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=D_MODEL, intermediate_size=4, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = nn.Module.to(LlamaForCausalLM(config), torch.float64).eval()
    open_gate = _constant() / _constant().norm()
    with torch.no_grad():
        _empty(model)
        model.model.embed_tokens.weight.copy_(_embedding())
        for i, layer in enumerate(model.model.layers):
            d_head = D_MODEL // 2
            for head in (0, 1):
                # The slowest rotation: positions hardly turn it.
                row, last = head * d_head, head * d_head + d_head // 2 - 1
                layer.self_attn.q_proj.weight[last] = _read(ATTN_Q[i].at(head=head))
                layer.self_attn.k_proj.weight[last] = _read(ATTN_K[i].at(kv_head=head))
                layer.self_attn.v_proj.weight[row] = _read(ATTN_V[i].at(kv_head=head))
                layer.self_attn.o_proj.weight[:, row] = direction(_head(i, head))
            layer.mlp.gate_proj.weight[0] = open_gate
            layer.mlp.up_proj.weight[0] = _read(MLP_IN[i])
            layer.mlp.down_proj.weight[:, 0] = 0.3 * direction(MLP_OUT[i])
        model.lm_head.weight[3] = _read(LOGITS)
    return model


def _empty(model: PreTrainedModel) -> None:
    """Every weight zero, gains of norms one."""
    for name, weight in model.named_parameters():
        gain = weight.ndim == 1 and name.endswith("weight")
        weight.fill_(1.0 if gain else 0.0)


PLANTED: Final = {"gpt2": planted_gpt2, "llama": planted_llama}
