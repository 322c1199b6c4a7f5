from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hookgraph.errors import (
    AlreadyAttachedError,
    HookGraphError,
    InputError,
    LocationError,
    MetricError,
    ShapeMismatchError,
    UnknownLocationError,
)
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.autoencoder import LATENTS
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import (
    ATTN_Z,
    LOGITS,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
)
from hookgraph.ontology.weights import W_O
from hookgraph_tests.toy import Coordinates, orthonormal, toy_graph, toy_of, toy_tokens
from hookgraph_tests.unchecked import unchecked

READOUT = torch.linspace(-1, 1, 7, dtype=torch.float64)
IDS = toy_tokens()


def metric(logits: Tensor) -> Tensor:
    return (logits * READOUT).sum((1, 2))


def plain(graph: HookGraph) -> Tensor:
    return graph.run(IDS).logits


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quadratic", [True, False], ids=["quadratic", "linear"])
def test_activations_and_gradients_are_those_of_the_closed_form(quadratic: bool):
    graph = toy_graph(quadratic=quadratic)
    expected = toy_of(graph).closed_form(IDS, READOUT)
    asked = [*graph.locations, *(location.grad for location in graph.locations)]
    run = graph.run(IDS, save=asked, metric=metric)
    assert list(run) == asked
    for location in asked:
        torch.testing.assert_close(run[location], expected[location], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "index", [{"pos": -1}, {"pos": [0, 2], "d_model": [3, 1]}, {"batch": 1, "d_model": slice(2)}], ids=str
)
@pytest.mark.parametrize("kind", [RESID_PRE, MLP_OUT, RESID_POST], ids=str)
def test_a_part_is_the_part_of_the_whole(kind: LocationType, index: dict[str, Any]):
    part, graph = kind[1].at(**index), toy_graph()
    whole = graph.run(IDS, save=[kind[1], kind[1].grad], metric=metric)
    run = graph.run(IDS, save=[part, part.grad], metric=metric)
    for place in (part, part.grad):
        from_whole = whole[place.whole if place == part else place.whole.grad].numpy()
        chosen = [index.get(dim, slice(None)) for dim in ("batch", "pos", "d_model")]
        for axis in (2, 1, 0):
            from_whole = from_whole[(*[slice(None)] * axis, chosen[axis])]
        assert torch.equal(run[place], torch.from_numpy(from_whole.copy()))


def test_what_is_returned_is_outside_the_autograd_graph_unless_asked():
    graph, here = toy_graph(), RESID_POST[1]
    without = graph.run(IDS, save=[here, here.grad], metric=metric)
    assert without.metric is not None
    assert not any(
        t.requires_grad for t in (without[here], without[here.grad], without.metric, without.logits)
    )
    kept = graph.run(IDS, save=[here], metric=metric, grad=True)
    assert kept.metric is not None
    (gradient,) = torch.autograd.grad(kept.metric.sum(), kept[here])
    torch.testing.assert_close(gradient, without[here.grad])


def test_with_grad_the_parameters_get_gradients_as_without_a_graph():
    graph = toy_graph()
    weights = toy_of(graph).parameters
    expected = torch.autograd.grad(metric(toy_of(graph).forward({"input_ids": IDS})).sum(), weights)
    run = graph.run(IDS, save=[RESID_POST[0]], metric=metric, grad=True)
    assert run.metric is not None
    assert all(map(torch.equal, torch.autograd.grad(run.metric.sum(), weights), expected))


def test_no_gradient_of_the_parameters_is_computed_for_a_gradient_that_is_saved():
    graph = toy_graph()
    graph.run(IDS, save=[RESID_POST[0].grad], metric=metric)
    weights = toy_of(graph).parameters
    assert all(w.grad is None and w.requires_grad for w in weights)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
def test_gradients_are_computed_whatever_the_callers_mode(mode: Callable[[], Any]):
    graph, here = toy_graph(), RESID_POST[0]
    expected = graph.run(IDS, save=[here.grad], metric=metric)[here.grad]
    with mode():
        enabled = torch.is_grad_enabled()
        assert torch.equal(graph.run(IDS, save=[here.grad], metric=metric)[here.grad], expected)
        assert torch.is_grad_enabled() == enabled


