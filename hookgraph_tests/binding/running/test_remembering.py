"""What a model remembers of the first positions stays as it is, whatever passes go on from it."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from hookgraph.binding import bind
from hookgraph.binding.running.recalling import Remembered
from hookgraph.graph.abstract import Prepared
from hookgraph_tests.families import FAMILIES, binding_of, bound, build, tokens
from hookgraph_tests.tiny import build as build_tiny


def states(rest: Prepared | None) -> list[Tensor]:
    """The keys and values of every layer."""
    assert rest is not None
    remembered = rest["past_key_values"]
    assert isinstance(remembered, Remembered)
    found = [x for layer in remembered.fresh().layers for x in (layer.keys, layer.values)]
    return [x for x in found if x is not None]


def test_a_cache_keeps_nothing_of_the_pass_that_uses_it():
    ids = tokens()
    rest = bound("gpt2").remember(ids, 3)
    assert rest is not None
    remembered = rest["past_key_values"]
    assert isinstance(remembered, Remembered)
    cache = remembered.repeated(2).fresh()
    before = cache.layers[0].keys
    assert before is not None
    new = torch.ones_like(before[:, :, :1])
    keys, values = cache.update(new, 2 * new, 0)
    assert keys.shape[:3] == (2 * len(ids), before.shape[1], 4)
    assert torch.equal(keys[:, :, :3], before)
    assert torch.equal(keys[:, :, 3:], new)
    assert torch.equal(values[:, :, 3:], 2 * new)
    assert cache.get_seq_length() == 4  # counted, as any cache does, and not held
    assert remembered.get_seq_length() == remembered.fresh().get_seq_length() == 3
    assert cache.layers[0].keys is before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [1, 5])  # more than the window of Gemma-2, and less
def test_what_a_whole_pass_retains_is_what_a_pass_over_the_first_positions_leaves(family: str, start: int):
    graph, ids = bound(family, torch.float64), tokens()
    retained = graph.retaining(ids)
    assert retained is not None
    logits = graph.run(retained).logits
    assert torch.allclose(logits, graph.run(ids).logits, rtol=0, atol=1e-5)
    model = binding_of(graph).model
    with patch.object(type(model), "forward", side_effect=AssertionError("a pass of its own")):
        rest = graph.remember(retained, start)
    alone = graph.remember(ids, start)
    assert rest is not None
    assert rest.keys() == (alone or {}).keys()
    for a, b in zip(states(rest), states(alone), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=0, atol=1e-5)
    assert torch.allclose(graph.run(rest).logits, logits[:, start:], rtol=0, atol=1e-5)


def test_before_its_pass_nothing_is_retained():
    graph = bound("gpt2", torch.float64)
    retained = graph.retaining(tokens())
    assert retained is not None
    for a, b in zip(states(graph.remember(retained, 3)), states(graph.remember(tokens(), 3)), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_retained_where_it_is_not_known_to_be_what_first_positions_leave():
    graph, ids = bound("gpt2", torch.float64), tokens()
    unproven = bind(build("gpt2"), check=False)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    assert unproven.retaining(ids) is None
    assert unproven.remember(ids, 3) is not None
    assert graph.retaining({"input_ids": ids, "attention_mask": mask}) is None
    assert graph.hook(graph.locations[0], lambda x: x).retaining(ids) is None


def test_hooks_that_transformers_leaves_on_a_model_are_none_of_others():
    model = build("llama", torch.float64)
    graph = bind(model)
    model(tokens(), output_hidden_states=True)
    assert graph.retaining(tokens()) is not None
    handle = model.register_forward_hook(lambda m, args, output: None)
    assert graph.retaining(tokens()) is None
    handle.remove()


def test_where_others_count_positions_nothing_is_remembered():
    model = build("llama", torch.float64)
    graph, ids = bind(model, check=False), tokens()
    assert graph.remember(ids, 3) is not None
    handle = model.get_submodule("model.layers.1").register_forward_hook(lambda m, args, output: output[:, 3])
    assert graph.remember(ids, 3) is None
    handle.remove()
    assert graph.remember(ids, 3) is not None


def test_a_model_that_takes_caches_of_its_own_kind_only_remembers_nothing():
    model = build_tiny("causal", "minimax")
    graph, ids = bind(model, check=False), tokens()
    binding = graph.binding
    assert graph.remember(ids, 3) is None
    with patch.object(type(graph.report), "proves", return_value=True):
        assert binding.retaining(binding.prepare(ids)) is None
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
    inputs = {"input_ids": ids[:, 3:], "past_key_values": cache}
    first = graph.run(inputs).logits
    assert torch.equal(graph.run(inputs).logits, first)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, first)
