"""Text with a picture in it is made up for models that put what they see among the tokens."""

import pytest
import torch
from torch import nn

from hookgraph.binding import bind
from hookgraph.binding.proving.state import model_state
from hookgraph.binding.resolving.captions import captioned
from hookgraph.binding.resolving.examples import example_inputs
from hookgraph.ontology.transformer import LOGITS, VISION
from hookgraph_tests.tiny import build


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl", "gemma3", "idefics3", "qwen3_vl"])
def test_the_picture_takes_as_many_places_as_the_model_makes_vectors_of_it(architecture: str):
    model = build("image-text", architecture)
    example = example_inputs(model)
    places = example["input_ids"] == model.config.image_token_id
    assert places.any(1).all()
    text = {k: v for k, v in example.items() if not k.startswith(("pixel", "image"))}
    seen, unseen = (model(**inputs).logits for inputs in (example, text))
    after = int(places[0].nonzero().max())
    assert not torch.isclose(seen[:, after:], unseen[:, after:]).all(-1).any()
    with pytest.raises(ValueError, match="do not match"):
        model(**{**example, "input_ids": example["input_ids"][:, 3:]})


@pytest.mark.parametrize("architecture", ["llava", "qwen3_vl"])
def test_vision_towers_are_bound_and_reach_the_logits(architecture: str):
    graph = bind(nn.Module.to(build("image-text", architecture), torch.float64), cached=False)
    assert graph.report.ok or all("do not depend" in p.note for p in graph.report.proofs if not p.holds)
    place = VISION.MLP_OUT[0]
    assert place in graph.locations
    example = graph.binding.example
    plain = graph.run(example).logits
    edited = graph.hook(place, torch.zeros_like).run(example, save=[LOGITS])[LOGITS]
    assert not torch.isclose(edited[:, -1], plain[:, -1]).any()


def test_pictures_of_many_patches_are_left_to_the_user():
    model = build("image-text", "llava")
    model.config.vision_config.image_size = 8 * 30
    assert list(captioned(model)) == []
    assert "pixel_values" not in example_inputs(model)


def test_where_a_row_depends_on_its_place_in_the_batch_no_picture_is_made_up():
    model = build("image-text", "hunyuan_vl")  # counts the pictures of all rows
    assert "pixel_values" not in example_inputs(model)


def test_models_that_see_nothing_have_no_captions():
    assert list(captioned(build("causal", "llama"))) == []
    assert list(captioned(build("base", "clip"))) == []


def test_making_examples_up_leaves_the_model_as_it_is():
    model = build("image-text", "llava").train()
    list(captioned(model))  # a first pass leaves hooks of transformers' own
    before, noise = model_state(model), torch.random.get_rng_state()
    list(captioned(model))
    assert model.training
    assert not before.difference(model_state(model))
    assert torch.equal(noise, torch.random.get_rng_state())