def test_a_mapping_of_arguments_is_run_like_token_ids():
    graph = toy_graph()
    assert torch.equal(graph.run({"input_ids": IDS}).logits, plain(graph))


# --- hooking ----------------------------------------------------------------------------------


def test_a_graph_is_a_value():
    graph = toy_graph()
    before = plain(graph)
    hooked = graph.hook(RESID_POST[0], torch.zeros_like)
    again = hooked.hook(LOGITS, torch.neg)
    assert (graph.registrations, len(hooked.registrations), len(again.registrations)) == ((), 1, 2)
    assert torch.equal(plain(graph), before)
    assert torch.equal(plain(again), -plain(hooked))
    assert not torch.equal(plain(hooked), before)


def test_a_forward_hook_changes_what_comes_after_as_the_algebra_says():
    graph = toy_graph(quadratic=False)
    run = graph.run(IDS, save=[MLP_OUT[1], MLP_OUT[1].grad], metric=metric)
    without = graph.hook(MLP_OUT[1], torch.zeros_like).run(IDS, metric=metric).metric
    assert without is not None
    assert run.metric is not None
    change = -(run[MLP_OUT[1]] * run[MLP_OUT[1].grad]).sum((1, 2))
    torch.testing.assert_close(without - run.metric, change, rtol=1e-12, atol=1e-12)


def test_hooks_at_one_location_are_called_in_the_order_of_registration():
    graph = toy_graph().hook(RESID_POST[1], lambda x: x + 1).hook(RESID_POST[1].at(pos=0), torch.zeros_like)
    other = toy_graph().hook(RESID_POST[1].at(pos=0), torch.zeros_like).hook(RESID_POST[1], lambda x: x + 1)
    saved = [g.run(IDS, save=[RESID_POST[1]])[RESID_POST[1]][:, 0] for g in (graph, other)]
    assert saved[0].unique().tolist() == [0]
    assert saved[1].unique().tolist() == [1]


def test_a_save_is_of_the_value_after_the_hooks():
    graph = toy_graph().hook(RESID_POST[1], lambda x: 2 * x)
    saved = graph.run(IDS, save=[RESID_POST[1]])[RESID_POST[1]]
    assert torch.equal(saved, 2 * toy_graph().run(IDS, save=[RESID_POST[1]])[RESID_POST[1]])


def test_a_hook_that_edits_in_place_and_returns_the_tensor_is_obeyed():
    def zero(x: Tensor) -> Tensor:
        x[:] = 0
        return x

    for place in (RESID_POST[1], RESID_POST[1].at(pos=1), RESID_POST[1].at(pos=[0, 2])):
        in_place = toy_graph().hook(place, zero).run(IDS).logits
        assert torch.equal(in_place, toy_graph().hook(place, torch.zeros_like).run(IDS).logits), place


def test_a_gradient_hook_replaces_the_gradient_that_flows_back():
    graph, here, before = toy_graph(), MLP_OUT[1], RESID_PRE[1]
    whole = graph.run(IDS, save=[before.grad], metric=metric)[before.grad]
    around = graph.hook(here.grad, torch.zeros_like).run(IDS, save=[before.grad], metric=metric)
    closed = toy_of(graph).closed_form(IDS, READOUT)
    through_stream = closed[RESID_POST[1].grad] @ (torch.eye(4) + toy_of(graph).attention[1]).T.detach()
    torch.testing.assert_close(around[before.grad], through_stream)
    assert not torch.allclose(whole, through_stream)
    assert torch.equal(around.logits, plain(graph)), "a gradient hook changed the forward pass"


@pytest.mark.parametrize("others", [[], [RESID_PRE[0].grad], [MLP_OUT[2].grad]], ids=str)
def test_a_saved_gradient_is_the_one_after_the_gradient_hooks(others: list[Location]):
    here = RESID_POST[1]
    plain_gradient = toy_graph().run(IDS, save=[here.grad], metric=metric)[here.grad]
    graph = toy_graph().hook(here, lambda x: x * 1).hook(here.grad.at(pos=0), lambda g: 3 * g)
    saved = graph.run(IDS, save=[here.grad, *others], metric=metric)[here.grad]
    torch.testing.assert_close(saved[:, 0], 3 * plain_gradient[:, 0])
    torch.testing.assert_close(saved[:, 1:], plain_gradient[:, 1:])


