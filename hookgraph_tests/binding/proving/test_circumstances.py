"""The same values with a cache, with padding and by the other kernel; and that the check can fail."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hookgraph.binding import HuggingFaceBinding, bind
from hookgraph.binding.data.views import Scaled
from hookgraph.binding.proving import conformance, slopes
from hookgraph.binding.proving.circumstances import Subject, Verdict, check_circumstances
from hookgraph.binding.proving.watching import Watch
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import ATTN_SCORES, LOGITS, MLP_IN, MLP_OUT, RESID_POST, RESID_PRE
from hookgraph_tests.families import FAMILIES, binding_of, bound, build, layers_of, tokens

IDS = tokens(1, 6)
EXAMPLE = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
CHOSEN = (RESID_PRE[1], MLP_OUT[1], LOGITS)
SDPA = [name for name, family in FAMILIES.items() if family.attention == "sdpa"]
CIRCUMSTANCES = ("cached", "padded", "fused")


def with_view(family: str, get: Callable[[nn.Module, Tensor], Tensor], patch: pytest.MonkeyPatch) -> Verdict:
    """What is said of a binding whose `mlp.out` of layer 1 is read through a view of one's own."""
    binding = binding_of(bound(family))
    model = binding.model
    patch.setattr(Scaled, "get", lambda self, raw: get(model, raw))
    patch.setattr(Scaled, "put", lambda self, raw, value: raw)
    anchors = binding.findings.anchors
    wrong = {**anchors, MLP_OUT[1]: replace(anchors[MLP_OUT[1]], view=Scaled(1.0))}
    candidate = HuggingFaceBinding(model, replace(binding.findings, anchors=wrong))
    return check_circumstances(Subject(candidate, EXAMPLE), CHOSEN)


def failed(verdict: Verdict) -> set[tuple[Location, str]]:
    return {(p.location, p.invariant) for p in verdict.proofs if not p.holds}


def centred(model: nn.Module, raw: Tensor) -> Tensor:
    return raw - raw.mean(1, keepdim=True)


def by_kernel(model: Any, raw: Tensor) -> Tensor:
    return raw * (2.0 if model.config._attn_implementation == "eager" else 1.0)


WRONG = {
    "it depends on what else is in the pass": (centred, {"cached", "padded"}),
    "it depends on the kernel": (by_kernel, {"fused"}),
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("get", "invariants"), WRONG.values(), ids=WRONG)
def test_a_location_that_is_not_the_same_is_found(
    family: str, get: Any, invariants: set[str], monkeypatch: pytest.MonkeyPatch
):
    verdict = with_view(family, get, monkeypatch)
    assert failed(verdict) == {(MLP_OUT[1], name) for name in invariants}
    assert {(p.location, p.invariant) for p in verdict.proofs} == {
        (x, i) for x in CHOSEN for i in CIRCUMSTANCES
    }


def test_a_location_that_cannot_be_read_there_is_found_alone():
    binding = binding_of(bound("llama"))
    anchors = binding.findings.anchors
    wrong = {**anchors, MLP_OUT[1]: replace(anchors[MLP_OUT[1]], slot="nothing")}
    candidate = HuggingFaceBinding(binding.model, replace(binding.findings, anchors=wrong))
    verdict = check_circumstances(Subject(candidate, EXAMPLE), CHOSEN)
    assert failed(verdict) == {(MLP_OUT[1], name) for name in CIRCUMSTANCES}
    assert all(p.note for p in verdict.proofs if not p.holds)


def test_nothing_is_claimed_where_the_model_itself_differs():
    binding = binding_of(bound("gpt2"))
    model = copy.deepcopy(binding.model)
    mlp = layers_of("gpt2", model)[0].get_submodule("mlp")
    mlp.register_forward_hook(lambda m, args, out: out + out.mean(1, keepdim=True))
    verdict = check_circumstances(Subject(HuggingFaceBinding(model, binding.findings), EXAMPLE), CHOSEN)
    assert {p.invariant for p in verdict.proofs} == {"fused"}
    reasons = {g.invariant: g.reason for g in verdict.gaps}
    assert set(reasons) == {"cached", "padded"}
    assert all(x.startswith("the model's own logits differ by ") for x in reasons.values())


