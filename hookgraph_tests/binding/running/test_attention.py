import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hookgraph.binding import bind
from hookgraph.errors import BindingError
from hookgraph.ontology.locations import LocationType
from hookgraph.ontology.transformer import (
    ATTN_K,
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Q,
    ATTN_RESULT,
    ATTN_SCORES,
    ATTN_V,
    ATTN_Z,
)
from hookgraph_tests.families import FAMILIES, LAYERS, binding_of, bound, build, model_of, tokens
from hookgraph_tests.tiny import build as tiny

IDS = tokens(2, 7)
POS = IDS.shape[1]
INTERIOR = (ATTN_Q, ATTN_K, ATTN_V, ATTN_SCORES, ATTN_PATTERN, ATTN_Z)
SDPA = [name for name, family in FAMILIES.items() if family.attention == "sdpa"]
GROUPED = ("llama", "gemma2")


def eager_twin(family: str) -> PreTrainedModel:
    """The shared model's twin with eager attention, for HuggingFace's own attention weights."""
    twin = copy.deepcopy(model_of(bound(family)))
    twin.set_attn_implementation("eager")
    return twin


def by_query_head(value: Tensor) -> Tensor:
    """Keys or values of each query head."""
    return value.repeat_interleave(4 // value.shape[2], dim=2)


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_are_the_attention_weights_that_huggingface_reports(family: str):
    graph = bound(family)
    run = graph.run(IDS, save=graph.every(ATTN_PATTERN))
    with torch.no_grad():
        expected = eager_twin(family)(input_ids=IDS, output_attentions=True).attentions
    assert len(expected) == len(run) == LAYERS
    for value, weights in zip(run.values(), expected, strict=True):
        torch.testing.assert_close(value, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_pattern_values_and_z_fit_together(family: str, layer: int):
    asked = [kind[layer] for kind in INTERIOR]
    q, k, v, scores, pattern, z = bound(family).run(IDS, save=asked).values()
    heads = 2 if family in GROUPED else 4
    assert q.shape == z.shape == (2, POS, 4, 8)
    assert k.shape == v.shape == (2, POS, heads, 8)
    assert scores.shape == pattern.shape == (2, 4, POS, POS)
    torch.testing.assert_close(scores.softmax(-1), pattern)
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, by_query_head(v)), z)
    raw = torch.einsum("bqhd,bkhd->bhqk", q, by_query_head(k)) / 8**0.5
    raw = 5 * torch.tanh(raw / 5) if family == "gemma2" else raw
    seen = scores > torch.finfo(torch.float32).min / 2
    torch.testing.assert_close(scores[seen], raw[seen], rtol=1e-5, atol=1e-5)
    sliding = family == "gemma2" and layer % 2 == 0
    distance = torch.arange(POS)[:, None] - torch.arange(POS)
    visible = (distance >= 0) & (distance < 4) if sliding else distance >= 0
    assert torch.equal(seen, visible.expand_as(seen))
    assert pattern[~seen].count_nonzero() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_inside_a_fused_kernel_changes_logits_by_rounding_only(family: str):
    graph = bound(family)
    plain = graph.run(IDS).logits
    inside = [x for kind in (ATTN_SCORES, ATTN_PATTERN) for x in graph.every(kind)]
    outside = [x for kind in (ATTN_Q, ATTN_K, ATTN_V, ATTN_Z) for x in graph.every(kind)]
    torch.testing.assert_close(
        graph.run(IDS, save=inside, metric=lambda x: x[:, 0, 0]).logits, plain, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(graph.run(IDS, save=outside, metric=lambda x: x[:, 0, 0]).logits, plain)


@pytest.mark.parametrize("family", SDPA)
def test_only_layers_whose_scores_or_pattern_are_asked_for_leave_the_fused_kernel(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    fused, calls = torch.nn.functional.scaled_dot_product_attention, list[int]()

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    counts = {}
    for kind in INTERIOR:
        graph = bound(family).hook(kind[1], torch.clone)
        calls.clear()
        graph.run(IDS)
        counts[kind] = len(calls)
    whole, less = LAYERS, LAYERS - 1
    assert counts == dict(zip(INTERIOR, (whole, whole, whole, less, less, whole), strict=True))


# --- edits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 100.0, -100.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_edited_scores_keep_masked_cells_masked(family: str, value: float):
    graph = bound(family).hook(ATTN_SCORES[1], lambda x: torch.full_like(x, value))
    run = graph.run(IDS, save=[ATTN_PATTERN[1]], metric=lambda x: x[:, 0, 0])
    rows = torch.arange(1, POS + 1)
    uniform = torch.ones(POS, POS).tril() / rows[:, None]
    torch.testing.assert_close(run[ATTN_PATTERN[1]], uniform.expand(2, 4, POS, POS))
    assert torch.isfinite(run.logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edited_pattern_is_what_mixes_the_values(family: str):
    def first_key_only(x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_fill(-1, torch.tensor([0]), 1.0)

    graph = bound(family).hook(ATTN_PATTERN[1], first_key_only)
    run = graph.run(IDS, save=[ATTN_Z[1], ATTN_V[1]])
    first = by_query_head(run[ATTN_V[1]])[:, :1].expand(2, POS, 4, 8)
    torch.testing.assert_close(run[ATTN_Z[1]], first)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edited_query_moves_its_own_head_and_position_only(family: str):
    graph = bound(family)
    z = graph.run(IDS, save=[ATTN_Z[1]])[ATTN_Z[1]]
    edited = graph.hook(ATTN_Q[1].at(head=2, pos=-1), torch.neg).run(IDS, save=[ATTN_Z[1]])[ATTN_Z[1]]
    moved = ~torch.isclose(edited, z, rtol=1e-5, atol=1e-6).all(-1)
    assert moved[:, -1, 2].all()
    moved[:, -1, 2] = False
    assert not moved.any()


@pytest.mark.parametrize("kind", [ATTN_K, ATTN_V], ids=str)
@pytest.mark.parametrize("family", GROUPED)
def test_an_edited_key_value_head_moves_the_query_heads_of_its_group(family: str, kind: LocationType):
    graph = bound(family)
    z = graph.run(IDS, save=[ATTN_Z[1]])[ATTN_Z[1]]
    edited = graph.hook(kind[1].at(kv_head=1), lambda x: 2 * x).run(IDS, save=[ATTN_Z[1]])[ATTN_Z[1]]
    moved = ~torch.isclose(edited, z, rtol=1e-5, atol=1e-6).all(-1)
    assert moved[:, 1:, 2:].all()
    assert not moved[:, :, :2].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroed_z_leaves_only_the_bias_of_the_projection(family: str):
    graph = bound(family).hook(ATTN_Z[1], torch.zeros_like)
    out = graph.run(IDS, save=[ATTN_OUT[1]])[ATTN_OUT[1]]
    torch.testing.assert_close(out, out[:1, :1].expand_as(out))


# --- the cache --------------------------------------------------------------------------------


def stepwise(model: PreTrainedModel, prompt: int) -> Tensor:
    """The logits of a prompt and of one token after the other, each from the cache."""
    output = model(input_ids=IDS[:, :prompt], use_cache=True)
    logits = [output.logits]
    for i in range(prompt, POS):
        output = model(input_ids=IDS[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_have_one_effect_with_and_without_a_cache(family: str):
    graph = bound(family)
    model = model_of(graph)
    plain = graph.run(IDS).logits
    for location in [x for x in graph.locations if x.layer in (1, None)]:
        # A shifted pattern would let positions see the future, which the cache does not hold yet.
        edit = torch.square if location == ATTN_PATTERN[1] else lambda x: 1.1 * x + 0.1
        hooked = graph.hook(location, edit)
        with torch.no_grad(), hooked.attached():
            whole = model(input_ids=IDS, use_cache=False).logits
            decoded = stepwise(model, 4)
        torch.testing.assert_close(decoded, whole, rtol=1e-4, atol=1e-4, msg=str(location))
        assert not torch.allclose(whole, plain, rtol=1e-4, atol=1e-4), location


@pytest.mark.parametrize("family", FAMILIES)
def test_while_decoding_keys_of_the_whole_past_are_seen(family: str):
    shapes: list[tuple[int, ...]] = []
    graph = bound(family).hook(ATTN_PATTERN[1], lambda x: shapes.append(tuple(x.shape)))
    with torch.no_grad(), graph.attached():
        stepwise(model_of(graph), POS - 1)
    assert shapes == [(2, 4, POS - 1, POS - 1), (2, 4, 1, POS)]


# --- padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INTERIOR, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_does_not_reach_real_positions(family: str, kind: LocationType):
    graph, padding = bound(family), 3
    padded = torch.cat([torch.zeros(2, padding, dtype=torch.long), IDS], dim=1)
    mask = (torch.arange(padding + POS) >= padding).long().expand_as(padded)
    value = graph.run({"input_ids": padded, "attention_mask": mask}, save=[kind[1]])[kind[1]]
    expected = graph.run(IDS, save=[kind[1]])[kind[1]]
    if kind in (ATTN_SCORES, ATTN_PATTERN):
        value = value[:, :, padding:, padding:]
        seen = expected > torch.finfo(torch.float32).min / 2
        torch.testing.assert_close(value[seen], expected[seen], rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(value[:, padding:], expected, rtol=1e-4, atol=1e-5)


# --- errors -----------------------------------------------------------------------------------


def test_an_eager_function_without_a_softmax_cannot_be_looked_into(monkeypatch: pytest.MonkeyPatch):
    graph = bind(build("llama"), check=False)
    module = "transformers.models.llama.modeling_llama"

    def averaging(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return value.mean(2, keepdim=True).expand(-1, 2, POS, -1).repeat(1, 2, 1, 1).transpose(1, 2), None

    monkeypatch.setattr(f"{module}.eager_attention_forward", averaging)
    with pytest.raises(BindingError, match="computed 0 softmaxes where one was expected"):
        graph.run(IDS, save=[ATTN_PATTERN[1]], metric=lambda x: x[:, 0, 0])
    assert graph.run(IDS, save=[ATTN_Q[1]])[ATTN_Q[1]].shape == (2, POS, 4, 8)


def test_an_eager_encoder_that_is_given_no_mask_is_looked_into_without_one():
    """A fused kernel would take the want of a mask for a causal one."""
    model = tiny("base", "splinter")
    graph = bind(model, check=False)
    run = graph.run(tokens(1, 5), save=[ATTN_PATTERN[0]])
    assert (run[ATTN_PATTERN[0]] > 0).all()
    with torch.no_grad():
        torch.testing.assert_close(run.logits, model(tokens(1, 5))[0])


def test_an_eager_function_that_cannot_do_without_a_mask_is_given_one():
    """While decoding inside a window, the fused kernel of ModernBERT's decoder is given none."""
    graph = bind(tiny("causal", "modernbert-decoder"), check=False)
    plain = graph.generate(tokens(1, 5), save=[ATTN_OUT[0]], max_new_tokens=3, do_sample=False)
    seen = graph.generate(
        tokens(1, 5), save=[ATTN_OUT[0], ATTN_PATTERN[0]], max_new_tokens=3, do_sample=False
    )
    for step, other in zip(seen.steps, plain.steps, strict=True):
        torch.testing.assert_close(step[ATTN_OUT[0]], other[ATTN_OUT[0]])


def test_rows_of_padding_stay_numbers_where_scores_are_looked_at():
    """Doge masks with the lowest number of double precision, and its softmax is in single precision."""
    graph = bind(tiny("causal", "doge").double(), check=False)
    inputs = {"input_ids": tokens(1, 6), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
    logits = graph.run(inputs, save=[ATTN_PATTERN[0]]).logits
    torch.testing.assert_close(logits[:, 2:], graph.run(inputs).logits[:, 2:], rtol=1e-5, atol=1e-6)


def test_behind_a_gate_heads_write_what_the_projection_makes_of_them():
    model = tiny("causal", "afmoe")
    graph = bind(model, check=False)
    projection = model.get_submodule(binding_of(graph).findings.anchors[ATTN_RESULT[0]].module)
    returned: list[Tensor] = []
    handle = projection.register_forward_hook(lambda module, args, output: returned.append(output))
    with torch.no_grad():
        model(IDS)
    whole = graph.run(IDS, save=[ATTN_RESULT[0], ATTN_OUT[1]])[ATTN_RESULT[0]]
    silent = graph.hook(ATTN_RESULT[0].at(head=1), torch.zeros_like)
    silent.run(IDS, save=[ATTN_OUT[1]])
    handle.remove()
    torch.testing.assert_close(whole.sum(2), returned[0])
    torch.testing.assert_close(whole.sum(2) - whole[:, :, 1], returned[-1])


@pytest.mark.parametrize("kind", [ATTN_Q, ATTN_K, ATTN_Z, ATTN_PATTERN])
def test_sparse_attention_stays_sparse_under_hooks(kind: LocationType):
    """The indexer leaves keys out of long inputs, if it knows the name of the implementation."""
    graph = bind(tiny("causal", "deepseek_v32"), check=False)
    ids = tokens(2, 16)
    plain = graph.run(ids).logits
    last = graph.every(kind)[-1]
    hooked = graph.hook(last, lambda x: x.clone()).run(ids).logits
    torch.testing.assert_close(hooked, plain, rtol=0, atol=1e-4)
