"""What a layer adds is reached where the layer itself weighs it, feature by feature."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from hookgraph import HookGraph, bind
from hookgraph.errors import BindingError, UnknownLocationError
from hookgraph.locations import ATTN_OUT, MLP_OUT, RESID_MID, RESID_POST, RESID_PRE
from hookgraph_tests.binding.test_hand_written import IDS, WIDTH, Story, Teller, keys_first, teller
from hookgraph_tests.families import binding_of
from hookgraph_tests.tiny import build


class Weighed(Story):
    """Weighs what attention and the MLP add; a weight may be zero."""

    def __init__(self) -> None:
        super().__init__(keys_first)
        self.heard, self.thought = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.heard.data[3] = 0

    def forward(self, x: Tensor) -> Tensor:
        """The stream after it."""
        x = x + self.heard * self.heads(self.first(x))
        return x + 0.5 * torch.mul(self.think(self.second(x)), self.thought)


class Again(Teller):
    """Tells stories that, while it trains, a backward pass tells again."""

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        x = self.words(input_ids)
        for story in self.stories:
            x = checkpoint(story, x, use_reentrant=False) if self.training else story(x)
        return CausalLMOutput(logits=self.say(self.end(cast("Tensor", x))))


def weighed(kind: type[Teller] = Teller) -> HookGraph:
    torch.manual_seed(0)
    model = kind(keys_first).double().eval()
    model.stories = nn.ModuleList(Weighed().double() for _ in range(2))
    return bind(model, cached=False)


def test_it_is_what_the_module_returns_times_the_weight():
    graph = weighed()
    run = graph.run(IDS, save=[x[1] for x in (RESID_PRE, ATTN_OUT, RESID_MID, MLP_OUT, RESID_POST)])
    story = binding_of(graph).model.get_submodule("stories.1")
    torch.testing.assert_close(
        run[ATTN_OUT[1]],
        story.heard * story.heads(story.first(run[RESID_PRE[1]])),  # pyright: ignore
    )
    torch.testing.assert_close(run[RESID_MID[1]], run[RESID_PRE[1]] + run[ATTN_OUT[1]])
    torch.testing.assert_close(run[RESID_POST[1]], run[RESID_MID[1]] + run[MLP_OUT[1]])


@pytest.mark.parametrize(
    ("kind", "before", "after"), [(ATTN_OUT, RESID_PRE, RESID_MID), (MLP_OUT, RESID_MID, RESID_POST)]
)
def test_an_edit_of_it_reaches_the_stream_where_the_weight_is_zero_too(kind, before, after):
    graph = weighed()
    run = graph.hook(kind[1], torch.ones_like).run(IDS, save=[before[1], after[1]])
    torch.testing.assert_close(run[after[1]], run[before[1]] + 1)
    plain = graph.run(IDS, save=[kind[1].grad], metric=lambda x: x[:, -1, 3])
    assert bool((plain[kind[1].grad][:, -1, 3] != 0).all())


def test_layers_that_a_backward_pass_runs_again_have_the_same_gradients():
    graph, again = weighed(), weighed(Again)
    for module in binding_of(again).model.modules():
        module.train()
    saves = [x[layer].grad for x in (ATTN_OUT, MLP_OUT) for layer in range(2)]
    plain, found = (x.run(IDS, save=saves, metric=lambda x: x[:, -1, 3]) for x in (graph, again))
    for save in saves:
        torch.testing.assert_close(found[save], plain[save])


@pytest.mark.parametrize("architecture", ["beit", "swiftformer"])
def test_layers_of_vision_models_have_their_updates(architecture: str):
    graph = bind(build("base", architecture))
    kind = ATTN_OUT if architecture == "beit" else MLP_OUT
    assert all(graph.report.proves(x, "conserved") for x in graph.every(kind))


class Marked(Story):
    """Writes into a part of what the MLP returns; with `late`, after it was added."""

    late = False

    def __init__(self) -> None:
        super().__init__(keys_first)

    def forward(self, x: Tensor) -> Tensor:
        """The stream after it."""
        x = x + self.heads(self.first(x))
        thought = self.think(self.second(x))
        y = x + thought if self.late else x
        thought.transpose(0, 1)[1:] *= 2
        return y if self.late else x + thought


@pytest.mark.parametrize("late", [False, True])
def test_what_is_written_into_before_it_is_added_is_absent_with_the_reason(late: bool):
    model = teller(keys_first)
    model.stories = nn.ModuleList(Marked().double() for _ in range(2))
    for story in model.stories:
        story.late = late
    graph = bind(model, check=False)
    if late:
        assert MLP_OUT[1] in graph.locations
    else:
        with pytest.raises(UnknownLocationError, match="is written into in place before it is added"):
            graph.check(MLP_OUT[1])


def test_who_multiplies_with_a_parameter_inside_the_layer_is_told():
    graph = weighed()
    story = binding_of(graph).model.get_submodule("stories.1")
    handle = story.get_submodule("first").register_forward_hook(lambda m, args, y: y * m.weight)
    try:
        with pytest.raises(
            BindingError, match="multiplication with a parameter 3 times, not 2: remove hooks"
        ):
            graph.run(IDS, save=[ATTN_OUT[1]], metric=lambda x: x[:, -1, 3])
    finally:
        handle.remove()
