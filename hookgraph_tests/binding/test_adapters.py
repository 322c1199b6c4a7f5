"""Adapters of every kind, and weights kept in other forms: edits reach the whole of a projection."""

import copy
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hookgraph.binding import bind
from hookgraph.binding.data.anchors import Anchor
from hookgraph.binding.data.findings import Findings
from hookgraph.binding.data.views import Columns
from hookgraph.binding.resolving import discovery
from hookgraph.binding.running.weights import affine_map
from hookgraph.binding.tracing.trace import Trace
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.hooks.handles import installed
from hookgraph.ontology.transformer import ATTN_OUT, ATTN_Q_IN, ATTN_RESULT, ATTN_Z, MLP_POST, MLP_PRE
from hookgraph.ontology.weights import W_O, W_out, b_O
from hookgraph_tests.families import Size, bound, build, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
IDS = tokens(2, 6)
SMALL = Size(layers=1)
TARGETS = ["q_proj", "o_proj", "down_proj"]

ADAPTERS: dict[str, peft.PeftConfig] = {
    "LoRA": peft.LoraConfig(r=2, target_modules=TARGETS, lora_dropout=0.5),
    "DoRA": peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "LoHa": peft.LoHaConfig(r=2, target_modules=TARGETS),
    "LoKr": peft.LoKrConfig(r=2, target_modules=TARGETS),
    "VeRA": peft.VeraConfig(r=2, target_modules=["q_proj", "o_proj"]),
    "AdaLoRA": peft.AdaLoraConfig(init_r=2, target_r=2, total_step=9, target_modules=TARGETS),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
    "IA3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["o_proj", "down_proj"]),
    "FourierFT": peft.FourierFTConfig(n_frequency=20, target_modules=TARGETS),
}


def adapted(name: str) -> Any:
    """A model with random adapters, the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(build("llama", torch.float64, SMALL), copy.deepcopy(ADAPTERS[name]))
    generator = torch.Generator().manual_seed(5)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model: Any = wrapped.get_base_model().double()
    return model.eval()


def agrees_with_hooks(graph: HookGraph, model: Any, places: dict[Any, nn.Module]) -> None:
    """Edits of what projections are given are those of hooks on the whole of each."""
    for place, module in places.items():
        halved = module.register_forward_pre_hook
        with installed(lambda halved=halved: halved(lambda m, args: (0.5 * args[0], *args[1:]))):
            expected = model(input_ids=IDS, use_cache=False).logits
        found = graph.hook(place, lambda x: 0.5 * x).run(IDS).logits
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def check_sums(graph: HookGraph) -> None:
    """What the heads write adds up to what attention adds, by the weights that the graph tells."""
    run = graph.run(IDS, save=[ATTN_Z[0], ATTN_RESULT[0], ATTN_OUT[0]])
    written = torch.einsum("bphd,hdm->bphm", run[ATTN_Z[0]], graph.weight(W_O, layer=0))
    torch.testing.assert_close(written, run[ATTN_RESULT[0]], rtol=1e-9, atol=1e-9)
    together = run[ATTN_RESULT[0]].sum(2) + graph.weight(b_O, layer=0)
    torch.testing.assert_close(together, run[ATTN_OUT[0]], rtol=1e-9, atol=1e-9)


# --- adapters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_edits_reach_adapters_of_every_kind(name: str):
    model = adapted(name)
    graph = bind(model)
    layer = model.model.layers[0]
    places = {ATTN_Z[0]: layer.self_attn.o_proj, ATTN_Q_IN[0]: layer.self_attn.q_proj}
    agrees_with_hooks(graph, model, {**places, MLP_POST[0]: layer.mlp.down_proj})
    check_sums(graph)
    assert set(bound("llama", size=SMALL).locations) == set(graph.locations)


def test_weights_are_those_of_evaluation_while_a_model_trains():
    model = adapted("LoRA")
    graph = bind(model, check=False)
    expected = graph.weight(W_out, layer=0)
    model.train()
    assert torch.equal(graph.weight(W_out, layer=0), expected)
    assert model.model.layers[0].mlp.down_proj.training


def test_adapters_switched_on_after_bind_are_reached():
    model = adapted("LoRA")
    wrappers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for module in wrappers:
        module.enable_adapters(False)
    graph = bind(model, check=False)
    for module in wrappers:
        module.enable_adapters(True)
    layer = model.model.layers[0]
    agrees_with_hooks(graph, model, {ATTN_Z[0]: layer.self_attn.o_proj, MLP_POST[0]: layer.mlp.down_proj})
    check_sums(graph)


class Bent(nn.Module):
    """A projection, and beside it one that is not linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.beside = base, copy.deepcopy(base)

    def forward(self, x: Tensor) -> Tensor:
        """Both together."""
        return self.base_layer(x) + self.beside(x.tanh())


