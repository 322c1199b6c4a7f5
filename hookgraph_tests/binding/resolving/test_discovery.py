import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hookgraph.binding import HuggingFaceBinding, bind, check
from hookgraph.binding.data.anchors import Anchor
from hookgraph.binding.data.views import Columns
from hookgraph.errors import BindingError, UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import (
    ATTN_K,
    ATTN_K_PRE,
    ATTN_LN_SCALE,
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Q,
    ATTN_Q_PRE,
    ATTN_V,
    ATTN_Z,
    DECODER,
    EMBED,
    ENCODER,
    FINAL_LN_SCALE,
    LOGITS,
    MLP_LN_SCALE,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
)
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM, Row
from hookgraph_tests.families import (
    FAMILIES,
    LAYERS,
    STORY_SIZE,
    Size,
    binding_of,
    bound,
    build,
    layers_of,
    model_of,
    tokens,
)
from hookgraph_tests.toy import toy_graph
from hookgraph_tests.unchecked import unchecked

ABSENT = {
    "gpt2": {ATTN_Q_PRE: "use attn.q", ATTN_K_PRE: "use attn.k"},
    "llama": {},
    "neox": {RESID_MID: "updates read the layer's input, so no such sum exists"},
    "gemma2": {},
}
OTHERS = (
    "XATTN_",
    "MIXER_",
    "ROUTER_",
    "ROUTED_",
    "EXPERT_",
    "SHARED_",
    "EXTRA_OUT",
    "RESID_XMID",
    "STREAMS_",
)
"""Locations of models that attend to another stack, mix without attention, have experts or a third branch."""
EVERYTHING = [kind for name, kind in vars(DECODER).items() if not name.startswith(OTHERS)]


# --- what is listed ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_location_of_the_vocabulary_is_listed_or_absent_for_a_reason(family: str):
    graph = bound(family)
    expected = [
        place
        for kind in EVERYTHING
        if kind not in ABSENT[family]
        for place in (kind[:LAYERS] if isinstance(kind, LocationType) else (kind,))
    ]
    assert set(graph.locations) == set(expected)
    assert list(graph.locations) == sorted(expected, key=lambda x: x.order)
    for kind, reason in ABSENT[family].items():
        for layer in range(LAYERS):
            with pytest.raises(UnknownLocationError, match=reason):
                graph.check(kind[layer])


@pytest.mark.parametrize("name", [n for n in vars(DECODER) if n.startswith(OTHERS)])
def test_locations_of_other_kinds_of_models_are_unknown_with_near_names(name: str):
    with pytest.raises(UnknownLocationError, match=r"this model has no location [\w.]+\[1\]: .*did you mean"):
        bound("llama").check(getattr(DECODER, name)[1])


REASONS: dict[str, tuple[Callable[[HookGraph], object], str]] = {
    "mixer": (
        lambda g: g.every(DECODER.MIXER_OUT),
        "no layer of its decoder is known to have a mixer other than attention; did you mean",
    ),
    "cross": (
        lambda g: g.check(DECODER.XATTN_Z[0]),
        "no layer of its decoder is known to have cross-attention; did you mean",
    ),
    "stack": (lambda g: g.every(ENCODER.ATTN_Z), "it has no encoder of which the layers were found; did you"),
}


@pytest.mark.parametrize(("ask", "reason"), REASONS.values(), ids=REASONS)
def test_what_no_layer_has_is_told_with_the_reason(ask: Callable[[HookGraph], object], reason: str):
    with pytest.raises(UnknownLocationError, match=reason):
        ask(bound("gpt2"))


