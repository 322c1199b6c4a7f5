"""Large models are proven on what is like them: a tiny twin, or copies of some of their layers."""

import tempfile
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from hookgraph.binding import bind
from hookgraph.binding.data.anchors import Anchor
from hookgraph.binding.data.findings import Findings
from hookgraph.binding.proving import proving
from hookgraph.binding.proving.shrinking import VOCABULARY, shrinkings
from hookgraph.binding.proving.state import model_state
from hookgraph.binding.resolving import discovery
from hookgraph.binding.tracing.trace import Trace
from hookgraph.errors import UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import (
    ATTN_IN,
    ATTN_K,
    ATTN_PATTERN,
    FINAL_LN_SCALE,
    RESID_MID,
    RESID_POST,
    ROUTER_LOGITS,
)
from hookgraph_tests.families import FAMILIES, Size, bound, build, tokens
from hookgraph_tests.tiny import build as build_tiny
from hookgraph_tests.tiny.configs import tiny_config

IDS = tokens(1, 5)
DEEP = Size(layers=5)


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is proven whole; twins may still be as large as these."""
    monkeypatch.setattr(proving, "is_small", lambda model: False)


def changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[Anchor, PreTrainedModel], Anchor]) -> None:
    """Let discovery find other anchors than there are."""

    def discover(trace: Trace) -> Findings:
        found = discovery.discover(trace)
        model = trace.root.module
        assert isinstance(model, PreTrainedModel)
        return replace(found, anchors={x: change(a, model) for x, a in found.anchors.items()})

    monkeypatch.setattr("hookgraph.binding.binding.discover", discover)
    monkeypatch.setattr(proving, "discover", discover)


def same_values(one: HookGraph, other: HookGraph) -> bool:
    left, right = one.run(IDS, save=one.locations), other.run(IDS, save=one.locations)
    return all(torch.equal(left[x].nan_to_num(), right[x].nan_to_num()) for x in one.locations)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_twin_speaks_for_every_location_of_a_large_model(family: str):
    model = build(family, size=DEEP)
    before, noise = model_state(model), torch.random.get_rng_state()
    graph = bind(model)
    assert torch.equal(noise, torch.random.get_rng_state())
    assert graph.locations == bound(family, size=DEEP).locations
    assert graph.report.ok
    assert graph.report.metadata["proven on"].startswith("a tiny twin (2 layers, ")
    checked = {p.location for p in graph.report.proofs}
    assert {graph.report.peers.get(x, x) for x in graph.locations} <= checked
    assert graph.report.peers[RESID_POST[4]] == RESID_POST[0]
    assert not before.difference(model_state(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_model_in_bfloat16_has_the_locations_it_has_in_single_precision(family: str):
    graph = bind(build(family, torch.bfloat16))
    assert graph.locations == bound(family).locations
    assert graph.report.ok


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_model_that_accelerate_offloads_is_bound_like_one_in_memory(family: str, where: str):
    model = build(family)
    if where == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, tempfile.mkdtemp(), torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    graph = bind(model)
    assert graph.report.ok
    assert graph.locations == bound(family).locations
    assert same_values(bound(family), graph)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_twin_copies_of_layers_are_proven(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(proving, "tiny_twins", lambda *_: iter(()))
    model = build(family, dtype, DEEP)
    before = model_state(model)
    graph = bind(model)
    assert graph.locations == bound(family, size=DEEP).locations
    assert graph.report.ok
    count = 2 if family == "gemma2" else 1
    assert graph.report.metadata["proven on"] in (
        f"{n} layers of the model, copied, in float32" for n in (1, count)
    )
    assert not before.difference(model_state(model))


def test_weights_that_cannot_be_copied_are_proven_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proving, "tiny_twins", lambda *_: iter(()))
    model = build("gpt2")
    cpu_offload(model, torch.device("cpu"))
    graph = bind(model)
    assert graph.report.metadata["proven on"] == "1 layers of the model itself"
    assert graph.locations == bound("gpt2").locations


def test_what_fails_on_the_twin_is_absent_in_every_layer_of_the_model(monkeypatch: pytest.MonkeyPatch):
    def mistaken(anchor: Anchor, model: PreTrainedModel) -> Anchor:
        return replace(anchor, mechanism="input") if anchor.location.type == RESID_MID else anchor

    changed(monkeypatch, mistaken)
    graph = bind(build("llama", size=DEEP))
    assert RESID_MID not in {x.type for x in graph.locations}
    assert len(graph.every(RESID_POST)) == 5
    with pytest.raises(UnknownLocationError, match=r"conserved fails: resid.post = .* \(resid.mid\[0\]\)"):
        graph.run(IDS, save=[RESID_MID[4]])


def test_what_is_reached_otherwise_in_the_twin_is_proven_on_the_model(monkeypatch: pytest.MonkeyPatch):
    """A location of which the twin does not speak fails in its own layers, and with it its peers."""

    def mistaken(anchor: Anchor, model: PreTrainedModel) -> Anchor:
        wrong = anchor.location.type == RESID_MID and model.config.num_hidden_layers == 5
        return replace(anchor, mechanism="input") if wrong else anchor

    changed(monkeypatch, mistaken)
    graph = bind(build("llama", size=DEEP))
    assert RESID_MID not in {x.type for x in graph.locations}
    assert len(graph.every(ATTN_IN)) == 5
    text = graph.report.metadata["proven on"]
    assert "a tiny twin" in text
    assert "1 layers of the model, copied" in text


def test_what_has_no_effect_in_the_twin_is_proven_on_the_model():
    model = build_tiny("causal", "deepseek_v4")
    table = model.get_buffer("model.layers.0.mlp.gate.tid2eid")  # of experts, by token; zeros in a twin
    table.copy_(torch.stack([torch.arange(len(table)), torch.arange(len(table)) + 1], 1) % 4)
    graph = bind(model)
    assert graph.report.ok
    assert ROUTER_LOGITS[0] in graph.locations
    assert ROUTER_LOGITS[0] not in graph.report.peers
    text = graph.report.metadata["proven on"]
    assert "a tiny twin" in text
    assert "1 layers of the model, copied" in text
    table.zero_()
    with pytest.raises(UnknownLocationError, match="the logits do not depend on it"):
        bind(model, cached=False).run(IDS, save=[ROUTER_LOGITS[0]])


def test_numbers_that_are_fitted_come_from_the_twin(monkeypatch: pytest.MonkeyPatch):
    def mistaken(anchor: Anchor, model: PreTrainedModel) -> Anchor:
        rough = anchor.mechanism == "norm scale" and model.config.num_hidden_layers == 5
        return replace(anchor, epsilon=3e-3) if rough else anchor

    scale = FINAL_LN_SCALE
    exact = bound("llama", size=DEEP)  # found before discovery is mistaken
    expected = exact.run(IDS, save=[scale])[scale]
    changed(monkeypatch, mistaken)
    unproven = bind(build("llama", size=DEEP), check=False)
    assert not torch.equal(unproven.run(IDS, save=[scale])[scale], expected)
    graph = bind(build("llama", size=DEEP))
    assert torch.equal(graph.run(IDS, save=[scale])[scale], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_may_share_a_past_in_every_layer_if_they_may_in_the_twin(family: str):
    report = bind(build(family, size=DEEP)).report
    assert all(report.proves(ATTN_PATTERN[layer], "shared") for layer in range(DEEP.layers))
    assert not any(p.location == ATTN_PATTERN[4] for p in report.proofs)


def sharing_keys(last: int) -> PreTrainedModel:
    """Six layers of two kinds in turn, of which the last ones are given keys and values of earlier ones."""
    config = type(build_tiny("causal", "gemma4_text").config)
    kinds = ["sliding_attention", "full_attention"] * 3
    small = {"num_hidden_layers": 6, "layer_types": kinds, "num_kv_shared_layers": last, "sliding_window": 4}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(config, small)).double().eval()


def test_keys_are_edited_for_all_layers_that_share_them_though_others_do_in_the_twin():
    graph = bind(sharing_keys(2))
    assert graph.report.peers[ATTN_K[3]].layer not in (2, 3)
    for layer in range(4):
        edited = graph.hook(ATTN_K[layer], lambda x: 1.5 * x + 0.3)
        plain, cached = (edited.run({"input_ids": IDS, "use_cache": use}).logits for use in (False, True))
        torch.testing.assert_close(plain, cached)


def test_layers_that_do_not_run_without_others_are_proven_in_the_model_itself():
    graph = bind(sharing_keys(3))
    assert "layers of the model itself" in graph.report.metadata["proven on"]
    assert graph.report.ok
    assert ATTN_K[5] in graph.locations


def test_layers_of_each_kind_are_kept():
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=6, vocab_size=48)
    for shrinking in shrinkings(config, {6: 3}):
        assert shrinking.of(config).num_hidden_layers == 3
    assert config.num_hidden_layers == 6


def test_widths_shrink_together_and_counts_stay():
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        bos_token_id=128000,
        eos_token_id=[128001, 128008],
    )
    fewer, *others = [s.of(config) for s in shrinkings(config, {16: 2})]
    assert fewer.num_attention_heads == 8
    assert fewer.num_key_value_heads == 2
    for small in (fewer, *others):
        assert small.vocab_size == VOCABULARY
        assert max(small.bos_token_id, *small.eos_token_id) < VOCABULARY
        assert small.intermediate_size == 4 * small.hidden_size
        assert small.hidden_size // small.num_attention_heads >= 8
        LlamaForCausalLM(small)
    assert [s.num_attention_heads for s in others] == [32] * len(others)
    assert config.hidden_size == 2048


def test_a_mixture_keeps_more_experts_than_a_token_is_routed_to():
    config = MixtralConfig(num_local_experts=128, num_experts_per_tok=8)
    small = next(shrinkings(config, {32: 2})).of(config)
    assert small.num_local_experts == 16
    assert small.num_experts_per_tok == 8


def test_a_twin_of_a_mixture_speaks_for_it():
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=32,
        vocab_size=400,
    )
    model = MixtralForCausalLM(config).eval()
    graph = bind(model)
    assert graph.locations == bind(model, check=False).locations
    assert graph.report.metadata["proven on"].startswith("a tiny twin")
