from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hookgraph.errors import InputError, LocationError, ShapeMismatchError, UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import (
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Z,
    LOGITS,
    MLP_OUT,
    RESID_POST,
    RESID_PRE,
)
from hookgraph_tests.families import FAMILIES, LAYERS, bound, layers_of, model_of, tokens
from hookgraph_tests.toy import Coordinates, orthonormal, toy_graph, toy_of, toy_tokens

IDS = toy_tokens()
STARTS = [kind[layer] for layer in range(LAYERS) for kind in (RESID_PRE, RESID_POST)]


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


def first_run(graph: HookGraph, ids: Tensor) -> Run:
    return graph.run(ids, save=[RESID_PRE[0], *graph.every(RESID_POST), *graph.every(RESID_PRE)])


# --- on the toy -------------------------------------------------------------------------------


@pytest.mark.parametrize("after", STARTS, ids=str)
def test_only_layers_after_the_start_are_executed(after: Location):
    graph = toy_graph()
    run = first_run(graph, IDS)
    expected = graph.run(IDS).logits
    toy_of(graph).executed.clear()
    assert torch.equal(graph.replay(run, after).logits, expected)
    assert after.layer is not None
    assert toy_of(graph).executed == list(range(after.layer + (after.type == RESID_POST), LAYERS))


@pytest.mark.parametrize("after", STARTS, ids=str)
def test_the_value_enters_before_hooks_saves_and_subgraphs_at_the_start(after: Location):
    subgraph = Coordinates(after, "c", orthonormal(4, 2))
    graph = toy_graph().inject(subgraph).hook(after, lambda x: 3 * x).hook(subgraph.latents, torch.neg)
    asked = [after, subgraph.latents, after.grad, LOGITS]
    run = toy_graph().run(IDS, save=[after])
    full = graph.run(IDS, save=asked, metric=metric)
    replayed = graph.replay(run, after, save=asked, metric=metric)
    assert list(replayed) == asked
    for place in asked:
        torch.testing.assert_close(replayed[place], full[place], rtol=1e-12, atol=1e-12)


def test_rows_of_a_larger_batch_belong_to_the_examples_in_turn():
    graph, after = toy_graph(), RESID_POST[0]
    run = first_run(graph, IDS)
    value = torch.cat([run[after], -run[after], 2 * run[after]])
    logits = graph.replay(run, after, value=value).logits
    for number, factor in enumerate((1, -1, 2)):
        alone = graph.replay(run, after, value=factor * run[after]).logits
        torch.testing.assert_close(logits[2 * number : 2 * number + 2], alone)


def test_the_value_keeps_its_place_in_an_autograd_graph():
    graph, after = toy_graph(), RESID_PRE[1]
    value = first_run(graph, IDS)[after].clone().requires_grad_()
    replayed = graph.replay(Run({}, inputs={"input_ids": IDS}), after, value=value, metric=metric, grad=True)
    assert replayed.metric is not None
    (gradient,) = torch.autograd.grad(replayed.metric.sum(), value)
    torch.testing.assert_close(gradient, graph.run(IDS, save=[after.grad], metric=metric)[after.grad])


def test_asking_for_a_gradient_at_the_start_leaves_the_earlier_run_alone():
    graph, after = toy_graph(), RESID_PRE[1]
    run = first_run(graph, IDS)
    graph.replay(run, after, save=[after.grad], metric=metric)
    assert not run[after].requires_grad


def test_a_replay_stops_early_and_completes_its_logits_from_the_start():
    graph = toy_graph(layers=4)
    run = graph.run(IDS, save=[RESID_POST[0]])
    expected = graph.run(IDS).logits
    executed = toy_of(graph).executed
    executed.clear()
    replayed = graph.replay(run, RESID_POST[0], save=[MLP_OUT[1]])
    assert executed == [1]
    assert torch.equal(replayed.logits, expected)
    assert executed == [1, 1, 2, 3]


WRONG: dict[str, tuple[Location, type[Exception], str]] = {
    "part": (RESID_POST[0].at(pos=0), LocationError, "starts between blocks, at a whole resid.pre or"),
    "gradient": (RESID_POST[0].grad, LocationError, "starts between blocks"),
    "inside": (MLP_OUT[1], LocationError, r"not at mlp.out\[1\]: save resid.pre\[1\] in the first run"),
    "logits": (LOGITS, LocationError, "starts between blocks"),
    "layer": (RESID_POST[9], UnknownLocationError, r"no location resid.post\[9\]"),
}


@pytest.mark.parametrize(("after", "kind", "message"), WRONG.values(), ids=WRONG)
def test_a_start_that_is_no_boundary_is_an_error(after: Location, kind: type[Exception], message: str):
    graph = toy_graph()
    run = graph.run(IDS, save=[RESID_POST[0]])
    with pytest.raises(kind, match=message):
        graph.replay(run, after, value=run[RESID_POST[0]])