def test_attention_is_left_with_the_kernel_that_it_had():
    binding = binding_of(bound("llama"))
    check_circumstances(Subject(binding, EXAMPLE), CHOSEN)
    assert {m.config._attn_implementation for m in binding.model.modules() if hasattr(m, "config")} == {
        "sdpa"
    }


@pytest.mark.parametrize("family", SDPA)
def test_scores_of_rows_of_padding_do_not_spread_in_double_precision(family: str):
    """A softmax in single precision makes minus infinity of the lowest number of double precision.

    Gemma-2 is given its mask by transformers, with that number in it: its own logits are no numbers there.
    """
    graph = bind(build(family, torch.float64), check=False)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    hooked = graph
    for location in graph.every(ATTN_SCORES):
        hooked = hooked.hook(location, lambda x: x.clone())  # the scores are those the pass goes on with
    run = hooked.run({"input_ids": IDS, "attention_mask": mask})
    assert bool(run.logits[:, 2:].isfinite().all())
    plain = graph.run({"input_ids": IDS, "attention_mask": mask}).logits
    torch.testing.assert_close(run.logits[:, 2:], plain[:, 2:], rtol=1e-5, atol=1e-5)


def test_positions_that_begin_behind_one_for_padding_do_so_in_padded_rows():
    config = RobertaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=20,
        pad_token_id=1,
    )
    graph = bind(RobertaForMaskedLM(config).eval(), check=False)
    padded = {"input_ids": torch.cat([torch.ones_like(IDS[:, :2]), IDS], 1)}
    padded["attention_mask"] = (padded["input_ids"] != 1).long()
    torch.testing.assert_close(graph.run(padded).logits[:, 2:], graph.run(IDS).logits)


def test_a_model_whose_cache_holds_states_is_followed_from_pass_to_pass():
    config = MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=None)
    graph = bind(MambaForCausalLM(config).eval(), check=False)
    found = graph.generate(IDS, save=[RESID_POST[1]], max_new_tokens=3, do_sample=False)
    assert [(s.past, s.length) for s in found.spans] == [(0, 6), (6, 1), (7, 1)]
    whole = graph.run(found.tokens[:, :-1], save=[RESID_POST[1]])
    torch.testing.assert_close(found[RESID_POST[1]], whole[RESID_POST[1]], rtol=1e-4, atol=1e-5)


# --- precision and choices ----------------------------------------------------------------------


def test_a_pass_that_goes_through_single_precision_is_told_from_one_that_does_not():
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with Watch() as exact:
        (x * torch.arange(3).double().float().double()).softmax(-1)
    with Watch() as rounded:
        x.softmax(-1, dtype=torch.float32)
        x.to(torch.float32)
    assert (exact.narrowed, rounded.narrowed) == (0, 2)


def test_rows_that_choose_otherwise_are_told():
    one = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    with Watch() as clean:
        one.topk(2)
    with Watch() as edited:
        torch.topk(torch.cat([one, one.flip(1), one]), 2)
    assert edited.changed(clean, 3).tolist() == [False, True, False]


def tied() -> tuple[HuggingFaceBinding, dict[str, Any]]:
    """Two experts that every token of the example likes as well as each other."""
    config = MixtralConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    model = MixtralForCausalLM(config).eval().double()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    graph = bind(model, check=False)
    example = {"input_ids": IDS, "use_cache": False}
    read = graph.run(IDS, save=[MLP_IN[0]])[MLP_IN[0]][0]
    gate = model.get_submodule("model.layers.0.mlp.gate").get_parameter("weight")
    with torch.no_grad():
        apart = torch.randn(32, dtype=torch.float64)
        gate[1] = gate[0] + apart - read.mT @ torch.linalg.pinv(read.mT) @ apart
    return binding_of(graph), example


def test_where_a_choice_changes_within_the_step_another_point_is_taken(monkeypatch: pytest.MonkeyPatch):
    binding, example = tied()

    def proofs() -> list[tuple[bool, str]]:
        report = conformance.check(binding, example, [RESID_PRE[0]])
        return [(p.holds, p.note) for p in report.proofs if p.invariant == "edit = gradient"]

    assert proofs() == [(True, "at another point, as a choice changes within the step at this one")]
    monkeypatch.setattr(slopes, "_POINTS", 0)
    ((holds, note),) = proofs()
    assert not holds
    assert note.endswith(", where a choice changes")
