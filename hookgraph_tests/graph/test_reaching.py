"""A hook that a pass does not reach is an error, and none that has no part to play in it."""

from typing import Any

import pytest
import torch

from hookgraph.binding import bind
from hookgraph.errors import HookGraphError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.reaching import hooked_places
from hookgraph.graph.recording import EnoughSeen, Recorder
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.transformer import EMBED, ENCODER, LOGITS, MLP_OUT, RESID_POST, RESID_PRE
from hookgraph.subgraphs.autoencoder import AutoencoderGraph
from hookgraph_tests.families import FAMILIES, bound, build, model_of, tokens
from hookgraph_tests.subgraphs.planted import planted
from hookgraph_tests.tiny import build as tiny
from hookgraph_tests.toy import toy_graph, toy_tokens

IDS = toy_tokens()
UNEDITED = "hooked, but not reached in this pass, so nothing is edited: "


def embedded(family: str) -> dict[str, Any]:
    return {"inputs_embeds": model_of(bound(family)).get_input_embeddings()(tokens()).detach()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_on_the_embedding_of_what_is_embedded_already_is_an_error(family: str):
    graph, inputs = bound(family), embedded(family)
    for where in (EMBED, EMBED.at(pos=1), EMBED.grad):
        with pytest.raises(HookGraphError, match=f"{UNEDITED}embed: .* as inputs_embeds and encoder_outputs"):
            graph.hook(where, torch.zeros_like).run(inputs)
    with pytest.raises(HookGraphError, match=f"{UNEDITED}embed"):
        graph.hook(EMBED, torch.zeros_like).run(inputs, save=[RESID_POST[1]])
    assert not torch.equal(
        graph.hook(RESID_PRE[0], torch.zeros_like).run(inputs).logits, graph.run(inputs).logits
    )


def test_a_hook_on_a_stack_that_does_not_run_is_an_error():
    model = tiny("seq2seq", "t5")
    graph = bind(model)
    given = {
        "encoder_outputs": model.get_encoder()(tokens(2, 6)),
        "decoder_input_ids": tokens(2, 4),
    }
    hooked = graph.hook(ENCODER.RESID_POST[0], torch.zeros_like)
    with pytest.raises(HookGraphError, match=rf"{UNEDITED}encoder.resid.post\[0\]: "):
        hooked.run(given)
    assert hooked.run({"input_ids": tokens(2, 6), "decoder_input_ids": tokens(2, 4)}).logits.isfinite().all()


@pytest.mark.parametrize("save", [[], [LOGITS.at(pos=0)]], ids=str)
def test_a_hook_in_a_layer_that_no_longer_runs_is_an_error(save: list[Any]):
    hooked = shortened().hook(MLP_OUT[2], torch.zeros_like)
    assert list(hooked.run(tokens(), save=[RESID_POST[1]])) == [RESID_POST[1]]  # it lies before
    with pytest.raises(HookGraphError, match=rf"{UNEDITED}mlp.out\[2\]: .* bind it again"):
        hooked.run(tokens(), save=save)


def shortened() -> HookGraph:
    """A graph of a model that has left out its last layer since it was bound."""
    model = build("llama")
    graph = bind(model)
    model.config.num_hidden_layers = 2
    return graph


def test_hooks_behind_what_is_saved_need_not_be_reached():
    hooked = toy_graph().hook(RESID_POST[2], torch.zeros_like)
    run = hooked.run(IDS, save=[RESID_POST[0]])
    assert torch.equal(run.logits, hooked.run(IDS).logits)


def test_hooks_before_where_a_replay_starts_are_not_reached():
    graph = toy_graph().hook(MLP_OUT[0], torch.zeros_like)
    run = graph.run(IDS, save=[RESID_PRE[1]])
    assert torch.equal(graph.replay(run, RESID_PRE[1]).logits, run.logits)
    assert set(hooked_places(graph.registrations)) == {MLP_OUT[0]}
    assert not hooked_places(graph.registrations, RESID_PRE[1])


def test_a_pass_is_not_stopped_before_a_hook_that_what_is_saved_may_depend_on():
    recorder = Recorder([RESID_POST[0]], stop=True, keep_graph=False, hooked={MLP_OUT[0]: (MLP_OUT[0],)})
    observers = recorder.observers()
    observers[RESID_POST[0]](torch.zeros(1, 2, 3))
    with pytest.raises(HookGraphError, match=rf"{UNEDITED}mlp.out\[0\]"):
        recorder.values(None)
    with pytest.raises(EnoughSeen):
        observers[MLP_OUT[0]](torch.zeros(1, 2, 3))
    assert list(recorder.values(None)) == [RESID_POST[0]]


def test_in_a_dictionary_of_which_something_is_set_the_rest_need_not_be_computed():
    sae = AutoencoderGraph(planted(), MLP_OUT[1])
    graph = toy_graph().inject(sae)
    run = graph.run(IDS, save=[sae.latents, sae.error])
    given = graph.hook(sae.latents, SetTo(run[sae.latents])).hook(sae.error, SetTo(run[sae.error]))
    both = given.hook(sae.latents_pre, torch.zeros_like)
    torch.testing.assert_close(both.run(IDS).logits, graph.run(IDS).logits)
    assert set(hooked_places(both.registrations)) == {MLP_OUT[1]}


@pytest.mark.parametrize("save", [[], [RESID_POST[1]]], ids=str)
def test_a_generation_whose_passes_do_not_reach_a_hook_is_an_error(save: list[Any]):
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    calls = list[int]()
    late = RESID_POST[1].at(step=1)  # not in every pass
    bound("llama").hook(late, lambda x: calls.append(x.shape[1])).generate(tokens(), save=save, **options)
    assert calls == [1]
    with pytest.raises(HookGraphError, match=r"not reached in any pass of this generation, .*: mlp.out\[2\]"):
        shortened().hook(MLP_OUT[2], torch.zeros_like).generate(tokens(), save=save, **options)
