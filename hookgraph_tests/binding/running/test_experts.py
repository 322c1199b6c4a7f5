"""Mixtures of experts: what each location holds, and what an edit of it does, against torch by hand."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import hookgraph as hg
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import (
    ENCODER,
    EXPERT_OUT,
    EXPERT_POST,
    LOGITS,
    MLP_IN,
    MLP_OUT,
    MLP_POST,
    ROUTED_OUT,
    ROUTER_INDICES,
    ROUTER_LOGITS,
    ROUTER_WEIGHTS,
    SHARED_GATE,
    SHARED_OUT,
    SHARED_POST,
)
from hookgraph.ontology.locations import LocationType
from hookgraph_tests.families import model_of
from hookgraph_tests.tiny import build

ROUTED = {ROUTER_LOGITS, ROUTER_INDICES, ROUTER_WEIGHTS, EXPERT_POST, EXPERT_OUT, ROUTED_OUT}
SHARED = {SHARED_POST, SHARED_OUT}
FAMILIES: Mapping[str, set[LocationType]] = {
    "mixtral": ROUTED,
    "olmoe": ROUTED,
    "granitemoe": ROUTED,
    "gpt_oss": ROUTED,
    "qwen3_moe": ROUTED,
    "qwen2_moe": ROUTED | SHARED | {SHARED_GATE},
    "deepseek_v2": ROUTED | SHARED,
    "deepseek_v3": ROUTED | SHARED,
}
BY_HAND = ("mixtral", "gpt_oss", "deepseek_v3")
LAYER = 1
IDS = torch.randint(8, 100, (2, 6), generator=torch.Generator().manual_seed(3))


def module_of(model: PreTrainedModel, ending: str) -> Any:
    """The experts, or the router, of the layer that the tests look at."""
    return next(m for n, m in model.named_modules() if n.endswith(f"layers.{LAYER}.mlp.{ending}"))


@cache
def graph_of(family: str) -> HookGraph:
    """The graph of a model in double precision, norms and routers apart; experts one by one."""
    model = build("causal", family)
    model.set_experts_implementation("eager")
    return hg.bind(nn.Module.to(model, torch.float64))


def one_expert(family: str, model: PreTrainedModel, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(neurons, output) of an expert for one token, written by hand."""
    experts = module_of(model, "experts")
    into, out = experts.gate_up_proj[expert], experts.down_proj[expert]
    if family == "gpt_oss":
        both = x @ into + experts.gate_up_proj_bias[expert]
        gate, up = both[0::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        neurons = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
        return neurons, neurons @ out + experts.down_proj_bias[expert]
    gate, up = linear(x, into).chunk(2)
    neurons = nn.functional.silu(gate) * up
    return neurons, linear(neurons, out)


def mixture(
    family: str, model: PreTrainedModel, x: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(neurons, outputs, weighted sum) of all tokens, token by token and expert by expert."""
    rows = [
        [one_expert(family, model, int(e), x[b, p]) for e in indices[b, p]]
        for b in range(x.shape[0])
        for p in range(x.shape[1])
    ]
    neurons = torch.stack([torch.stack([n for n, _ in row]) for row in rows]).unflatten(0, x.shape[:2])
    outputs = torch.stack([torch.stack([y for _, y in row]) for row in rows]).unflatten(0, x.shape[:2])
    return neurons, outputs, (weights[..., None] * outputs).sum(2)


# --- every family -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_has_these_locations_each_proven_by_an_equation(family: str):
    graph = graph_of(family)
    listed = {x.type for x in graph.locations if x.layer == LAYER and x.type.name.startswith("moe.")}
    assert listed == FAMILIES[family]
    equations = {p.location.type for p in graph.report.proofs if p.invariant == "conserved"}
    assert listed <= equations
    assert graph.report.ok


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_named_by_the_axes(family: str):
    graph = graph_of(family)
    located = [x for x in graph.locations if x.type.name.startswith("moe.") and x.layer == LAYER]
    experts = module_of(model_of(graph), "experts") if family in BY_HAND else None
    for location, value in graph.run(IDS, save=located).items():
        assert value.shape[:2] == IDS.shape
        assert value.ndim == len(location.dims)
        sizes = dict(zip(location.dims, value.shape, strict=True))
        assert sizes.get(hg.Dimension.CHOICE, 2) == 2
        if experts is not None:
            assert sizes.get(hg.Dimension.EXPERT, experts.num_experts) == experts.num_experts


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_changes_nothing(family: str):
    graph = graph_of(family)
    plain = graph.run(IDS).logits
    located = [x for x in graph.locations if x.type.name.startswith("moe.")]
    assert torch.equal(graph.run(IDS, save=[*located, LOGITS]).logits, plain)


# --- against torch by hand --------------------------------------------------------------------


@pytest.mark.parametrize("family", BY_HAND)
def test_neurons_and_outputs_are_those_of_the_chosen_experts(family: str):
    graph = graph_of(family)
    wanted = (MLP_IN, ROUTER_INDICES, ROUTER_WEIGHTS, EXPERT_POST, EXPERT_OUT, ROUTED_OUT)
    run = graph.run(IDS, save=[kind[LAYER] for kind in wanted])
    x, indices, weights, *got = (run[kind[LAYER]] for kind in wanted)
    for found, expected in zip(got, mixture(family, model_of(graph), x, indices, weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", BY_HAND)
def test_an_edit_of_the_indices_re_routes(family: str):
    graph = graph_of(family)
    model = model_of(graph)
    shift: Callable[[Tensor], Tensor] = lambda e: (e + 1) % module_of(model, "experts").num_experts  # noqa: E731
    wanted = (MLP_IN, ROUTER_INDICES, ROUTER_WEIGHTS, EXPERT_POST, EXPERT_OUT, ROUTED_OUT)
    plain = graph.run(IDS, save=[kind[LAYER] for kind in (*wanted, MLP_OUT)])
    x, indices, weights = (plain[kind[LAYER]] for kind in wanted[:3])
    run = graph.hook(ROUTER_INDICES[LAYER], shift).run(IDS, save=[kind[LAYER] for kind in (*wanted, MLP_OUT)])
    assert torch.equal(run[ROUTER_INDICES[LAYER]], shift(indices))
    neurons, outputs, total = mixture(family, model, x, shift(indices), weights)
    torch.testing.assert_close(run[EXPERT_POST[LAYER]], neurons, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run[EXPERT_OUT[LAYER]], outputs, rtol=1e-9, atol=1e-9)
    moved = plain[MLP_OUT[LAYER]] + total - plain[ROUTED_OUT[LAYER]]
    torch.testing.assert_close(run[MLP_OUT[LAYER]], moved, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(run.logits, plain.logits)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_an_edit_of_the_logits_chooses_anew(family: str):
    graph, expert = graph_of(family), 3
    favoured = graph.hook(ROUTER_LOGITS[LAYER].at(expert=expert), lambda r: r + 100.0)
    indices = favoured.run(IDS, save=[ROUTER_INDICES[LAYER]])[ROUTER_INDICES[LAYER]]
    assert bool((indices == expert).any(-1).all())


@pytest.mark.parametrize("kind", [EXPERT_POST, EXPERT_OUT])
def test_an_edit_of_one_choice_of_one_token_moves_its_share_only(kind: LocationType):
    graph, place = graph_of("mixtral"), kind[LAYER].at(batch=1, pos=2, choice=1)
    save = [ROUTED_OUT[LAYER], ROUTER_WEIGHTS[LAYER], EXPERT_OUT[LAYER]]
    plain, run = (g.run(IDS, save=save) for g in (graph, graph.hook(place, torch.zeros_like)))
    expected = plain[ROUTED_OUT[LAYER]].clone()
    share = plain[ROUTER_WEIGHTS[LAYER]][1, 2, 1] * plain[EXPERT_OUT[LAYER]][1, 2, 1]
    expected[1, 2] -= share
    torch.testing.assert_close(run[ROUTED_OUT[LAYER]], expected, rtol=1e-9, atol=1e-9)


def test_shared_experts_are_added_through_their_gate():
    graph = graph_of("qwen2_moe")
    save = [kind[LAYER] for kind in (ROUTED_OUT, SHARED_GATE, SHARED_OUT, MLP_OUT)]
    routed, gate, shared, total = graph.run(IDS, save=save).values()
    torch.testing.assert_close(total, routed + gate.sigmoid() * shared, rtol=1e-9, atol=1e-9)
    run = graph.hook(SHARED_GATE[LAYER], lambda g: g - 1e4).run(IDS, save=[MLP_OUT[LAYER]])
    torch.testing.assert_close(run[MLP_OUT[LAYER]], routed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [ROUTER_LOGITS, ROUTER_WEIGHTS, EXPERT_POST, EXPERT_OUT, ROUTED_OUT])
def test_the_gradient_is_what_an_edit_does(kind: LocationType):
    graph, here = graph_of("mixtral"), kind[LAYER]
    metric: Callable[[Tensor], Tensor] = lambda logits: logits[:, -1, 5]  # noqa: E731
    run = graph.run(IDS, save=[here, here.grad], metric=metric)
    direction = torch.randn(run[here].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def measured(size: float) -> float:
        moved = graph.hook(here, lambda x: x + size * direction.to(x.dtype)).run(IDS, metric=metric).metric
        assert moved is not None
        return float(moved.sum())

    slope = (measured(1e-3) - measured(-1e-3)) / 2e-3
    assert float((run[here.grad] * direction).sum()) == pytest.approx(slope, rel=1e-2)


# --- the model's own kernel -------------------------------------------------------------------


def test_only_the_layer_whose_experts_are_read_leaves_its_kernel():
    model = build("causal", "mixtral")
    assert model.config._experts_implementation == "grouped_mm"
    graph = hg.bind(model, check=False)
    others = {n: vars(m).get("config") for n, m in model.named_modules() if f"layers.{LAYER}." not in n}
    with graph.hook(EXPERT_POST[LAYER], lambda n: None).attached():
        assert module_of(model, "experts").config._experts_implementation == "hookgraph"
        assert all(vars(model.get_submodule(n)).get("config") is config for n, config in others.items())
        hooked = model(IDS).logits
    assert module_of(model, "experts").config is model.config
    torch.testing.assert_close(hooked, model(IDS).logits, rtol=1e-5, atol=1e-6)


# --- what is refused or absent ----------------------------------------------------------------


def test_an_expert_that_does_not_exist_is_refused():
    graph = graph_of("mixtral").hook(ROUTER_INDICES[LAYER].at(pos=0, choice=0), lambda e: e * 0 + 99)
    with pytest.raises(
        hg.ShapeMismatchError, match=r"moe.router_indices\[1\] holds .* 99; .* of \d+ experts"
    ):
        graph.run(IDS)


def test_indices_have_no_gradient():
    graph, place = graph_of("mixtral"), ROUTER_INDICES[LAYER].grad
    with pytest.raises(hg.MetricError, match=r"moe.router_indices\[1\] holds integers"):
        graph.run(IDS, save=[place], metric=lambda logits: logits[:, -1, 0])
    with pytest.raises(hg.MetricError, match=r"moe.router_indices\[1\] holds integers"):
        graph.hook(place, lambda g: g).run(IDS)


def test_a_mixture_has_no_neurons_outside_its_experts():
    with pytest.raises(hg.UnknownLocationError, match=r"mixture of experts: see moe\.expert_post"):
        graph_of("mixtral").run(IDS, save=[MLP_POST[LAYER]])


def test_experts_by_code_of_their_own_have_router_logits_and_reasons_for_the_rest():
    layers = {"num_layers": 2, "num_sparse_encoder_layers": 2}
    decoder = {"num_decoder_layers": 2, "num_sparse_decoder_layers": 2}
    width = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_experts": 4, "vocab_size": 48}
    config = SwitchTransformersConfig(**width, **layers, **decoder, decoder_start_token_id=0)
    graph = hg.bind(SwitchTransformersForConditionalGeneration(config), check=False)
    assert len(graph.every(ENCODER.ROUTER_LOGITS)) == len(graph.every(ROUTER_LOGITS)) == 2
    layer = 1
    with pytest.raises(hg.UnknownLocationError, match="do not go through transformers' experts interface"):
        graph.hook(EXPERT_POST[layer], lambda n: None)
