"""What a pass held is freed with its run, at once: on an accelerator memory does not wait for a collector."""

import gc
import weakref
from collections.abc import Generator, Sequence
from typing import final

import pytest
import torch
from torch import Tensor

from hookgraph.graph.abstract import AbstractSubgraph, Frame
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import ATTN_OUT, MLP_OUT, RESID_POST
from hookgraph_tests.toy import Coordinates, orthonormal, toy_graph, toy_tokens

SITE = MLP_OUT[1]
PLAIN = toy_graph()
INJECTED = PLAIN.inject(Coordinates(SITE, "coordinates", orthonormal(4, 2)))
ACTIVATIONS = [ATTN_OUT[0], SITE, RESID_POST[2]]
GRADIENTS = [x.grad for x in ACTIVATIONS]


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 0]


@pytest.fixture(autouse=True)
def _no_collector() -> Generator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("graph", [PLAIN, INJECTED], ids=["plain", "injected"])
@pytest.mark.parametrize("save", [ACTIVATIONS, GRADIENTS], ids=["activations", "gradients"])
@pytest.mark.parametrize("grad", [None, True], ids=["", "keeping the graph"])
def test_a_pass_is_freed_with_its_run(graph: HookGraph, save: Sequence[Location], grad: bool | None):
    held: list[weakref.ref[Tensor]] = []

    def note(value: Tensor) -> None:
        held.append(weakref.ref(value))

    for location in ACTIVATIONS:
        graph = graph.hook(location, note)
    run = graph.run(toy_tokens(), save=save, metric=metric, grad=grad)
    held += [weakref.ref(value) for value in run.values()]
    assert len(held) == 2 * len(ACTIVATIONS)
    del run
    assert not [tensor() for tensor in held if tensor() is not None]


@final
class Noting(AbstractSubgraph):
    """A subgraph that keeps what it sees in its memory."""

    @property
    def name(self) -> str:
        return "noting"

    @property
    def sites(self) -> tuple[Location, ...]:
        return (SITE,)

    @property
    def locations(self) -> tuple[Location, ...]:
        return ()

    def visit(self, site: Location, value: Tensor, frame: Frame) -> Tensor:
        frame.memory["seen"] = value
        return value


def test_what_a_subgraph_noted_is_freed_when_the_graph_is_detached():
    held: list[weakref.ref[Tensor]] = []
    graph = PLAIN.inject(Noting()).hook(SITE, lambda value: held.append(weakref.ref(value)))
    with torch.no_grad(), graph.attached():
        graph.binding.forward(graph.binding.prepare(toy_tokens()))
        assert [tensor() for tensor in held] != [None]
    assert [tensor() for tensor in held] == [None]
