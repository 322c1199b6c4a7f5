"""The same methods on a bidirectional encoder (BERT) and on an encoder-decoder (T5)."""

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from hookgraph.algorithms.effects.patching import Method, patching_effect
from hookgraph.algorithms.interventions.sweeps import activation_patching
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.binding import bind
from hookgraph.errors import HookGraphError, ShapeMismatchError
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import (
    ATTN_K,
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Q,
    ATTN_Z,
    EMBED,
    ENCODER,
    MLP_OUT,
    MLP_POST,
    RESID_POST,
    RESID_PRE,
    XATTN_K,
    XATTN_OUT,
    XATTN_PATTERN,
    XATTN_Q,
    XATTN_Z,
)
from hookgraph.ontology.locations import Location
from hookgraph_tests.families import VOCABULARY, model_of, tokens

METRIC = logit_diff([3, 4], 5)
ERROR = {"bert": 1e-10, "t5": 1e-5}
"""T5 computes its softmax in single precision, whatever its own."""
STEP = {"bert": 1e-4, "t5": 3e-3}
"""Of finite differences."""
SLOPE = {"bert": 1e-5, "t5": 1e-3}
"""How far those are off, relatively."""


def _bert() -> PreTrainedModel:
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                        intermediate_size=40, max_position_embeddings=40, hidden_act="relu")  # fmt: skip
    return BertForMaskedLM(config)


def _t5() -> PreTrainedModel:
    config = T5Config(vocab_size=VOCABULARY, num_layers=2, num_heads=4, d_model=32, d_kv=8, d_ff=40,
                      feed_forward_proj="gated-gelu", decoder_start_token_id=0)  # fmt: skip
    return T5ForConditionalGeneration(config)


@cache
def graph_of(name: str) -> HookGraph:
    """A model whose biases are 0: the rest random, and so small that no softmax saturates."""
    model = {"bert": _bert, "t5": _t5}[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * 0.5 * parameter.shape[-1] ** -0.5
                )
            else:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return bind(nn.Module.to(model, torch.float64).eval())


def inputs(name: str, seed: int) -> Inputs:
    """Of the encoder-decoder, both texts differ between seeds."""
    if name == "bert":
        return tokens(seed=seed)
    return {"input_ids": tokens(seed=seed), "decoder_input_ids": tokens(pos=4, seed=seed + 10)}


PLACES = {
    "bert": [ATTN_Z[1], MLP_OUT[1], RESID_PRE[2], MLP_POST[0]],
    "t5": [ENCODER.ATTN_Z[1], ENCODER.RESID_PRE[1], ATTN_Z[0], XATTN_Z[1], MLP_OUT[0], RESID_PRE[1]],
}
EACH = pytest.mark.parametrize("name", PLACES)


def measured(graph: HookGraph, name: str, edits: Mapping[Location, Tensor]) -> Tensor:
    """m(clean | nodes := values), one full pass."""
    for node, value in edits.items():
        graph = graph.hook(node, lambda _, v=value: v)
    found = graph.run(inputs(name, 0), metric=METRIC).metric
    assert found is not None
    return found


@EACH
def test_the_gradient_is_that_of_finite_differences(name: str):
    graph, step = graph_of(name), STEP[name]
    got = patching_effect(graph, inputs(name, 0), inputs(name, 1), METRIC, PLACES[name])
    clean, corrupt = (graph.run(inputs(name, seed), save=PLACES[name]) for seed in (0, 1))
    for place in PLACES[name]:
        delta = corrupt[place] - clean[place]
        ahead, behind = (measured(graph, name, {place: clean[place] + s * delta}) for s in (step, -step))
        slope = (ahead - behind) / (2 * step)
        total, error = got.effects[place].flatten(1).sum(1), SLOPE[name]
        assert torch.allclose(total, slope, rtol=error, atol=0.2 * error)
        assert slope.abs().max() > 1e-3


@EACH
def test_integrated_gradients_add_up_to_what_the_site_changes(name: str):
    graph = graph_of(name)
    got = patching_effect(graph, inputs(name, 0), inputs(name, 1), METRIC, PLACES[name], "ig", tolerance=0.01)
    assert set(got.incomplete) < set(PLACES[name])
    base, corrupt = measured(graph, name, {}), graph.run(inputs(name, 1), save=PLACES[name])
    for place in PLACES[name]:
        change = measured(graph, name, {place: corrupt[place]}) - base
        total = got.effects[place].flatten(1).sum(1)
        assert torch.allclose(total - change, got.residuals[place], atol=ERROR[name])
        within = bool(((total - change).abs() <= 0.01 * change.abs() + ERROR[name]).all())
        assert within or place in got.incomplete