def bent() -> Any:
    model: Any = build("llama", torch.float64, SMALL)
    model.model.layers[0].self_attn.o_proj = Bent(model.model.layers[0].self_attn.o_proj)
    model.model.layers[0].mlp.down_proj = Bent(model.model.layers[0].mlp.down_proj)
    return model


def test_adapters_that_are_not_linear_leave_no_single_projection():
    model = bent()
    graph = bind(model)
    agrees_with_hooks(graph, model, {ATTN_Z[0]: model.model.layers[0].self_attn.o_proj})
    assert "more is done to z before" in graph.report.absent[ATTN_RESULT[0]]
    assert graph.report.absent[MLP_POST[0]] == "no single projection ends this MLP"


@pytest.mark.parametrize(
    ("location", "mechanism", "heads", "source"),
    [
        (ATTN_Z, "input", 4, "attn.q"),
        (ATTN_RESULT, "head result", 4, "attn.q"),
        (MLP_POST, "input", 0, "mlp.pre"),
    ],
)
def test_what_gets_past_a_location_is_seen_in_the_proof(
    location: Any, mechanism: Any, heads: int, source: str, monkeypatch: pytest.MonkeyPatch
):
    path = "model.layers.0.self_attn.o_proj" if heads else "model.layers.0.mlp.down_proj"
    view = Columns(0, heads, 8, 8) if heads else None
    wrong = Anchor(location[0], mechanism, f"{path}.base_layer", 0, view)

    def discover(trace: Trace) -> Findings:
        found = discovery.discover(trace)
        before = Anchor(MLP_PRE[0], "input", "model.layers.0.mlp.act_fn", 0)
        return replace(found, anchors={**found.anchors, MLP_PRE[0]: before, location[0]: wrong})

    monkeypatch.setattr("hookgraph.binding.binding.discover", discover)
    graph = bind(bent())
    assert location[0] not in graph.locations
    failed = [p.note for p in graph.report.proofs if p.location == location[0] and not p.holds]
    end = "attn.out" if heads else "mlp.out"
    assert f"{end} follows from {location}, whatever {source} is" in failed


# --- weights in other forms -------------------------------------------------------------------


class Buffered(nn.Module):
    """A projection whose weight lies in buffers, as whole numbers and a scale or as it is."""

    def __init__(self, linear: nn.Linear, levels: int) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / levels if levels else None
        self.register_buffer("scale", scale)
        kept = weight if scale is None else (weight / scale).round().to(torch.int8)
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        """The projection."""
        kept: Any = self.kept
        return nn.functional.linear(x, kept if self.scale is None else kept.to(x.dtype) * self.scale)


@pytest.mark.parametrize("levels", [0, 127])
@pytest.mark.parametrize("parts", [("self_attn",), ("mlp",), ("self_attn", "mlp")])
def test_projections_without_parameters_are_bound(levels: int, parts: tuple[str, ...]):
    model: Any = build("llama", torch.float64, SMALL)
    for part in (getattr(model.model.layers[0], name) for name in parts):
        for name, module in list(part.named_children()):
            if isinstance(module, nn.Linear):
                setattr(part, name, Buffered(module, levels))
    graph = bind(model)
    layer = model.model.layers[0]
    places = {ATTN_Z[0]: layer.self_attn.o_proj, ATTN_Q_IN[0]: layer.self_attn.q_proj}
    agrees_with_hooks(graph, model, {**places, MLP_POST[0]: layer.mlp.down_proj})
    check_sums(graph)
    assert graph.report.ok


class Packed(nn.Module):
    """A projection whose weight tells nothing of its width: two numbers in one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        high, low = linear.weight.detach().sign().flatten().unflatten(0, (2, -1))
        self.register_buffer("pairs", (3 * high + low).to(torch.int8))
        self.shape = linear.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """The projection."""
        pairs: Any = self.pairs
        high = (pairs.to(x.dtype) / 3).round()
        return nn.functional.linear(x, torch.cat([high, pairs - 3 * high]).view(self.shape))


def test_a_projection_that_does_not_tell_how_wide_its_input_is_leaves_its_weight_out():
    model: Any = build("llama", torch.float64, SMALL)
    attention = model.model.layers[0].self_attn
    attention.o_proj = Packed(attention.o_proj)
    graph = bind(model)
    agrees_with_hooks(graph, model, {ATTN_Z[0]: attention.o_proj})
    assert ATTN_RESULT[0] in graph.report.absent
    with pytest.raises(LookupError, match="Packed does not tell how wide its input is"):
        affine_map(attention.o_proj)
