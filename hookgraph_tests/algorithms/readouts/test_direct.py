"""Direct logit attribution against sums written by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from hookgraph.algorithms import LogitAttribution, direct_logit_attribution
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.algorithms.readouts.direct import Parts
from hookgraph.binding import bind
from hookgraph.errors import HookGraphError, MetricError
from hookgraph.locations import (
    ATTN_OUT,
    ATTN_RESULT,
    ATTN_Z,
    FINAL_LN_SCALE,
    LATENTS,
    MLP_OUT,
    MLP_POST,
    RESID_POST,
    RESID_PRE,
)
from hookgraph.ontology.weights import W_U, W_out
from hookgraph_tests.families import FAMILIES, bound, model_of, tokens
from hookgraph_tests.tiny import build
from hookgraph_tests.toy import Coordinates, orthonormal, toy_graph, toy_of, toy_tokens

CORRECT, WRONG, POS = [3, 4], 5, [-1, 3]
ROWS = torch.arange(2)


def whole(found: LogitAttribution) -> Tensor:
    parts = [v.reshape(len(v), -1).sum(1) for v in (*found.parts.values(), *found.rest.values())]
    return torch.stack(parts).sum(0) + found.bias


def test_on_the_toy_network_every_update_adds_its_product_with_the_unembedding():
    graph, ids = toy_graph(), toy_tokens()
    found = direct_logit_attribution(graph, ids, 1, [2, 3], pos=1)
    values = toy_of(graph).closed_form(ids, torch.zeros(7, dtype=torch.float64))
    direction = toy_of(graph).unembedding[:, 1] - toy_of(graph).unembedding[:, [2, 3]].T
    assert set(found.parts) == {RESID_PRE[0], *ATTN_OUT[:3], *MLP_OUT[:3]}
    for place, value in found.parts.items():
        assert torch.allclose(value, (values[place][:, 1] * direction).sum(-1), atol=1e-13)
    assert torch.allclose(found.bias, torch.zeros(2, dtype=torch.float64), atol=1e-13)


@pytest.mark.parametrize("by", ["layer", "head", "neuron", ["head", "neuron"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_bias_add_up_to_the_logit_difference(family: str, by: Parts | list[Parts]):
    graph = bound(family, torch.float64)
    found = direct_logit_attribution(graph, tokens(), CORRECT, WRONG, pos=POS, by=by)
    logits = graph.run(tokens()).logits[ROWS, POS]
    cap = getattr(model_of(graph).config, "final_logit_softcapping", None)
    if cap is not None:  # the logits before the cap are what is linear
        logits = cap * torch.atanh(logits / cap)
    expected = logits[ROWS, CORRECT] - logits[:, WRONG]
    assert torch.allclose(found.total, expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(whole(found), expected, rtol=1e-10, atol=1e-12)
    assert float(found.residual.abs().max()) < 1e-12


def test_layers_add_their_product_with_gain_and_scale_of_the_last_norm():
    graph = bound("llama", torch.float64)
    found = direct_logit_attribution(graph, tokens(), 3, 5)
    run = graph.run(tokens(), save=[FINAL_LN_SCALE, MLP_OUT[1]])
    gain = next(m.weight for m in model_of(graph).get_decoder().children() if hasattr(m, "variance_epsilon"))
    table = graph.weight(W_U)
    direction = gain * (table[:, 3] - table[:, 5])
    expected = (run[MLP_OUT[1]][:, -1] * direction).sum(-1) * run[FINAL_LN_SCALE][:, -1, 0]
    assert torch.allclose(found.parts[MLP_OUT[1]], expected, atol=1e-6)  # the norm is in single precision


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_heads_add_what_they_write(family: str):
    graph = bound(family, torch.float64)
    whole_update = direct_logit_attribution(graph, tokens(), 3, 5)
    heads = direct_logit_attribution(graph, tokens(), 3, 5, by="head")
    assert heads.parts[ATTN_Z[1]].shape == (2, 4)
    assert torch.allclose(
        heads.parts[ATTN_Z[1]].sum(1) + heads.rest[ATTN_OUT[1]], whole_update.parts[ATTN_OUT[1]], atol=1e-12
    )
    last = graph.every(RESID_POST)[-1]
    run = graph.stop_gradient(FINAL_LN_SCALE).run(
        tokens(), save=[ATTN_RESULT[1], last.grad], metric=logit_diff(3, 5)
    )
    written = (run[ATTN_RESULT[1]][:, -1] * run[last.grad][:, -1, None]).sum(-1)
    assert torch.allclose(heads.parts[ATTN_Z[1]], written, atol=1e-12)


def test_a_norm_after_the_update_is_held_at_its_scale():
    graph = bound("gemma2", torch.float64)
    layers = direct_logit_attribution(graph, tokens(), 3, 5)
    found = direct_logit_attribution(graph, tokens(), 3, 5, by="neuron")
    run = graph.run(tokens(), save=[MLP_POST[1], MLP_OUT[1], RESID_POST[2], FINAL_LN_SCALE])
    raw = run[MLP_POST[1]] @ graph.weight(W_out, 1)
    ratio = (run[MLP_OUT[1]] / raw)[:, -1]  # gain times scale, coordinate by coordinate
    neurons = run[MLP_POST[1]][:, -1, :, None] * graph.weight(W_out, 1)[None] * ratio[:, None]
    norm = next(
        m for m in model_of(graph).get_decoder().children() if not isinstance(m, nn.ModuleList | nn.Embedding)
    )
    table = graph.weight(W_U)
    direction = (1 + norm.weight) * (table[:, 3] - table[:, 5]) * run[FINAL_LN_SCALE][:, -1]
    expected = (neurons * direction[:, None]).sum(-1)
    assert torch.allclose(found.parts[MLP_POST[1]], expected, atol=1e-5)
    assert torch.allclose(found.parts[MLP_POST[1]].sum(1), layers.parts[MLP_OUT[1]], atol=1e-10)


def test_latents_add_their_share_of_the_site():
    graph, ids = toy_graph(), toy_tokens()
    columns = orthonormal(4, 4)
    spliced = graph.inject(Coordinates(MLP_OUT[1], "c", columns))
    found = direct_logit_attribution(spliced, ids, 1, 2, by="latent")
    latents = LATENTS().within(MLP_OUT[1], "c")
    value = graph.run(ids, save=[MLP_OUT[1]])[MLP_OUT[1]][:, -1]
    unembedding = toy_of(graph).unembedding
    expected = (value @ columns) * (columns.T @ (unembedding[:, 1] - unembedding[:, 2]))
    assert torch.allclose(found.parts[latents], expected, atol=1e-13)
    assert torch.allclose(found.rest[MLP_OUT[1]], torch.zeros(2, dtype=torch.float64), atol=1e-13)


def test_an_attribution_saves_and_prints(tmp_path: Path):
    found = direct_logit_attribution(bound("gpt2", torch.float64), tokens(), 3, 5, by="head")
    found.save(tmp_path / "a.safetensors")
    again = LogitAttribution.load(tmp_path / "a.safetensors")
    assert torch.equal(again.parts[ATTN_Z[2]], found.parts[ATTN_Z[2]])
    assert torch.equal(again.total, found.total)
    assert repr(again) == repr(found)
    assert "unexplained" in repr(found)
    assert "<table" in found._repr_html_()
    assert len(found.to_frame()) == 2 * (3 * 4 + 3 + 1)
    assert found.plot().axes


def test_bad_requests_are_refused():
    graph = bound("gpt2", torch.float64)
    with pytest.raises(MetricError, match="token 48 is out of range"):
        direct_logit_attribution(graph, tokens(), 48)
    with pytest.raises(MetricError, match="token=-1 is no token"):
        direct_logit_attribution(graph, tokens(), [5, -1])
    spliced = graph.inject(Coordinates(ATTN_OUT[1], "c", orthonormal(32, 32)))
    with pytest.raises(
        HookGraphError, match=r"attn\.out\[1\] has a dictionary, and is divided among head and"
    ):
        direct_logit_attribution(spliced, tokens(), 5, by=["head", "latent"])
    assert ATTN_Z[0] in direct_logit_attribution(spliced, tokens(), 5, by="head").parts
    with pytest.raises(MetricError, match="pos=6 is out of range"):
        direct_logit_attribution(graph, tokens(), 3, pos=6)
    with pytest.raises(MetricError, match=r"token has shape \(3,\) for a batch of 2"):
        direct_logit_attribution(graph, tokens(), [3, 4, 5])
    with pytest.raises(HookGraphError, match="no dictionary is injected"):
        direct_logit_attribution(graph, tokens(), 3, by="latent")


def test_a_stream_that_is_no_sum_is_refused():
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )
    graph = bind(model.eval(), check=False)
    with pytest.raises(HookGraphError, match=r"attribution: resid.post\[1\] is not resid.pre\[0\]"):
        direct_logit_attribution(graph, torch.arange(3, 9)[None], 5, 6)


def test_a_hook_on_the_stream_is_told_by_the_residual():
    graph = bound("gpt2", torch.float64).hook(RESID_POST[0], lambda x: 2 * x)
    found = direct_logit_attribution(graph, tokens(), CORRECT, WRONG, pos=POS)
    assert (found.residual.abs() > 1e-3).all()


@pytest.mark.parametrize("name", ["granite", "olmo2"])
def test_heads_of_padded_rows_add_up_behind_a_norm_or_a_multiplier(name: str):
    model = build("causal", name).double()
    graph, ids = bind(model), torch.arange(10, 24).view(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = direct_logit_attribution(
        graph, {"input_ids": ids * mask, "attention_mask": mask}, 5, 8, by="head"
    )
    alone = direct_logit_attribution(graph, ids[1:, 3:], 5, 8, by="head")
    place = next(x for x in found.parts if x.type == ATTN_Z)
    torch.testing.assert_close(found.parts[place][1], alone.parts[place][0], rtol=1e-5, atol=1e-7)
    assert float(found.residual.abs().max()) < 1e-5