def test_a_start_inside_a_subgraph_is_an_error():
    inside = RESID_POST[0].within(RESID_POST[0], "sub")
    with pytest.raises(LocationError, match="inject its subgraph first"):
        toy_graph().replay(Run({}, inputs={"input_ids": IDS}), inside, value=torch.zeros(2, 3, 4))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_batch_that_is_no_multiple_is_an_error(batch: int):
    graph = toy_graph()
    run = graph.run(IDS, save=[RESID_POST[0]])
    with pytest.raises(ShapeMismatchError, match=rf"has batch {batch}, the inputs have 2: a replay's batch"):
        graph.replay(run, RESID_POST[0], value=torch.zeros(batch, 3, 4, dtype=torch.float64))


def test_saving_what_precedes_the_start_is_an_error():
    graph = toy_graph()
    run = graph.run(IDS, save=[RESID_POST[1]])
    with pytest.raises(
        UnknownLocationError, match=r"mlp.out\[0\] comes before resid.post\[1\], where this replay starts"
    ):
        graph.replay(run, RESID_POST[1], save=[LOGITS, MLP_OUT[0]])


def test_a_start_that_was_not_saved_is_an_error():
    with pytest.raises(UnknownLocationError, match=r"resid.post\[1\] was not saved in this run"):
        toy_graph().replay(toy_graph().run(IDS, save=[RESID_POST[0]]), RESID_POST[1])


def test_a_run_without_inputs_cannot_be_replayed():
    run = Run({RESID_POST[0]: torch.zeros(2, 3, 4, dtype=torch.float64)})
    with pytest.raises(InputError, match="this run holds no inputs, as when it was loaded"):
        toy_graph().replay(run, RESID_POST[0])


# --- on models --------------------------------------------------------------------------------


@pytest.mark.parametrize("after", STARTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_replay_equals_its_full_pass(family: str, after: Location):
    graph = bound(family)
    last = LAYERS - 1
    asked = [after, ATTN_Z[last], ATTN_PATTERN[last], after.grad, LOGITS]
    asked = [x for x in asked if not x.precedes(after)]
    ids = tokens()

    def edit(x: Tensor) -> Tensor:
        return x + 0.5

    hooked = graph.hook(after, edit).hook(RESID_POST[last].at(pos=-1), edit)
    full = hooked.run(ids, save=asked, metric=metric)
    replayed = hooked.replay(graph.run(ids, save=[after]), after, save=asked, metric=metric)
    for place in asked:
        torch.testing.assert_close(replayed[place], full[place], rtol=1e-5, atol=1e-6)
    assert torch.equal(replayed.logits, full.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_before_the_start_do_nothing(family: str):
    graph = bound(family)
    layers = layers_of(family, model_of(graph))
    ran: list[int] = []
    handles = [
        next(layer.children()).register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(layers)
    ]
    try:
        run = graph.run(tokens(), save=[RESID_POST[1]])
        ran.clear()
        graph.replay(run, RESID_POST[1])
        assert ran == [2]
        ran.clear()
        graph.replay(run, RESID_POST[1], value=run[RESID_POST[1]].repeat(3, 1, 1), save=[ATTN_OUT[2]])
        assert ran == [2]
        ran.clear()
        graph.run(tokens())
        assert ran == [0, 1, 2], "the layers that were skipped run again"
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_inputs_are_replayed_with_their_mask_and_positions(family: str):
    graph = bound(family)
    ids = tokens(3, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[2, :4] = 0
    run = graph.run({"input_ids": ids, "attention_mask": mask}, save=[RESID_POST[0], LOGITS])
    twice = graph.replay(run, RESID_POST[0], value=run[RESID_POST[0]].repeat(2, 1, 1)).logits
    real = mask.bool().repeat(2, 1)
    torch.testing.assert_close(twice[real], run[LOGITS].repeat(2, 1, 1)[real])


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("hooked", [RESID_PRE[0], RESID_PRE[1], RESID_PRE[2], MLP_OUT[1]], ids=str)
def test_a_hook_applies_once_to_what_its_own_run_saved(layer: int, hooked: Location):
    graph = toy_graph().hook(hooked, lambda x: x + 1)
    start = RESID_PRE[layer]
    run = graph.run(IDS, save=[start])
    assert torch.equal(graph.replay(run, start).logits, run.logits)
    further = graph.hook(start, lambda x: 2 * x)
    # A value that is given is hooked by all of them: at the start itself, that is one too much.
    given = 2 * run[start] - (1 if start == hooked else 0)
    expected = graph.replay(run, start, value=given).logits
    assert torch.allclose(further.replay(run, start).logits, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x: x[..., :3], r"\(2, 3, 3\) float64"),
        (lambda x: x[:, :2], r"\(2, 2, 4\) float64"),
        (lambda x: x.float(), r"\(2, 3, 4\) float32"),
    ],
    ids=["width", "positions", "dtype"],
)
def test_a_value_that_is_not_like_what_was_there_is_an_error(change: Callable[[Tensor], Tensor], found: str):
    graph, after = toy_graph(), RESID_POST[1]
    run = graph.run(IDS, save=[after])
    with pytest.raises(
        ShapeMismatchError, match=rf"{found}, and the earlier run had \(2, 3, 4\) float64 there"
    ):
        graph.replay(run, after, value=change(run[after]))
