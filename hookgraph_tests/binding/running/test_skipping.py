"""Replays of models on which others have put hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import hookgraph
from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.errors import LocationError
from hookgraph.graph.replay import can_start
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.transformer import ATTN_Z, MLP_PRE, RESID_POST, RESID_PRE
from hookgraph_tests.families import binding_of, bound, layers_of, model_of, tokens
from hookgraph_tests.tiny import build

ENTRIES = [RESID_PRE[1], RESID_PRE[2]]


def more(module: nn.Module, args: Any, output: Any) -> Any:
    return 1.5 * output if isinstance(output, Tensor) else (1.5 * output[0], *output[1:])


def more_in(module: nn.Module, args: Any) -> Any:
    return (1.5 * args[0], *args[1:])


def beside(module: nn.Module, args: Any, output: Any) -> Any:
    return more(module, args, output) if isinstance(output, tuple) else output + args[0].roll(1, -1)


HOOKED: dict[str, Callable[[list[nn.Module]], Any]] = {
    "skipped, before the last": lambda layers: layers[0].register_forward_hook(more),
    "the last that is skipped": lambda layers: layers[1].register_forward_hook(beside),
    "its inputs": lambda layers: layers[1].register_forward_pre_hook(more_in),
    "its child": lambda layers: layers[1].get_submodule("mlp").register_forward_hook(more),
    "inputs of the entered": lambda layers: layers[2].register_forward_pre_hook(more_in),
    "the entered": lambda layers: layers[2].register_forward_hook(beside),
    "child of the entered": lambda layers: layers[2].get_submodule("mlp").register_forward_hook(more),
}


@pytest.mark.parametrize("where", HOOKED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hooks_of_others_have_their_effect_once_in_a_replay(family: str, where: str):
    graph, ids = bound(family, torch.float64), tokens()
    handle = HOOKED[where](layers_of(family, model_of(graph)))
    try:
        run = graph.run(ids, save=[*ENTRIES, ATTN_Z[2]])
        for entry in ENTRIES:
            replayed = graph.replay(run, entry, save=[ATTN_Z[2]])
            assert torch.equal(replayed.logits, run.logits)
            assert torch.equal(replayed[ATTN_Z[2]], run[ATTN_Z[2]])
    finally:
        handle.remove()


def test_hooks_on_layers_that_do_not_run_are_not_called_and_keep_their_places():
    graph, ids = bound("llama", torch.float64), tokens()
    layers = layers_of("llama", model_of(graph))
    run = graph.run(ids, save=[RESID_PRE[2]])
    called: list[str] = []
    handles = [
        layers[1].register_forward_pre_hook(lambda *_: called.append("before")),
        layers[1].register_forward_hook(lambda *_: called.append("after")),
        layers[1].register_full_backward_hook(lambda *_: called.append("backward")),
        layers[2].register_forward_hook(lambda *_: called.append("later")),
    ]
    before = list(layers[1]._forward_hooks.items())
    graph.replay(run, RESID_PRE[2], save=[RESID_PRE[2].grad], metric=lambda logits: logits[:, -1, 3])
    assert called == ["later"]
    assert list(layers[1]._forward_hooks.items()) == before
    for handle in handles:
        handle.remove()


def test_no_replay_starts_before_a_hook_that_may_ask_what_the_layer_was_given():
    graph, ids = bound("llama", torch.float64), tokens()
    run = graph.run(ids, save=[RESID_POST[1]])
    handle = layers_of("llama", model_of(graph))[1].register_forward_hook(beside)
    try:
        with pytest.raises(LocationError, match=r"resid.post\[1\] lies before forward hooks that others"):
            graph.replay(run, RESID_POST[1])
    finally:
        handle.remove()


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_no_replay_starts_while_hooks_are_on_all_modules(register: Callable[[Any], Any]):
    graph, ids = bound("llama", torch.float64), tokens()
    run = graph.run(ids, save=ENTRIES)
    handle = register(lambda *_: None)
    try:
        for entry in (*ENTRIES, RESID_PRE[0]):
            assert not can_start(graph.binding, entry)
        with pytest.raises(
            LocationError, match="entered after layer 0 of its decoder: others have put hooks on"
        ):
            graph.replay(run, ENTRIES[0])
        assert binding_of(graph).retaining(graph.binding.prepare({"input_ids": ids})) is None
    finally:
        handle.remove()
    assert torch.equal(graph.replay(run, ENTRIES[0]).logits, run.logits)


def test_a_layer_that_runs_for_what_it_hands_on_hands_on_a_value_that_was_hooked():
    model = build("seq2seq", "t5").double().eval()
    graph, ids = hookgraph.bind(model, check=False), tokens()
    handle = model.get_submodule("decoder.block.0").register_forward_hook(more)
    run = graph.run({"input_ids": ids, "decoder_input_ids": ids}, save=[RESID_PRE[1]])
    torch.testing.assert_close(graph.replay(run, RESID_PRE[1]).logits, run.logits)
    handle.remove()


def test_no_pass_begins_where_calls_of_a_module_of_all_layers_would_be_miscounted():
    model = build("causal", "openai-gpt")  # one nonlinearity for all layers
    graph, ids = hookgraph.bind(model, cached=False), torch.arange(10, 16)[None]
    run = graph.run(ids, save=[RESID_PRE[1]])
    edited = graph.hook(MLP_PRE[1], torch.zeros_like)
    with pytest.raises(LocationError, match=r"entered after layer 0 .*: mlp.pre\[1\] is a call of .*mlp.act"):
        edited.replay(run, RESID_PRE[1])
    assert graph.entry(MLP_PRE[1]) == RESID_PRE[0]
    effect = exact_effects(graph, ids, ids.flip(1), logit_diff(3, 4), [MLP_PRE[1].at(pos=-1)])
    patch = graph.run(ids.flip(1), save=[MLP_PRE[1].at(pos=-1)])
    moved = graph.hook(MLP_PRE[1].at(pos=-1), SetTo(patch[MLP_PRE[1].at(pos=-1)])).run(ids).logits
    expected = logit_diff(3, 4)(moved) - logit_diff(3, 4)(run.logits)
    torch.testing.assert_close(effect[0], expected, rtol=1e-4, atol=1e-5)