def test_a_binding_prints_as_what_it_binds():
    graph = bound("gpt2")
    assert re.fullmatch(
        rf"HuggingFaceBinding of GPT2LMHeadModel: {LAYERS} layers of its decoder, \d+ locations",
        repr(graph.binding),
    )
    assert re.fullmatch(
        rf"HookGraph of GPT2LMHeadModel: {LAYERS} layers, \d+ locations, 0 hooks, 0 subgraphs", repr(graph)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_boundaries_and_updates_are_what_huggingface_calls_hidden_states(family: str):
    graph = bound(family, torch.float64)
    model, ids = model_of(graph), tokens()
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    stream = (RESID_PRE, ATTN_OUT, MLP_OUT, RESID_POST)
    run = graph.run(ids, save=[*(x for kind in stream for x in graph.every(kind)), LOGITS])
    for layer in range(LAYERS):
        assert torch.equal(run[RESID_PRE[layer]], states[layer])
        if layer + 1 < LAYERS:  # the last of the states is after the final norm
            assert torch.equal(run[RESID_POST[layer]], states[layer + 1])
        updates = run[ATTN_OUT[layer]] + run[MLP_OUT[layer]]
        torch.testing.assert_close(run[RESID_PRE[layer]] + updates, run[RESID_POST[layer]])
    assert torch.equal(run[LOGITS], model(input_ids=ids).logits)


def side_by_side(start: int, count: int) -> Columns:
    return Columns(start, count, 8, 8)


def interleaved(start: int) -> Columns:
    return Columns(start, 4, 24, 8)


VIEWS: dict[str, dict[LocationType, Columns]] = {
    "gpt2": {ATTN_Q: side_by_side(0, 4), ATTN_K: side_by_side(32, 4), ATTN_V: side_by_side(64, 4)},
    "llama": {ATTN_Q_PRE: side_by_side(0, 4), ATTN_K_PRE: side_by_side(0, 2), ATTN_V: side_by_side(0, 2)},
    "neox": {ATTN_Q_PRE: interleaved(0), ATTN_K_PRE: interleaved(8), ATTN_V: interleaved(16)},
    "gemma2": {ATTN_Q_PRE: side_by_side(0, 4), ATTN_K_PRE: side_by_side(0, 2), ATTN_V: side_by_side(0, 2)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_found_in_the_features_of_projections(family: str):
    anchors = binding_of(bound(family)).findings.anchors
    for kind, view in {**VIEWS[family], ATTN_Z: side_by_side(0, 4)}.items():
        assert all(anchors[kind[layer]].view == view for layer in range(LAYERS)), kind


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_found_with_their_epsilon(family: str):
    graph = bound(family)
    config = model_of(graph).config
    names = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
    (epsilon,) = (getattr(config, name) for name in names if hasattr(config, name))
    scales = [*graph.every(ATTN_LN_SCALE), *graph.every(MLP_LN_SCALE), FINAL_LN_SCALE]
    found = {binding_of(graph).findings.anchors[x].epsilon for x in scales}
    centred = {binding_of(graph).findings.anchors[x].centred for x in scales}
    assert (found, centred) == ({epsilon}, {family in ("gpt2", "neox")})


def test_the_sum_inside_a_layer_is_changed_in_place_not_as_the_norms_input():
    for family in ("gpt2", "llama", "gemma2"):
        anchors = binding_of(bound(family)).findings.anchors
        assert {anchors[RESID_MID[layer]].mechanism for layer in range(LAYERS)} == {"sum"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_depends_on_neither_dtype_nor_seed(family: str):
    def anchors(model: PreTrainedModel) -> dict[Location, Anchor]:
        return binding_of(bind(model, check=False)).findings.anchors

    expected = binding_of(bound(family)).findings.anchors
    assert anchors(build(family, torch.bfloat16, seed=1)) == expected
    assert binding_of(bound(family, torch.float64)).findings.anchors == expected


def test_anchors_print_as_one_readable_line():
    anchors = binding_of(bound("neox")).findings.anchors
    assert str(anchors[ATTN_V[1]]) == (
        "output of gpt_neox.layers.1.attention.query_key_value as "
        "Columns(start=16, count=4, stride=24, width=8)"
    )
    assert str(anchors[ATTN_Q[1]]) == "interior query of gpt_neox.layers.1.attention"
    assert str(anchors[LOGITS]) == "output of the model['logits']"


@pytest.mark.parametrize("family", FAMILIES)
def test_larger_models_are_resolved_alike(family: str):
    graph = bound(family, size=STORY_SIZE)
    assert len(graph.every(RESID_POST)) == STORY_SIZE.layers
    kinds = {x.type for x in graph.locations}
    assert kinds == {x.type for x in bound(family).locations}


# --- binding changes nothing ------------------------------------------------------------------


@pytest.mark.parametrize("proven", [True, False], ids=["proven", "bound only"])
@pytest.mark.parametrize("family", FAMILIES)
def test_binding_leaves_the_model_as_it_was(family: str, proven: bool):
    model = build(family, size=Size(layers=1))
    (some,) = layers_of(family, model)
    some.train()
    next(model.parameters()).requires_grad_(False)
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    weights = {name: (p.clone(), p.requires_grad, p._version) for name, p in model.named_parameters()}
    config, state = model.config, torch.random.get_rng_state()
    bind(model, check=proven)
    assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == flags
    for name, parameter in model.named_parameters():
        before, requires_grad, version = weights[name]
        assert torch.equal(parameter, before)
        assert (parameter.requires_grad, parameter._version) == (requires_grad, version)
        assert parameter.grad is None
    assert model.config is config
    assert torch.equal(torch.random.get_rng_state(), state)


def test_binding_twice_gives_two_graphs_of_one_model():
    model = build("gpt2")
    first, second = bind(model, check=False), bind(model, check=False)
    assert first.locations == second.locations
    ids = tokens()
    assert torch.equal(first.run(ids).logits, second.run(ids).logits)


# --- what cannot be bound ---------------------------------------------------------------------


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        for layer in self.layers:
            input_ids = layer(input_ids)
        return input_ids


def resnet() -> nn.Module:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    return ResNetForImageClassification(config)


class Bigram(PreTrainedModel):
    """A transformers model without layers."""

    def __init__(self) -> None:
        super().__init__(BertConfig(vocab_size=16, hidden_size=8, num_attention_heads=2))
        self.table = nn.Embedding(16, 8)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> dict[str, Tensor]:
        return {"logits": self.table(input_ids) @ self.table.weight.T}


class Refusing(Bigram):
    def forward(self, input_ids: Tensor, use_cache: bool = False) -> dict[str, Tensor]:
        raise ValueError("I want pixels")


UNBINDABLE = {
    "linear": (lambda: nn.Linear(3, 3), "Linear is not a transformers model (a PreTrainedModel): bind the"),
    "convolution": (Convolution, "Convolution is not a transformers model"),
    "image model": (
        resnet,
        "ResNetForImageClassification is not a transformer that hookgraph can bind: no list of layers",
    ),
    "no module": (
        lambda: "gpt2",
        "expected a transformers model, found str 'gpt2': load one first, as with Auto",
    ),
    "nothing": (lambda: None, "expected a transformers model, found NoneType: load one first"),
    "no layers": (
        Bigram,
        "Bigram is not a transformer that hookgraph can bind: no list of layers feeds one layer's output",
    ),
    "cannot be run": (
        Refusing,
        "Refusing is not a transformer that hookgraph can bind: running it on the example failed with "
        "ValueError: I want pixels",
    ),
}


@pytest.mark.parametrize(("make", "message"), UNBINDABLE.values(), ids=UNBINDABLE)
def test_a_model_that_is_no_transformer_says_why(make: type[nn.Module], message: str):
    model = make()
    with unchecked(), pytest.raises(BindingError, match=re.escape(message)):
        bind(model)  # pyright: ignore[reportArgumentType]
    if isinstance(model, nn.Module):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert model.training


def test_a_model_without_logits_has_its_layers_and_says_what_is_missing():
    base = build("llama", size=Size(layers=1)).get_submodule("model")
    assert isinstance(base, PreTrainedModel)
    graph = bind(base)
    assert graph.every(RESID_POST) == (RESID_POST[0],)
    assert EMBED in graph.locations
    with pytest.raises(UnknownLocationError, match="no location logits: the model returns no logits"):
        graph.check(LOGITS)
    assert torch.equal(graph.run(tokens()).logits, base(tokens()).last_hidden_state)


def test_an_encoder_is_bound_by_the_same_code():
    config = BertConfig(
        vocab_size=16, hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=12
    )
    graph = bind(BertForMaskedLM(config).eval())
    assert graph.report.ok, graph.report
    assert {ATTN_OUT[1], MLP_OUT[1], ATTN_Z[1], RESID_POST[1]} <= set(graph.locations)
    pattern = graph.run(torch.tensor([[3, 4, 5]]), save=[ATTN_PATTERN[0]])[ATTN_PATTERN[0]]
    assert pattern[0, 0, 0, 2] > 0, "every position attends to every other"


def test_only_the_binding_of_a_transformers_model_can_be_checked_again():
    with pytest.raises(BindingError, match="ToyBinding is not the binding of a transformers model"):
        check(toy_graph())


def test_a_bound_model_tells_what_results_should_remember():
    graph = bound("gpt2")
    assert isinstance(graph.binding, HuggingFaceBinding)
    assert graph.binding.metadata == {
        "model": "gpt2",
        "revision": "",
        "class": "GPT2LMHeadModel",
        "dtype": "float32",
    }
    assert graph.run(tokens()).metadata == graph.binding.metadata


class Onto(nn.Module):
    """Adds in place, to what it is given."""

    def forward(self, cloth: Tensor, more: Tensor) -> Tensor:
        cloth += more
        return cloth


class OntoRow(Row):
    """A layer that does not look at what the module returns."""

    def forward(self, cloth: Tensor) -> Tensor:
        cloth = cloth.clone()
        self.onto(cloth, self.weft(self.before(cloth)))
        self.onto(cloth, self.dye(self.between(cloth)))
        return cloth


def test_a_module_that_adds_in_place_is_given_the_tensor_itself():
    model = LoomForCausalLM(LoomConfig(echo=False)).double().eval()
    model.cloth = nn.ModuleList(OntoRow(model.config) for _ in range(2)).double()
    for row in model.cloth:
        row.onto = Onto()
    graph, ids = bind(model, check=False), torch.arange(3, 9)[None]
    plain = graph.run(ids, metric=last_logit).metric
    assert torch.equal(graph.run(ids, metric=last_logit, save=RESID_POST[0].grad).metric, plain)


def last_logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 3]