@EACH
def test_integration_over_inputs_moves_what_every_stack_embeds(name: str):
    graph = graph_of(name)
    at = [x for x in (EMBED, ENCODER.EMBED) if x in graph.locations]
    got = patching_effect(graph, inputs(name, 0), inputs(name, 1), METRIC, at, "ig_inputs", steps=64)
    assert got.total_effect is not None
    total = torch.stack([got.effects[place].flatten(1).sum(1) for place in at]).sum(0)
    assert torch.allclose(total, got.total_effect, rtol=3e-2, atol=1e-4)
    assert len(at) == {"bert": 1, "t5": 2}[name]


@EACH
def test_exact_equals_one_full_pass_per_node(name: str):
    graph, base = graph_of(name), measured(graph_of(name), name, {})
    at = [place.at(pos=[0, -1]) for place in PLACES[name]]
    got = patching_effect(
        graph, inputs(name, 0), inputs(name, 1), METRIC, at, "exact", joint=["d_head", "d_model", "d_mlp"]
    )
    corrupt = graph.run(inputs(name, 1), save=PLACES[name])
    for place in PLACES[name]:
        for column, pos in enumerate((0, -1)):
            for head in (0, 3) if "head" in place.dims else (None,):
                node = place.at(pos=pos) if head is None else place.at(pos=pos, head=head)
                value = corrupt[place][:, pos] if head is None else corrupt[place][:, pos, head]
                change = measured(graph, name, {node: value}) - base
                found = got.effects[place.at(pos=[0, -1])][:, column]
                found = found if head is None else found[:, head]
                assert torch.allclose(found.flatten(), change, rtol=ERROR[name], atol=ERROR[name])


@pytest.mark.parametrize(
    ("name", "node", "pattern"),
    [
        ("bert", ATTN_Q[1], ATTN_PATTERN[1]),
        ("bert", ATTN_K[1], ATTN_PATTERN[1]),
        ("t5", XATTN_Q[0], XATTN_PATTERN[0]),
        ("t5", XATTN_K[0], XATTN_PATTERN[0]),
        ("t5", ENCODER.ATTN_Q[0], ENCODER.ATTN_PATTERN[0]),
        ("t5", ENCODER.ATTN_K[0], ENCODER.ATTN_PATTERN[0]),
    ],
    ids=str,
)
def test_what_a_query_or_key_does_to_the_pattern_is_exact_in_atp_star(
    name: str, node: Location, pattern: Location
):
    """One pass per layer of every stack with its updates cut out of the gradient, but for the node's own."""
    graph, clean = graph_of(name), inputs(name, 0)
    got = patching_effect(graph, clean, inputs(name, 1), METRIC, [node], "atp_star").effects[node]
    base = graph.run(clean, save=[pattern])[pattern]
    corrupt = graph.run(inputs(name, 1), save=[node])[node]
    kinds = (ATTN_OUT, XATTN_OUT, MLP_OUT, ENCODER.ATTN_OUT, ENCODER.MLP_OUT)
    layers = {(x.type.stack, x.layer) for x in graph.locations if x.type in kinds}
    slopes = []
    for stack, layer in sorted(layers - {(node.type.stack, node.layer)}):
        cut = graph
        for location in graph.locations:
            if location.type in kinds and (location.type.stack, location.layer) == (stack, layer):
                cut = cut.hook(location.grad, torch.zeros_like)
        slopes.append(cut.run(clean, save=[pattern.grad], metric=METRIC)[pattern.grad])
    for pos, head in ((0, 0), (3, 2)):
        part = corrupt[:, pos, head]
        row = node.at(**{node.dims[1]: pos, node.dims[2]: head})
        moved = graph.hook(row, lambda _, v=part: v).run(clean, save=[pattern])[pattern]
        expected = torch.stack([((moved - base) * g).flatten(1).sum(1).abs() for g in slopes]).mean(0)
        assert torch.allclose(got[:, pos, head], expected, rtol=ERROR[name], atol=ERROR[name])
        assert expected.max() > 1e-6


