"""Models that have parts of themselves checkpointed, without a flag that says so."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from hookgraph.binding import bind
from hookgraph.errors import BindingError, InputError, MetricError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import (
    ATTN_PATTERN,
    ATTN_SCORES,
    EMBED,
    MLP_OUT,
    MLP_POST,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
)
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")

IDS = torch.arange(12).view(2, 6) + 8
INSIDE = [RESID_MID[0].grad, ATTN_SCORES[1].grad, MLP_POST[1].grad]
BESIDE = [EMBED.grad, RESID_PRE[1].grad, RESID_POST[1].grad]


class Rewoven(LoomForCausalLM):
    """A loom whose rows, while it trains, a backward pass weaves again."""

    reentrant: bool | None = None
    always = False
    turns = 1

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids)
        again = self.reentrant is not None and (self.training or self.always)
        for row in [row for row in self.cloth for _ in range(self.turns)]:
            cloth = checkpoint(row, cloth, use_reentrant=self.reentrant) if again else row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth)))


def rewoven(reentrant: bool | None, *, always: bool = False, turns: int = 1) -> Rewoven:
    torch.manual_seed(0)
    config = LoomConfig(echo=False, rows=2, threads=8, shuttles=2, dyes=8, vocab_size=24)
    model = Rewoven(config).double().train()
    model.reentrant, model.always, model.turns = reentrant, always, turns
    return model


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3]


def edited(graph: HookGraph) -> HookGraph:
    graph = graph.hook(MLP_POST[0], lambda x: 1.5 * x).hook(RESID_MID[1], lambda x: x.clone().mul(0.5))
    return graph.hook(ATTN_PATTERN[0], torch.ones_like)


def zeroed(graph: HookGraph) -> HookGraph:
    return graph.hook(MLP_OUT[0], torch.zeros_like)


def unedited(graph: HookGraph) -> HookGraph:
    return graph


@pytest.mark.parametrize("change", [unedited, edited, zeroed])
def test_what_a_backward_pass_runs_again_is_run_with_its_hooks(change: Callable[[HookGraph], HookGraph]):
    plain, graph = (change(bind(rewoven(kind), check=False)) for kind in (None, False))
    for saves in (INSIDE, BESIDE[:1], BESIDE):
        expected, found = (g.run(IDS, save=saves, metric=metric) for g in (plain, graph))
        for location in saves:
            torch.testing.assert_close(found[location], expected[location])


def test_a_replay_of_what_runs_again_enters_there_again():
    plain, graph = (bind(rewoven(kind), check=False) for kind in (None, False))
    found = list[Tensor]()
    for g in (plain, graph):
        run = g.run(IDS, save=[RESID_PRE[1]])
        value = 0.5 * run[RESID_PRE[1]]
        saves = [RESID_PRE[1].grad, RESID_POST[1].grad]
        found.append(g.replay(run, RESID_PRE[1], value=value, save=saves, metric=metric)[saves[0]])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_while_attached_gives_the_gradients_of_the_edited_model(reentrant: bool):
    gradients = list[Tensor]()
    for model in (rewoven(None), rewoven(reentrant)):
        with edited(bind(model, check=False)).attached():
            metric(model(IDS).logits).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("saves", "reason"),
    [
        (INSIDE, r"resid.mid\[0\] was computed without gradients, as in reentrant checkpointing"),
        (BESIDE[:1], "gradients at chosen places cannot be had through reentrant checkpointing"),
    ],
)
def test_gradients_that_reentrant_checkpointing_cannot_give_are_refused(saves: list[Location], reason: str):
    with pytest.raises(MetricError, match=f"{reason}.*use_reentrant=False"):
        bind(rewoven(True), check=False).run(IDS, save=saves, metric=metric)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_run_that_is_to_be_differentiated_later_is_refused(reentrant: bool):
    model = rewoven(reentrant)
    graph = bind(model, check=False)
    with pytest.raises(InputError, match="a backward pass runs the model again"):
        graph.run(IDS, save=[MLP_OUT[0]], grad=True)
    model.eval()
    assert graph.run(IDS, save=[MLP_OUT[0]], grad=True)[MLP_OUT[0]].requires_grad, "nothing runs again now"


def test_a_model_that_is_always_checkpointed_binds_unless_that_is_reentrant():
    assert bind(rewoven(False, always=True).eval(), cached=False).report.ok
    with pytest.raises(BindingError, match=r"without gradients from here on, .* reentrant checkpointing"):
        bind(rewoven(True, always=True).eval(), cached=False)


def test_an_edit_of_one_of_several_calls_that_run_again_is_refused():
    graph = bind(rewoven(False, turns=2), check=False)
    run = partial(graph.hook(MLP_OUT[1], torch.zeros_like).run, IDS, metric=metric)
    with pytest.raises(InputError, match="is edited in one of several calls of a pass, and checkpointed"):
        run(save=[RESID_PRE[1].grad])
    assert run().metric is not None
