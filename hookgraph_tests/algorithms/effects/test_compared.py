"""Effects in models that compare each example of a batch with each, such as pictures with texts."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.binding import bind
from hookgraph.binding.resolving.examples import example_inputs
from hookgraph.errors import MetricError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Tiled
from hookgraph.locations import MLP_OUT, VISION
from hookgraph.ontology.locations import Location
from hookgraph_tests.tiny import build

NODES = [MLP_OUT[0], MLP_OUT[1], VISION.MLP_OUT[0], VISION.MLP_OUT[1].at(pos=0)]


def first_text(logits: Tensor) -> Tensor:
    """How much more alike each picture is to the first text than to the last."""
    return logits[:, 0] - 0.5 * logits[:, -1]


@cache
def compared() -> tuple[HookGraph, dict[str, Any], dict[str, Any]]:
    model = build("base", "clip").double()
    clean = example_inputs(model)
    corrupt = {k: v.flip(-1) if k in ("input_ids", "pixel_values") else v for k, v in clean.items()}
    return bind(model, example=clean), clean, corrupt


def brute(node: Location) -> Tensor:
    graph, clean, corrupt = compared()
    value = graph.run(corrupt, save=[node])[node]
    return first_text(graph.hook(node, lambda _: value).run(clean).logits) - first_text(
        graph.run(clean).logits
    )


def test_each_copy_of_a_batch_is_compared_with_itself():
    graph, clean, corrupt = compared()
    found = exact_effects(graph, clean, corrupt, first_text, NODES)
    expected = torch.stack([brute(node) for node in NODES])
    assert bool((expected.abs() > 1e-6).any(1).all())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["attrib", "ig"])
def test_gradients_need_one_example_at_a_time(method: Any):
    graph, clean, corrupt = compared()
    with pytest.raises(MetricError, match="compares each of the 2 examples with each"):
        patching_effect(graph, clean, corrupt, first_text, [MLP_OUT[0]], method)
    one, other = ({k: v[:1] if isinstance(v, Tensor) else v for k, v in x.items()} for x in (clean, corrupt))
    assert (
        patching_effect(graph, one, other, first_text, [MLP_OUT[0]], method)
        .effects[MLP_OUT[0]]
        .isfinite()
        .all()
    )


def test_as_many_classes_as_rows_are_no_comparison():
    logits = torch.randn(4, 4)
    assert torch.equal(Tiled(first_text, 2, 2, columns=4)(logits), first_text(logits))
    blocks = torch.cat([first_text(logits[:2, :2]), first_text(logits[2:, 2:])])
    assert torch.equal(Tiled(first_text, 2, 2, columns=2)(logits), blocks)
