"""Models on which others have hooks, that are copied while attached, or changed after they were bound."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from hookgraph.binding import bind, check
from hookgraph.binding.proving import proving
from hookgraph.errors import AlreadyAttachedError, BindingError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import (
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Z,
    FINAL_LN_OUT,
    MLP_OUT,
    MLP_POST,
    RESID_MID,
    RESID_POST,
)
from hookgraph.ontology.weights import W_O
from hookgraph_tests.families import Size, build, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
IDS = tokens()


def doubled(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """A hook of a user's own."""
    return 2 * output


def with_own_hook(**size: int) -> Any:
    """A model that adds twice what an MLP returns."""
    model: Any = build("llama", size=Size(**size))
    model.model.layers[1].mlp.register_forward_hook(doubled)
    return model


# --- hooks of others --------------------------------------------------------------------------


def test_what_was_proven_without_a_hook_is_not_taken_for_a_model_with_it_nor_the_reverse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOOKGRAPH_CACHE", str(tmp_path))
    plain = bind(build("llama"))
    hooked = bind(with_own_hook())
    assert MLP_OUT[1] in plain.locations
    assert hooked.report.absent[MLP_OUT[1]].startswith("conserved fails")
    assert hooked.report.metadata["hooks of others"] == "model.layers.1.mlp"
    assert check(hooked).ok
    again = bind(build("llama"))
    assert again.locations == plain.locations
    assert "hooks of others" not in again.report.metadata


def test_a_tiny_twin_does_not_speak_for_layers_with_hooks_of_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proving, "is_small", lambda model: False)
    graph = bind(with_own_hook(layers=4))
    assert graph.report.absent[MLP_OUT[1]].startswith("conserved fails")
    assert {MLP_OUT[0], MLP_OUT[2], MLP_OUT[3]} <= set(graph.locations)
    assert check(graph).ok


def test_adapters_switched_off_are_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOOKGRAPH_CACHE", str(tmp_path))
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    model: Any = peft.get_peft_model(build("llama"), config)
    files: set[int] = set()
    with model.disable_adapter():
        bind(model)
        files.add(len(list(tmp_path.iterdir())))
    bind(model)
    files.add(len(list(tmp_path.iterdir())))
    assert files == {1, 2}


# --- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("location", [RESID_POST[1], ATTN_PATTERN[1], MLP_POST[0].grad])
def test_a_copy_made_while_a_graph_was_attached_is_refused(location: Location):
    graph = bind(build("llama"), check=False).hook(location, torch.zeros_like)
    model: Any = graph.binding.model  # pyright: ignore[reportAttributeAccessIssue]
    with graph.attached():
        held = copy.deepcopy(model)
        with pytest.raises(AlreadyAttachedError, match="Leave the other `with` first"):
            bind(model)
    with pytest.raises(AlreadyAttachedError, match=r"copy a model outside of attached\(\)"):
        bind(held)
    assert bind(model, check=False).locations == graph.locations


# --- modules replaced -------------------------------------------------------------------------


def zeroed(graph: HookGraph, location: Location) -> Tensor:
    return graph.hook(location, torch.zeros_like).run(IDS).logits


def test_modules_replaced_after_bind_are_noticed():
    graph = bind(build("llama"), check=False)
    model: Any = graph.binding.model  # pyright: ignore[reportAttributeAccessIssue]
    run = graph.run(IDS, save=[RESID_POST[0], RESID_POST[1]])
    before = zeroed(graph, ATTN_OUT[1])
    own = model.model.layers[1].mlp
    model.model.layers[1].mlp = copy.deepcopy(own)
    for location, kind in ((MLP_OUT[1], "LlamaMLP"), (MLP_POST[1], "Linear")):
        with pytest.raises(BindingError, match=rf"is not the {kind} that was there .* bind the model again"):
            graph.run(IDS, save=[location])
        with pytest.raises(BindingError), graph.hook(location, torch.zeros_like).attached():
            model(input_ids=IDS)
    assert torch.equal(zeroed(graph, ATTN_OUT[1]), before)
    model.model.layers[1].mlp = own
    assert torch.equal(zeroed(graph, ATTN_OUT[1]), before)
    model.model.layers = model.model.layers[:2]
    with pytest.raises(BindingError, match=r"model\.layers\.2 is not .* there is none"):
        graph.run(IDS, save=[RESID_POST[2]])
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])
    with pytest.raises(BindingError, match=r"model\.layers\.0 is not"):
        graph.replay(run, RESID_POST[1], save=[FINAL_LN_OUT])


def test_adapters_put_on_after_bind_are_noticed():
    graph = bind(build("llama"), check=False)
    model: Any = graph.binding.model  # pyright: ignore[reportAttributeAccessIssue]
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"]))
    with pytest.raises(BindingError, match=r"o_proj is not the Linear .* as adapters are; bind the model"):
        zeroed(graph, ATTN_Z[1])
    with pytest.raises(BindingError, match="bind the model again"):
        graph.weight(W_O, layer=1)
    assert not torch.equal(zeroed(graph, RESID_MID[1]), model(input_ids=IDS).logits)


# --- attention that is compiled ---------------------------------------------------------------


def test_flex_attention_is_refused_with_the_remedy():
    model = build("llama")
    graph = bind(model, check=False)
    model.set_attn_implementation("flex_attention")
    for action in (lambda: bind(model), lambda: zeroed(graph, RESID_MID[1])):
        with pytest.raises(BindingError, match=r'Call model\.set_attn_implementation\("sdpa"\)'):
            action()
    model.set_attn_implementation("sdpa")
    assert not torch.equal(zeroed(graph, RESID_MID[1]), graph.run(IDS).logits)
