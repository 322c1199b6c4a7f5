import pytest
import torch
from torch import Tensor

from hookgraph.errors import HookGraphError, MetricError
from hookgraph.graph.recording import EnoughSeen, Recorder
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import LOGITS, MLP_OUT, RESID_POST, RESID_PRE
from hookgraph_tests.toy import toy_graph, toy_of, toy_tokens

FIRST, SECOND = RESID_POST[0], RESID_POST[1]
IDS = toy_tokens()


def stream(fill: float = 1.0) -> Tensor:
    return torch.full((1, 3, 2), fill)


def recorder(*asked: Location, stop: bool = False, keep_graph: bool = False) -> Recorder:
    return Recorder(asked, stop=stop, keep_graph=keep_graph)


def test_one_observer_stands_at_each_whole_location():
    asked = recorder(FIRST.at(pos=0), FIRST.at(pos=1).grad, SECOND.grad)
    assert set(asked.observers()) == {FIRST, SECOND}
    assert asked.differentiated == {FIRST, SECOND}
    assert recorder(FIRST, SECOND.grad).differentiated == {SECOND}


def test_the_pass_is_stopped_by_the_last_location_that_fires():
    asked = recorder(SECOND, FIRST, stop=True)
    observers = asked.observers()
    observers[FIRST](stream(1))
    with pytest.raises(EnoughSeen):
        observers[SECOND](stream(2))
    assert list(asked.values(None)) == [SECOND, FIRST]


def test_the_pass_goes_on_where_the_logits_are_needed():
    asked = recorder(FIRST)
    asked.observers()[FIRST](stream())


def test_a_location_that_did_not_fire_is_an_error():
    asked = recorder(FIRST, SECOND.at(pos=0))
    asked.observers()[FIRST](stream())
    with pytest.raises(HookGraphError, match=r"did not fire in this pass: resid.post\[1\]"):
        asked.values(None)


def test_a_location_that_fires_twice_is_an_error():
    observe = recorder(FIRST).observers()[FIRST]
    observe(stream())
    with pytest.raises(HookGraphError, match=r"resid.post\[0\] fired twice in one pass"):
        observe(stream())


def test_a_part_does_not_keep_the_whole_alive():
    asked = recorder(FIRST.at(pos=0))
    value = stream()
    asked.observers()[FIRST](value)
    part = asked.values(None)[FIRST.at(pos=0)]
    assert part.untyped_storage().nbytes() == 2 * 4
    value.zero_()
    assert part.tolist() == [[1, 1]]


def test_a_part_of_a_kept_graph_stays_in_the_graph():
    asked = recorder(FIRST.at(pos=0), keep_graph=True)
    value = stream().requires_grad_() * 2
    asked.observers()[FIRST](value)
    part = asked.values(None)[FIRST.at(pos=0)]
    assert torch.autograd.grad(part.sum(), value)[0].sum() == 2


def test_gradients_need_a_metric_that_depends_on_the_location():
    asked = recorder(FIRST.grad, SECOND.grad)
    values = {place: stream().requires_grad_() for place in (FIRST, SECOND)}
    for place, observe in asked.observers().items():
        observe(values[place])
    with pytest.raises(MetricError, match=r"resid.post\[0\].grad is the gradient of a metric"):
        asked.values(None)
    with pytest.raises(MetricError, match=r"does not depend on resid.post\[0\], resid.post\[1\]"):
        asked.values(torch.ones(1))
    with pytest.raises(MetricError, match=r"does not depend on resid.post\[1\]: no path leads"):
        asked.values(values[FIRST].sum((1, 2)))


@pytest.mark.parametrize("last", range(3))
def test_layers_after_the_last_location_asked_for_are_not_executed(last: int):
    graph = toy_graph(layers=3)
    graph.run(IDS, save=[RESID_POST[last].at(pos=0), RESID_PRE[0]])
    assert toy_of(graph).executed == list(range(last + 1))


def test_a_pass_that_stops_early_saves_what_a_whole_pass_saves():
    graph = toy_graph()
    asked = [RESID_PRE[0], RESID_POST[1]]
    stopped, whole = graph.run(IDS, save=asked), graph.run(IDS, save=[*asked, LOGITS])
    assert all(torch.equal(stopped[place], whole[place]) for place in asked)


@pytest.mark.parametrize("at", [RESID_PRE[1], RESID_PRE[1].at(pos=1), RESID_PRE[1].at(pos=[0, 2])], ids=str)
@pytest.mark.parametrize("grad", [None, True], ids=["", "keeping the graph"])
def test_a_hook_that_changes_in_place_does_what_one_that_returns_does(at: Location, grad: bool | None):
    asked = [RESID_POST[0], RESID_PRE[1], RESID_POST[1], LOGITS]
    graph = toy_graph()
    for in_place, returning in ((lambda x: x.add_(1), lambda x: x + 1), (lambda x: None, lambda x: x)):
        run = graph.hook(at, in_place).run(IDS, save=asked, grad=grad)
        expected = graph.hook(at, returning).run(IDS, save=asked, grad=grad)
        assert all(torch.equal(run[place], expected[place]) for place in asked)
        assert torch.equal(run[RESID_POST[0]], graph.run(IDS, save=[RESID_POST[0]])[RESID_POST[0]])


def test_a_hook_is_given_the_very_tensor_where_nothing_saved_lies_in_it():
    given: list[Tensor] = []  # kept, so that the memory of one copy is not given to the next
    graph = toy_graph().hook(RESID_PRE[1], given.append).hook(RESID_PRE[1], given.append)
    graph.run(IDS, save=[MLP_OUT[0], RESID_PRE[1]])
    assert given[0].data_ptr() == given[1].data_ptr()
    graph.run(IDS, save=[RESID_POST[0], LOGITS])
    assert given[2].data_ptr() != given[3].data_ptr()


def test_with_nothing_to_save_the_pass_is_whole():
    graph = toy_graph()
    graph.run(IDS)
    assert toy_of(graph).executed == [0, 1, 2]