def test_a_stopped_gradient_passes_the_value_on_and_nothing_back():
    graph = toy_graph()
    stopped = graph.stop_gradient(MLP_OUT[1])
    assert torch.equal(plain(stopped), plain(graph))
    zeroed = graph.hook(MLP_OUT[1].grad, torch.zeros_like)
    asked: list[Location] = [RESID_PRE[1].grad]
    expected = zeroed.run(IDS, save=asked, metric=metric)[asked[0]]
    assert torch.equal(stopped.run(IDS, save=asked, metric=metric)[asked[0]], expected)
    assert torch.equal(
        graph.stop_gradient(MLP_OUT[1].grad).run(IDS, save=asked, metric=metric)[asked[0]], expected
    )


def test_the_gradient_stops_at_a_part_only():
    graph, here = toy_graph(), RESID_POST[1]
    expected = graph.run(IDS, save=[here.grad], metric=metric)[here.grad].clone()
    expected[:, 1] = 0
    stopped = graph.stop_gradient(RESID_PRE[2].at(pos=1))
    assert torch.equal(stopped.run(IDS, save=[here.grad], metric=metric)[here.grad], expected)


def test_attached_hooks_the_models_own_calls_and_leaves_it_as_it_was():
    graph = toy_graph()
    toy, before = toy_of(graph), plain(graph)
    hooked = graph.hook(LOGITS, torch.neg)
    with hooked.attached() as inside:
        assert inside is hooked
        assert torch.equal(toy.forward({"input_ids": IDS}), -before)
    assert torch.equal(toy.forward({"input_ids": IDS}), before)


def test_a_model_is_held_by_one_graph_at_a_time():
    graph = toy_graph()
    with graph.attached():
        with pytest.raises(AlreadyAttachedError, match="attached already"):
            graph.hook(LOGITS, torch.neg).run(IDS)
        with pytest.raises(AlreadyAttachedError, match="attached already"), graph.attached():
            pytest.fail("attached twice")
    graph.run(IDS)


# --- what a graph has -------------------------------------------------------------------------


def test_every_lists_the_layers_of_a_type_in_order():
    graph = toy_graph(layers=3)
    assert graph.every(RESID_POST) == (RESID_POST[0], RESID_POST[1], RESID_POST[2])
    assert graph.every(RESID_POST[1]) == graph.every(RESID_POST)
    assert graph.every(LOGITS) == (LOGITS,)


def test_every_latent_of_a_subgraph_is_found_by_one_of_them():
    subgraphs = [Coordinates(kind, "c", orthonormal(4, 2)) for kind in (MLP_OUT[0], MLP_OUT[2])]
    other = Coordinates(RESID_POST[2], "other", orthonormal(4, 2))
    graph = toy_graph().inject(subgraphs[1], subgraphs[0], other)
    assert graph.every(subgraphs[1].latents) == (subgraphs[0].latents, subgraphs[1].latents)
    assert graph.every(LATENTS()) == (*graph.every(subgraphs[0].latents), other.latents)


def test_locations_of_subgraphs_stand_in_causal_order_among_the_others():
    subgraph = Coordinates(MLP_OUT[1], "c", orthonormal(4, 2))
    locations = toy_graph().inject(subgraph).locations
    place = locations.index(subgraph.latents)
    assert (locations[place - 1], locations[place + 1]) == (MLP_OUT[1], RESID_POST[1])


