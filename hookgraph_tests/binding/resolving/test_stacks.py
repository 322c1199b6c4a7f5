"""Models of several stacks, and models without a head: what is what is told by what each reads."""

import pytest
import torch
from torch import Tensor, nn

from hookgraph.binding import bind
from hookgraph.binding.resolving.examples import example_inputs
from hookgraph.binding.running.outputs import per_example, read_output
from hookgraph.errors import BindingError, UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import (
    ATTN_OUT,
    ATTN_PATTERN,
    EMBED,
    ENCODER,
    FINAL_LN_OUT,
    FINAL_LN_SCALE,
    RESID_POST,
    VISION,
)
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM
from hookgraph_tests.families import binding_of
from hookgraph_tests.tiny import build


def proven(table: str, architecture: str) -> HookGraph:
    return bind(nn.Module.to(build(table, architecture), torch.float64), cached=False)


@pytest.mark.parametrize("architecture", ["clip", "altclip"])
def test_of_two_towers_the_one_that_reads_tokens_needs_no_prefix(architecture: str):
    """In AltCLIP the text comes first, in CLIP last."""
    graph = proven("base", architecture)
    assert graph.report.ok
    assert graph.every(RESID_POST)
    assert graph.every(VISION.RESID_POST)
    run = graph.run(example_inputs(binding_of(graph).model), save=[RESID_POST[0], VISION.RESID_POST[0]])
    assert run[RESID_POST[0]].shape[1] == 7
    assert run[VISION.RESID_POST[0]].shape[1] == 17  # 16 patches and a class token
    assert EMBED in graph.locations


def test_a_stack_that_is_attended_to_is_the_encoder():
    graph = proven("base", "whisper")
    assert graph.report.ok
    assert graph.every(ENCODER.RESID_POST)
    assert VISION.RESID_POST[0] not in graph.locations


class Hemmed(LoomForCausalLM):
    """Without its head; the last norm is called twice, first for what nobody is measured by."""

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        cloth = self.spool(input_ids)
        for row in self.cloth:
            cloth = row(cloth)
        return {"intermediate": self.hem(cloth), "last_hidden_state": self.hem(cloth)}


def test_of_two_norms_behind_the_last_layer_the_one_that_is_read_is_the_final_one():
    graph = bind(Hemmed(LoomConfig()).double().eval(), cached=False)
    assert {FINAL_LN_OUT, FINAL_LN_SCALE} <= set(graph.locations)
    run = graph.run(binding_of(graph).example, save=[FINAL_LN_OUT])
    assert torch.equal(run[FINAL_LN_OUT], run.logits)


@pytest.mark.parametrize("architecture", ["vit", "wav2vec2", "bert"])
def test_a_model_without_a_head_is_measured_by_its_last_hidden_state(architecture: str):
    model = build("base", architecture)
    graph = bind(model, check=False)
    inputs = example_inputs(model)
    run = graph.run(inputs, save=[ATTN_PATTERN[0]])
    with torch.no_grad():
        assert torch.equal(run.logits, model(**inputs).last_hidden_state)
    torch.testing.assert_close(run[ATTN_PATTERN[0]].sum(-1), torch.ones(run[ATTN_PATTERN[0]].shape[:-1]))


def test_examples_are_tried_until_one_can_be_run():
    assert set(example_inputs(build("causal", "llama"))) >= {"input_ids", "attention_mask"}
    assert {"input_ids", "pixel_values"} <= set(example_inputs(build("base", "clip")))


def test_text_that_a_model_shortens_is_made_longer():
    graph = bind(build("base", "canine"), cached=False)  # four characters make one position
    assert binding_of(graph).example["input_ids"].shape == (2, 28)
    assert graph.every(ENCODER.ATTN_Q)  # on which nothing depends where there is one position


def test_a_stack_that_the_example_does_not_reach_is_told_with_what_would_reach_it():
    model = build("image-text", "llava")
    model.config.vision_config.image_size = 8 * 30  # so many patches that bind makes up text alone
    graph = bind(model, check=False)
    remedy = "bound on attention_mask and input_ids alone, and takes pixel_values too: bind"
    with pytest.raises(UnknownLocationError, match=remedy):
        graph.check(VISION.RESID_POST[0])
    for graph in (bind(build("causal", "llama"), check=False), bind(build("base", "vit"), check=False)):
        with pytest.raises(UnknownLocationError, match="it has no encoder of which the layers were found;"):
            graph.check(ENCODER.RESID_POST[0])


def test_an_output_is_the_logits_then_the_last_hidden_state_then_the_first_activation():
    logits, hidden, mask = torch.ones(2, 3, 4), torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.long)
    assert read_output({"last_hidden_state": hidden, "logits": logits}) is logits
    assert read_output({"loss": torch.tensor(1.0), "mask": mask, "last_hidden_state": hidden}) is hidden
    assert read_output((torch.tensor(1.0), mask, (hidden,))) is hidden
    with pytest.raises(BindingError, match="returns no tensor of activations, but dict"):
        read_output({"mask": mask})


def test_of_a_comparison_of_all_with_all_each_example_has_its_own():
    square = torch.arange(9.0).view(3, 3)
    assert per_example(square, (1,)).flatten().tolist() == [0.0, 4.0, 8.0]
    assert per_example(square, (3,)) is square
    assert per_example(torch.ones(3, 3, 2), (3, 2)).shape == (3, 3, 2)


def test_what_attends_to_a_stream_that_was_made_of_another_stack_attends_to_itself():
    graph = bind(build("causal", "hrm_text"), check=False)
    assert len(graph.every(ATTN_OUT)) == graph.binding.layers("decoder") == 2
    assert graph.binding.layers("encoder") == 4
