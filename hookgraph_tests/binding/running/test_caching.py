"""Keys and values while decoding: what is new in a pass, and that its edits stay."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

from hookgraph.binding import bind
from hookgraph.errors import LocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import ATTN_K, ATTN_V, XATTN_K
from hookgraph_tests.families import FAMILIES, bound, model_of, tokens
from hookgraph_tests.tiny import build

IDS = tokens(2, 6)
NEW = 5
EDITED = (ATTN_K[1], ATTN_V[1], ATTN_K[1].at(pos=7), ATTN_V[1].at(pos=slice(2, None), kv_head=1))


def rough(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    return model.eval()


@cache
def latent() -> HookGraph:
    """A model whose cache keeps compressed latents."""
    config = DeepseekV3Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
    )
    return bind(rough(DeepseekV3ForCausalLM(config)), check=False)


def graph_of(family: str) -> HookGraph:
    return latent() if family == "latent" else bound(family)


def generated(graph: HookGraph, **options: Any) -> Tensor:
    """The logits of the generated tokens."""
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **options}
    out = model_of(graph).generate(
        IDS, attention_mask=torch.ones_like(IDS), output_logits=True, return_dict_in_generate=True, **options
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize("location", EDITED, ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "latent"])
def test_edited_keys_and_values_are_what_later_passes_see(family: str, location: Location):
    graph = graph_of(family).hook(location, lambda x: 1.3 * x + 0.2)
    plain = generated(graph)
    with graph.attached():
        cached = generated(graph)
        whole = generated(graph, use_cache=False)
        static = generated(graph, cache_implementation="static")
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(static, whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(cached, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("kind", [ATTN_K, ATTN_V], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "latent"])
def test_keys_and_values_of_a_pass_are_its_new_ones(family: str, kind: Any, options: dict[str, Any]):
    found = list[Tensor]()
    graph = graph_of(family).hook(kind[1], lambda x: found.append(x.clone()))
    with graph.attached():
        out = model_of(graph).generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options)
    assert [x.shape[1] for x in found] == [6, 1, 1]
    whole = graph_of(family).run(out[:, :-1], save=[kind[1]])[kind[1]]
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [ATTN_K, ATTN_V], ids=str)
@pytest.mark.parametrize("family", ["llama", "latent"])
def test_keys_and_values_behind_a_remembered_past_are_those_of_the_rest(family: str, kind: Any):
    graph = graph_of(family)
    rest = graph.remember(IDS, 4)
    assert rest is not None
    whole = graph.run(IDS, save=[kind[1]])[kind[1]]
    torch.testing.assert_close(graph.run(rest, save=[kind[1]])[kind[1]], whole[:, 4:], rtol=1e-4, atol=1e-5)
    edited = graph.hook(kind[1].at(pos=slice(4, None)), torch.zeros_like).run(IDS).logits[:, 4:]
    behind = graph.hook(kind[1], torch.zeros_like).run(rest).logits
    torch.testing.assert_close(behind, edited, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_one_pass_stays_in_the_cache_after_the_graph_is_gone(family: str):
    graph = bound(family).hook(ATTN_K[1].at(pos=2), torch.zeros_like)
    model = model_of(graph)
    with torch.no_grad():
        with graph.attached():
            first = model(IDS, use_cache=True)
            whole = model(torch.cat([IDS, IDS[:, :1]], dim=1), use_cache=False).logits
        last = model(IDS[:, :1], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(last[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)
    assert "update" not in vars(first.past_key_values)


def test_beams_over_edited_keys_whose_cache_keeps_latents_are_refused():
    graph = latent().hook(ATTN_K[1], lambda x: 2 * x)
    with graph.attached(), pytest.raises(LocationError, match="has exchanged its rows since, as beams do"):
        generated(graph, num_beams=3)
    with graph.attached():
        generated(graph, num_beams=3, use_cache=False)


def test_a_cache_is_left_alone_when_a_hook_raises():
    graph = bound("llama").hook(ATTN_K[1], lambda x: 1 / 0)
    model = model_of(graph)
    output = model(IDS, use_cache=True)
    with graph.attached(), pytest.raises(ZeroDivisionError):
        model(IDS[:, :1], past_key_values=output.past_key_values)
    assert "update" not in vars(output.past_key_values)


def test_what_a_cache_keeps_is_noted_when_the_model_is_bound():
    def kept(graph: HookGraph) -> set[str]:
        anchors = graph.binding.findings.anchors  # pyright: ignore[reportAttributeAccessIssue]
        return {a.kept for x, a in anchors.items() if a.role in ("key", "value")}

    assert kept(bound("llama")) == {"states"}
    assert kept(latent()) == {"source"}
    assert kept(bound("gpt2")) == set()


def test_edited_keys_reach_the_layers_that_share_them_with_a_cache_and_without():
    graph = bind(build("causal", "gemma4_text").double(), check=False)
    edited = graph.hook(ATTN_K[0], lambda x: 1.5 * x + 0.3)
    runs = [
        edited.run({"input_ids": IDS, "use_cache": use}, save=[ATTN_K[0].grad], metric=lambda x: x[:, -1, 3])
        for use in (False, True)
    ]
    torch.testing.assert_close(runs[0].logits, runs[1].logits)
    torch.testing.assert_close(runs[0][ATTN_K[0].grad], runs[1][ATTN_K[0].grad])
    read = graph.run(IDS, save=[ATTN_K[0].grad], metric=lambda x: x[:, -1, 3])
    assert torch.equal(read.logits, graph.run(IDS).logits)


def test_keys_of_another_stack_are_new_once():
    config = BartConfig(
        vocab_size=48,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_position_embeddings=64,
        pad_token_id=0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    shapes = list[tuple[int, ...]]()
    graph = bind(rough(BartForConditionalGeneration(config)), check=False)
    graph = graph.hook(XATTN_K[1], lambda x: shapes.append(tuple(x.shape)) or 1.5 * x + 0.3)
    with graph.attached():
        cached = generated(graph)
        assert shapes == [(2, 6, 4, 8)]
        whole = generated(graph, use_cache=False)
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-4)
