"""Layers that are no modules: attentions, norms and MLPs lie in lists of their own, called in turn."""

import pytest
import torch
from torch import nn

from hookgraph.binding import bind
from hookgraph.binding.proving.twins import in_precision
from hookgraph.binding.resolving.examples import example_inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import (
    ATTN_OUT,
    ATTN_PATTERN,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    XATTN_PATTERN,
)
from hookgraph_tests.families import binding_of
from hookgraph_tests.tiny import build, example_of


def proven(table: str, architecture: str) -> HookGraph:
    model = build(table, architecture)
    nn.Module.to(model, torch.float64)
    example = example_of(model)
    return bind(model, example=None if example is None else in_precision(example, torch.float64))


@pytest.mark.parametrize(("table", "architecture"), [("causal", "xlm"), ("masked", "flaubert")])
def test_every_layer_has_its_stream_and_its_updates(table: str, architecture: str):
    graph = proven(table, architecture)
    layers = binding_of(graph).layers("decoder")
    assert layers > 1
    assert graph.report.ok
    for kind in (RESID_PRE, ATTN_OUT, RESID_MID, MLP_OUT, RESID_POST):
        assert [x.layer for x in graph.every(kind)] == list(range(layers))


def test_an_edit_of_what_a_layer_reads_reaches_its_updates_and_the_stream_beside_them():
    """mid = norm(pre + attn.out), whatever `pre` is replaced with."""
    graph = proven("causal", "xlm")
    model = binding_of(graph).model
    hooked = graph.hook(RESID_PRE[1], lambda x: x + torch.linspace(0, 1, x.shape[-1]).to(x))
    wanted = [RESID_PRE[1], ATTN_OUT[1], RESID_MID[1]]
    run, plain = (g.run(example_inputs(model), save=wanted) for g in (hooked, graph))
    norm = model.get_submodule("transformer.layer_norm1.1")
    with torch.no_grad():
        torch.testing.assert_close(norm(run[RESID_PRE[1]] + run[ATTN_OUT[1]]), run[RESID_MID[1]])
    assert not torch.allclose(run[ATTN_OUT[1]], plain[ATTN_OUT[1]])


def test_such_a_model_cannot_be_entered_between_its_layers():
    graph = proven("causal", "xlm")
    assert binding_of(graph).why_closed("decoder", 1)


def test_layers_of_two_lists_that_take_turns_are_one_stack():
    """Each gated cross-attention stands before the layer that reads what it returns."""
    graph = proven("image-text", "idefics")
    assert all(p.holds for p in graph.report.proofs if p.location.type.stack == "decoder")
    assert binding_of(graph).layers("decoder") == 4
    assert [x.layer for x in graph.every(XATTN_PATTERN)] == [0, 2]
    assert [x.layer for x in graph.every(ATTN_PATTERN)] == [1, 3]
    posts = graph.every(RESID_POST)
    run = graph.run(binding_of(graph).example, save=[*posts, *graph.every(RESID_PRE)])
    for number, before in enumerate(posts[:-1]):
        assert run[before].equal(run[RESID_PRE[number + 1]])