@pytest.mark.parametrize(
    ("name", "cut"),
    [("bert", [RESID_POST[2]]), ("t5", [RESID_PRE[0], ENCODER.FINAL_LN_OUT]), ("t5", [EMBED, ENCODER.EMBED])],
    ids=["bert", "t5, decoder", "t5"],
)
def test_relevance_is_conserved_where_there_are_no_biases(name: str, cut: list[Location]):
    """Scales, patterns and secants constant, a model without biases is linear: zero everywhere is -m."""
    graph = graph_of(name)
    got = patching_effect(graph, inputs(name, 0), None, METRIC, cut, "relp")
    total = torch.stack([got.effects[place].flatten(1).sum(1) for place in cut]).sum(0)
    assert torch.allclose(total, -measured(graph, name, {}), rtol=1e-6)


def test_sweeps_reach_the_other_stack():
    graph, base = graph_of("t5"), measured(graph_of("t5"), "t5", {})
    place = ENCODER.RESID_PRE[1]
    got = activation_patching(graph, inputs("t5", 0), inputs("t5", 1), METRIC, [place]).effects
    values = graph.run(inputs("t5", 1), save=[place])[place]
    change = measured(graph, "t5", {place.at(pos=2): values[:, 2]}) - base
    assert torch.allclose(got[place][:, 2], change, rtol=1e-5, atol=1e-5)


@EACH
def test_the_top_nodes_are_measured_exactly(name: str):
    graph = graph_of(name)
    at = [place for place in PLACES[name] if "d_head" in place.dims]
    found = patching_effect(graph, inputs(name, 0), inputs(name, 1), METRIC, at, joint=["d_head"])
    before, values = measured(graph, name, {}), graph.run(inputs(name, 1), save=at)
    for node in found.mean("batch").check(top=4):
        after = measured(graph, name, {node.location: values[node.location]})
        assert node.exact == pytest.approx(float((after - before).mean()), rel=1e-4, abs=ERROR[name])


def encoded(**arguments: Tensor) -> BaseModelOutput:
    """What the encoder of T5 returns."""
    with torch.no_grad():
        return model_of(graph_of("t5")).get_encoder()(**arguments)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("method", "options"),
    [("attrib", {"batch_size": 1}), ("ig", {"steps": 3, "batch_size": 4}), ("exact", {"batch_size": 5})],
)
def test_outputs_of_the_encoder_are_repeated_and_divided_with_the_examples(
    method: Method, options: dict[str, int], listed: bool
):
    graph = graph_of("t5")
    at = [x.at(d_head=[0, 1], pos=[2, 3]) for x in (ATTN_Z[0], XATTN_Z[1])]
    ids, mask = tokens(seed=0), torch.ones_like(tokens(seed=0))
    mask[0, -2:] = 0
    read = encoded(input_ids=ids, attention_mask=mask)
    outputs = [read.last_hidden_state] if listed else read
    given, plain = (
        [{**x, "attention_mask": mask, "decoder_input_ids": tokens(pos=4, seed=s)} for s in (10, 11)]
        for x in ({"encoder_outputs": outputs}, {"input_ids": ids})
    )
    found, expected = (
        patching_effect(graph, *pair, METRIC, at, method, progress=False, **options)
        for pair in (given, plain)
    )
    for place in at:
        scale = expected.effects[place].abs().max()
        assert scale > 1e-4
        assert (found.effects[place] - expected.effects[place]).abs().max() < 1e-12 * scale


def test_outputs_of_the_encoder_of_another_length_are_refused():
    pair = [
        {"decoder_input_ids": tokens(pos=4), "encoder_outputs": encoded(input_ids=tokens(pos=n))}
        for n in (5, 6)
    ]
    with pytest.raises(ShapeMismatchError, match=r"differ in encoder_outputs\.last_hidden_state"):
        patching_effect(graph_of("t5"), *pair, METRIC, [ATTN_Z[0]])


def test_where_outputs_of_the_encoder_are_given_nothing_fires_in_it():
    given = {"encoder_outputs": encoded(input_ids=tokens()), "decoder_input_ids": tokens(pos=4)}
    with pytest.raises(
        HookGraphError, match="already hold what it leads to, as inputs_embeds and encoder_outputs do"
    ):
        graph_of("t5").run(given, save=[ENCODER.RESID_POST[0]])
