"""The first stories of the README, word for word, on every family."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import hookgraph as hg
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import ATTN_Z, MLP_OUT, RESID_POST
from hookgraph_tests.families import FAMILIES, STORY_SIZE, bound, layers_of, model_of, tokens

STORIES = {
    1: """
run = graph.run(tokens, save=graph.every(RESID_POST)); run[RESID_POST[6]]
""",
    2: """
z = ATTN_Z[9].at(head=[6, 9], pos=-1)
run = graph.run(tokens, save=[z, z.grad], metric=logit_diff(correct, wrong)); (run[z] * run[z.grad]).sum(-1)
""",
    3: """
logits = graph.hook(ATTN_Z[9].at(head=[6, 9]), torch.zeros_like).run(tokens).logits
""",
    4: """
with graph.hook(RESID_POST[6], lambda x: x + 4 * v).attached():
    model.generate(**inputs, max_new_tokens=32)
""",
    5: """
here = RESID_POST[6].at(pos=-1); clean = graph.run(clean_tokens, save=[here])
logits = graph.hook(here, lambda _: clean[here]).run(corrupt_tokens).logits
""",
}
CLEAN, CORRUPT = tokens(2, 6, seed=0), tokens(2, 6, seed=1)
CORRECT, WRONG = torch.tensor([3, 4]), torch.tensor([5, 6])
DIRECTION = torch.randn(STORY_SIZE.heads * STORY_SIZE.d_head, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def graph(family: str) -> HookGraph:
    return bound(family, size=STORY_SIZE)


def told(number: int, graph: HookGraph) -> Mapping[str, Any]:
    """The names that a story leaves behind."""
    names: dict[str, Any] = {
        "graph": graph,
        "model": model_of(graph),
        "tokens": CLEAN,
        "clean_tokens": CLEAN,
        "corrupt_tokens": CORRUPT,
        "inputs": {"input_ids": CLEAN, "attention_mask": torch.ones_like(CLEAN), "do_sample": False},
        "v": DIRECTION,
        "correct": CORRECT,
        "wrong": WRONG,
        "logit_diff": hg.metrics.logit_diff,
        "torch": torch,
        "ATTN_Z": ATTN_Z,
        "MLP_OUT": MLP_OUT,
        "RESID_POST": RESID_POST,
    }
    exec(STORIES[number], names)
    return names


def plain(graph: HookGraph, ids: Tensor, **options: bool) -> Any:
    with torch.no_grad():
        return model_of(graph)(input_ids=ids, **options)


def test_1_read_a_location_in_every_layer(graph: HookGraph):
    run = told(1, graph)["run"]
    assert list(run) == [RESID_POST[layer] for layer in range(STORY_SIZE.layers)]
    states = plain(graph, CLEAN, output_hidden_states=True).hidden_states
    assert torch.equal(run[RESID_POST[6]], states[7])


def test_2_activation_and_gradient_of_part_of_a_location(graph: HookGraph):
    names = told(2, graph)
    z, run = names["z"], names["run"]
    assert run[z].shape == run[z.grad].shape == (2, 2, STORY_SIZE.d_head)
    difference = plain(graph, CLEAN).logits[:, -1]
    rows = torch.arange(2)
    torch.testing.assert_close(run.metric, difference[rows, CORRECT] - difference[rows, WRONG])
    step = 1e-2 * torch.randn_like(run[z])
    metric = hg.metrics.logit_diff(CORRECT, WRONG)
    moved = [
        graph.hook(z, lambda x, sign=sign: x + sign * step).run(CLEAN, metric=metric).metric
        for sign in (1, -1)
    ]
    slope = (moved[0] - moved[1]) / 2
    torch.testing.assert_close(slope, (run[z.grad] * step).sum((1, 2)), rtol=1e-2, atol=1e-4)


def test_3_ablate_heads(graph: HookGraph, family: str):
    columns = [h * STORY_SIZE.d_head + i for h in (6, 9) for i in range(STORY_SIZE.d_head)]
    projection = layers_of(family, model_of(graph))[9].get_submodule(FAMILIES[family].projection)

    def ablate(module: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].index_fill(-1, torch.tensor(columns), 0.0), *args[1:])

    handle = projection.register_forward_pre_hook(ablate)
    try:
        expected = plain(graph, CLEAN).logits
    finally:
        handle.remove()
    assert torch.equal(told(3, graph)["logits"], expected)
    assert not torch.allclose(expected, plain(graph, CLEAN).logits)


def test_4_steer_the_models_own_generate(graph: HookGraph, family: str, monkeypatch: pytest.MonkeyPatch):
    model, layer = model_of(graph), layers_of(family, model_of(graph))[6]
    generate, generated = model.generate, list[Any]()

    def keeping(**arguments: Any) -> Any:
        generated.append(generate(**arguments))
        return generated[-1]

    monkeypatch.setattr(model, "generate", keeping)
    told(4, graph)

    def steer(module: object, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output + 4 * DIRECTION
        return (output[0] + 4 * DIRECTION, *output[1:])

    ids = {"input_ids": CLEAN, "attention_mask": torch.ones_like(CLEAN)}
    handle = layer.register_forward_hook(steer)
    try:
        expected = generate(**ids, do_sample=False, max_new_tokens=32)
    finally:
        handle.remove()
    assert torch.equal(generated[0], expected)
    after = generate(**ids, do_sample=False, max_new_tokens=32)
    assert not torch.equal(after, expected)


def test_5_patch_one_position_from_a_clean_run(graph: HookGraph):
    logits = told(5, graph)["logits"]
    clean, corrupt = (plain(graph, ids).logits for ids in (CLEAN, CORRUPT))
    assert torch.equal(logits[:, :-1], corrupt[:, :-1]), "a position before the patched one moved"
    assert not torch.allclose(logits[:, -1], corrupt[:, -1])
    everywhere = graph.run(CLEAN, save=[RESID_POST[6]])[RESID_POST[6]]
    patched = graph.hook(RESID_POST[6], lambda _: everywhere).run(CORRUPT).logits
    torch.testing.assert_close(patched, clean)