OUTSIDE = LATENTS().within(MLP_OUT[1], "sae")
UNKNOWN: dict[str, tuple[Location, str]] = {
    "type": (RESID_MID[0], r"this model has no location resid.mid\[0\]: did you mean resid\.pre\[0\]"),
    "layer": (RESID_POST[3], r"this model has no location resid.post\[3\]: it has 3 layers"),
    "part": (ATTN_Z[0].at(head=1), r"this model has no location attn.z\[0\]:"),
    "gradient": (RESID_MID[0].grad, r"this model has no location resid.mid\[0\]:"),
    "subgraph": (OUTSIDE, r"no location mlp.out\[1\]/sae/latents: inject its subgraph first"),
}
ASKING: dict[str, Callable[[HookGraph, Location], object]] = {
    "check": lambda graph, location: graph.check(location),
    "hook": lambda graph, location: graph.hook(location, torch.zeros_like),
    "stop_gradient": lambda graph, location: graph.stop_gradient(location),
    "save": lambda graph, location: graph.run(IDS, save=[RESID_POST[0], location], metric=metric),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize(("location", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_asking_for_a_location_that_is_absent_says_why(
    location: Location, message: str, ask: Callable[[HookGraph, Location], object]
):
    with pytest.raises(UnknownLocationError, match=message):
        ask(toy_graph(layers=3), location)


NO_LOCATION: dict[str, tuple[Any, str]] = {
    "type": (MLP_OUT, r"mlp.out is a kind of location: use graph.every\(...\)"),
    "text": ("attn.out[1]", r"'attn.out\[1\]' is text: write Location.parse\('attn.out\[1\]'\)"),
    "number": (3, "3 is no location, such as"),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize(("given", "message"), NO_LOCATION.values(), ids=NO_LOCATION)
def test_what_is_no_location_is_refused(
    given: Any, message: str, ask: Callable[[HookGraph, Location], object]
):
    with unchecked(), pytest.raises(LocationError, match=message):
        ask(toy_graph(), given)


class Hooking:
    """What may be a hook."""

    def one(self, value: Tensor) -> None: ...

    def two(self, value: Tensor, other: Tensor) -> None: ...


HOOKS: dict[str, tuple[Any, str]] = {
    "none": (
        lambda: None,
        r"the hook at resid.post\[1\] takes 0 arguments: it is called with one, the tensor",
    ),
    "two": (lambda value, other: None, r"resid.post\[1\] needs 2 arguments"),
    "named": (lambda value, *, scale: None, "needs named arguments"),
    "named alone": (lambda *values, scale: None, "needs named arguments"),
    "method": (Hooking().two, "needs 2 arguments"),
}


@pytest.mark.parametrize(("hook", "message"), HOOKS.values(), ids=HOOKS)
def test_a_hook_that_takes_another_number_of_arguments_is_refused(hook: Any, message: str):
    with unchecked(), pytest.raises(HookGraphError, match=message):
        toy_graph().hook(RESID_POST[1].at(pos=0).whole, hook)


def test_whatever_can_be_called_with_one_tensor_is_a_hook():
    graph = toy_graph()
    fits: list[Any] = [
        Hooking().one,
        torch.clone,
        lambda *values: values[0],
        lambda value, scale=2.0, *, bias=0.0: None,
        partial(lambda scale, value: None, 2.0),
    ]
    for hook in fits:
        graph = graph.hook(RESID_POST[1], hook)
    assert torch.equal(plain(graph), plain(toy_graph()))


def test_text_is_no_weight():
    with unchecked(), pytest.raises(UnknownLocationError, match="'W_O' is no weight: give one of"):
        toy_graph().weight("W_O", 0)  # pyright: ignore[reportArgumentType]


def test_a_graph_prints_as_what_it_holds():
    assert repr(toy_graph()) == "HookGraph of ToyBinding: 3 layers, 13 locations, 0 hooks, 0 subgraphs"
    graph = toy_graph().inject(Coordinates(MLP_OUT[1], "c", orthonormal(4, 2))).hook(LOGITS, torch.neg)
    assert repr(graph) == "HookGraph of ToyBinding: 3 layers, 14 locations, 1 hook, 1 subgraph"


def test_one_location_may_be_saved_without_a_list():
    run = toy_graph().run(IDS, save=RESID_POST[1])
    assert list(run) == [RESID_POST[1]]


def test_every_of_a_type_that_no_layer_has_says_why():
    with pytest.raises(UnknownLocationError, match=r"no location resid.mid\[0\]"):
        toy_graph().every(RESID_MID)
    with pytest.raises(UnknownLocationError, match="no location latents"):
        toy_graph().every(LATENTS())


def test_a_binding_without_weights_says_so():
    with pytest.raises(UnknownLocationError, match="ToyBinding has no weights by name, so no W_O"):
        toy_graph().weight(W_O, layer=0)


def test_a_binding_that_proves_nothing_has_an_empty_report():
    assert toy_graph().report.ok
    assert toy_graph().report.proofs == ()


# --- errors -----------------------------------------------------------------------------------


def squeezed(logits: Tensor) -> Any:
    return metric(logits).sum()


def number(logits: Tensor) -> Any:
    return 1.0


METRICS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "scalar": (squeezed, r"returned shape \(\) for a batch of 2: return one number per example"),
    "per position": (lambda logits: logits.sum(-1), r"returned shape \(2, 3\) for a batch of 2"),
    "number": (number, "the metric returned float; return one number per example"),
    "detached": (lambda logits: metric(logits).detach(), r"the metric does not depend on resid.post\[0\]"),
    "constant": (lambda logits: torch.ones(2), r"the metric does not depend on resid.post\[0\]"),
}


@pytest.mark.parametrize(("wrong", "message"), METRICS.values(), ids=METRICS)
def test_a_metric_that_cannot_be_used_says_why(wrong: Callable[[Tensor], Any], message: str):
    graph = toy_graph()
    with pytest.raises(MetricError, match=message):
        graph.run(IDS, save=[RESID_POST[0].grad], metric=wrong)
    assert torch.equal(plain(graph), plain(toy_graph()))


def test_a_gradient_where_no_path_leads_to_the_metric_is_an_error():
    graph = toy_graph().hook(RESID_POST[1], lambda x: torch.ones_like(x, requires_grad=True))
    with pytest.raises(MetricError, match=r"does not depend on resid.post\[0\]: no path leads from there"):
        graph.run(IDS, save=[RESID_POST[0].grad], metric=metric)


def test_a_gradient_without_a_metric_is_an_error():
    with pytest.raises(MetricError, match=r"resid.post\[0\].grad is the gradient of a metric: give `metric`"):
        toy_graph().run(IDS, save=[RESID_POST[0].grad])


def broken(x: Tensor) -> Tensor:
    raise ZeroDivisionError("mine")


HOOKS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "shape": (lambda x: x[:1], ShapeMismatchError, "an edit keeps shape, dtype and device"),
    "dtype": (lambda x: x.float(), ShapeMismatchError, "an edit keeps shape, dtype and device"),
    "no tensor": (lambda x: 1, ShapeMismatchError, "returned int; return a tensor, or None"),
    "its own": (broken, ZeroDivisionError, "mine"),
}


@pytest.mark.parametrize("location", [RESID_POST[1], RESID_POST[1].grad, MLP_OUT[1].at(pos=0)], ids=str)
@pytest.mark.parametrize(("hook", "kind", "message"), HOOKS.values(), ids=HOOKS)
def test_an_error_in_a_hook_comes_through_and_leaves_the_model_as_it_was(
    location: Location, hook: Callable[[Tensor], Any], kind: type[Exception], message: str
):
    graph = toy_graph()
    with pytest.raises(kind, match=message):
        graph.hook(location, hook).run(IDS, save=[RESID_PRE[0].grad], metric=metric)
    assert torch.equal(plain(graph), plain(toy_graph()))
    assert all(w.requires_grad for w in toy_of(graph).parameters)


@pytest.mark.parametrize("location", [MLP_OUT[1].at(pos=3), MLP_OUT[1].at(d_model=[0, -5])], ids=str)
def test_an_index_beyond_the_tensor_is_an_error(location: Location):
    with pytest.raises(LocationError, match=r"is out of range, \w+ has size"):
        toy_graph().run(IDS, save=[location])
    with pytest.raises(LocationError, match=r"is out of range, \w+ has size"):
        toy_graph().hook(location, torch.zeros_like).run(IDS)


def test_inputs_that_cannot_be_run_are_refused_by_the_binding():
    with pytest.raises(InputError, match="token ids of shape"):
        toy_graph().run("text")
