"""Whatever happens within an algorithm, the model is afterwards what it was: a matrix as data.

An algorithm is one row of `ALGORITHMS`; a mishap is one test over them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import final

import pytest
import torch
from torch import Tensor

from hookgraph import algorithms
from hookgraph.algorithms import (
    TunedLens,
    ablate,
    ablate_layer,
    ablate_subspace,
    activation_patching,
    causal_basis,
    causal_tracing,
    cmd,
    contributions,
    counterfactuals,
    cpr,
    direct_logit_attribution,
    discover_circuit,
    edge_attribution,
    edges,
    exact_effects,
    faithfulness,
    lens_logits,
    logit_lens,
    mean_activations,
    mean_patching_effect,
    optimal_constants,
    patching_effect,
    path_patching,
    path_profile,
    remove_subspace,
    sample_activations,
    size_curve,
    steering_vector,
    stimulus_response,
)
from hookgraph.algorithms.circuits.circuit import Circuit
from hookgraph.algorithms.circuits.scores import EdgeScores
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.errors import AlreadyAttachedError, HookGraphError, MetricError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.locations import ATTN_OUT, ATTN_Z, MLP_OUT, RESID_POST
from hookgraph_tests.families import bound, layers_of, model_of, tokens

CLEAN, CORRUPT = tokens(), tokens(seed=1)
HERE = [ATTN_Z[1], MLP_OUT[1]]


@final
@dataclass(frozen=True)
class Algorithm:
    """How an algorithm is called, and what it can be expected to refuse."""

    call: Callable[[HookGraph, Metric], object]
    measures: bool = True
    """Whether it calls the metric."""
    differentiates: bool = False
    """Whether it takes the gradient of the metric."""
    refuses_nan: bool = True


def _fitted(graph: HookGraph, metric: Metric) -> object:
    means = mean_activations(HookGraph(graph.binding), [CLEAN], [MLP_OUT[1]])
    return optimal_constants(graph, [CLEAN], [MLP_OUT[1]], means, loss=metric, steps=2)


def _without_subspace(graph: HookGraph, metric: Metric) -> object:
    return remove_subspace(graph.run(CLEAN, save=[MLP_OUT[1]])[MLP_OUT[1]], torch.ones(32))


@cache
def _scores() -> EdgeScores:
    return edge_attribution(graph_of(), [(CLEAN, CORRUPT)], MEASURE)


@cache
def _circuit() -> Circuit:
    return discover_circuit(graph_of(), [(CLEAN, CORRUPT)], MEASURE, HERE, node_threshold=0.0)


ALGORITHMS = {
    "patching_effect, attrib": Algorithm(
        lambda g, m: patching_effect(g, CLEAN, CORRUPT, m, HERE), differentiates=True
    ),
    "patching_effect, ig": Algorithm(
        lambda g, m: patching_effect(g, CLEAN, CORRUPT, m, HERE, "ig", steps=2), differentiates=True
    ),
    "patching_effect, ig_inputs": Algorithm(
        lambda g, m: patching_effect(g, CLEAN, CORRUPT, m, HERE, "ig_inputs", steps=2), differentiates=True
    ),
    "patching_effect, exact": Algorithm(
        lambda g, m: patching_effect(
            g, CLEAN, CORRUPT, m, [RESID_POST[1].at(pos=-1, d_model=[0, 1])], "exact"
        )
    ),
    "patching_effect, atp_star": Algorithm(
        lambda g, m: patching_effect(g, CLEAN, CORRUPT, m, HERE, "atp_star"), differentiates=True
    ),
    "patching_effect, relp": Algorithm(
        lambda g, m: patching_effect(g, CLEAN, CORRUPT, m, HERE, "relp"), differentiates=True
    ),
    "mean_patching_effect": Algorithm(
        lambda g, m: mean_patching_effect(g, [(CLEAN, CORRUPT)], m, at=HERE), differentiates=True
    ),
    "exact_effects": Algorithm(lambda g, m: exact_effects(g, CLEAN, CORRUPT, m, [ATTN_Z[1].at(head=0)])),
    "activation_patching": Algorithm(lambda g, m: activation_patching(g, CLEAN, CORRUPT, m, [RESID_POST[1]])),
    "path_patching": Algorithm(
        lambda g, m: path_patching(g, CLEAN, CORRUPT, m, [ATTN_OUT[0]], [MLP_OUT[1], MLP_OUT[2]])
    ),
    "causal_tracing": Algorithm(
        lambda g, m: causal_tracing(g, CLEAN, m, [1], [MLP_OUT[1]], samples=2, window=2)
    ),
    "ablate": Algorithm(lambda g, m: ablate(g, HERE, "zero").run(CLEAN, metric=m), refuses_nan=False),
    "mean_activations": Algorithm(lambda g, m: mean_activations(g, [CLEAN], HERE), measures=False),
    "sample_activations": Algorithm(lambda g, m: sample_activations(g, [CLEAN], HERE), measures=False),
    "optimal_constants": Algorithm(_fitted, differentiates=True),
    "steering_vector": Algorithm(
        lambda g, m: steering_vector(g, [(CLEAN, CORRUPT)], MLP_OUT[1]), measures=False
    ),
    "direct_logit_attribution": Algorithm(
        lambda g, m: direct_logit_attribution(g, CLEAN, 3, 5, by="head"), measures=False
    ),
    "counterfactuals": Algorithm(
        lambda g, m: counterfactuals(
            g, CLEAN[:1], lambda x: m(x.expand(2, -1, -1))[:1], MLP_OUT[1], edits=1, top_k=None, tries=2
        ),
        differentiates=True,
    ),
    "logit_lens": Algorithm(lambda g, m: logit_lens(g, CLEAN), measures=False),
    "lens_logits": Algorithm(
        lambda g, m: lens_logits(g, g.run(CLEAN, save=[RESID_POST[1]]), [RESID_POST[1]]),
        measures=False,
        refuses_nan=False,
    ),
    "causal_basis": Algorithm(
        lambda g, m: causal_basis(g, CLEAN, MLP_OUT[1], k=1, tries=1, max_iter=2), measures=False
    ),
    "causal_basis, lens": Algorithm(
        lambda g, m: causal_basis(g, CLEAN, RESID_POST[1], 1, decoder=TunedLens.fit(g, [CLEAN]), max_iter=2),
        measures=False,
    ),
    "stimulus_response": Algorithm(
        lambda g, m: stimulus_response(g, CLEAN, [RESID_POST[1]], intervention="lens"), measures=False
    ),
    "remove_subspace": Algorithm(_without_subspace, measures=False, refuses_nan=False),
    "ablate_subspace": Algorithm(
        lambda g, m: ablate_subspace(g, MLP_OUT[1], torch.ones(32)).run(CLEAN, metric=m), refuses_nan=False
    ),
    "ablate_layer": Algorithm(
        lambda g, m: ablate_layer(g, MLP_OUT[1]).run(CLEAN, metric=m), refuses_nan=False
    ),
    "edges": Algorithm(lambda g, m: edges(g, CLEAN, CORRUPT, m, HERE[:1], HERE[1:]), differentiates=True),
    "discover_circuit": Algorithm(
        lambda g, m: discover_circuit(g, [(CLEAN, CORRUPT)], m, HERE, steps=2), differentiates=True
    ),
    "faithfulness": Algorithm(lambda g, m: faithfulness(g, _circuit(), [(CLEAN, CORRUPT)], m)),
    "size_curve": Algorithm(lambda g, m: size_curve(g, _circuit(), [(CLEAN, CORRUPT)], m)),
    "edge_attribution": Algorithm(
        lambda g, m: edge_attribution(g, [(CLEAN, CORRUPT)], m), differentiates=True
    ),
    "cpr": Algorithm(lambda g, m: cpr(g, _scores(), [(CLEAN, CORRUPT)], m, fractions=[0.1, 1.0])),
    "cmd": Algorithm(lambda g, m: cmd(g, _scores(), [(CLEAN, CORRUPT)], m, fractions=[0.1, 1.0])),
    "contributions": Algorithm(lambda g, m: contributions(g, CLEAN[:1]), measures=False),
    "path_profile": Algorithm(
        lambda g, m: path_profile(g, CLEAN, CORRUPT, m, HERE, steps=3), differentiates=True
    ),
}
"""Every public algorithm: a new one is one row."""

RUN_NOTHING = {"random_circuit"}
"""Public functions that run no model."""


class MishapError(Exception):
    pass


def mishap(*_: object) -> None:
    raise MishapError


def interrupt(_: Tensor) -> None:
    raise KeyboardInterrupt


@contextmanager
def unharmed(graph: HookGraph) -> Iterator[None]:
    """The model is in every respect what it was before, and computes the same."""
    model = model_of(graph)

    def state() -> list[object]:
        hooks = [
            [list(d) for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
            for m in model.modules()
        ]
        gradients = [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()]
        training = [m.training for m in model.modules()]
        return [hooks, gradients, training, model.config.to_dict(), torch.is_grad_enabled()]

    before, logits = state(), model(CLEAN).logits
    try:
        yield
    finally:
        assert state() == before
        assert torch.equal(model(CLEAN).logits, logits)


MEASURE = logit_diff([3, 4], 5)


def those(wanted: Callable[[Algorithm], bool]) -> pytest.MarkDecorator:
    """A test of each algorithm of some kind."""
    found = {name: algorithm for name, algorithm in ALGORITHMS.items() if wanted(algorithm)}
    return pytest.mark.parametrize("algorithm", found.values(), ids=found)


EACH = those(lambda _: True)


def graph_of() -> HookGraph:
    return bound("gpt2", torch.float64)


def test_every_public_algorithm_has_a_row():
    functions = {
        name for name in algorithms.__all__ if name.islower() and callable(getattr(algorithms, name))
    }
    assert functions - RUN_NOTHING == {name.partition(",")[0] for name in ALGORITHMS}


@EACH
def test_all_goes_well(algorithm: Algorithm):
    with unharmed(graph_of()):
        algorithm.call(graph_of(), MEASURE)


@those(lambda x: x.measures)
def test_the_metric_raises(algorithm: Algorithm):
    with unharmed(graph_of()), pytest.raises(MishapError):
        algorithm.call(graph_of(), mishap)  # pyright: ignore[reportArgumentType]


@EACH
@pytest.mark.parametrize("at", [RESID_POST[0], MLP_OUT[1]])
def test_a_hook_raises(algorithm: Algorithm, at):
    with unharmed(graph_of()), pytest.raises(MishapError):
        algorithm.call(graph_of().hook(at, mishap), MEASURE)


@EACH
def test_the_user_interrupts(algorithm: Algorithm):
    with unharmed(graph_of()), pytest.raises(KeyboardInterrupt):
        algorithm.call(graph_of().hook(MLP_OUT[1], interrupt), MEASURE)


@EACH
def test_the_forward_pass_raises(algorithm: Algorithm):
    graph = graph_of()
    with unharmed(graph):
        broken = layers_of("gpt2", model_of(graph))[0].get_submodule("mlp").register_forward_hook(mishap)
        try:
            with pytest.raises(MishapError):
                algorithm.call(graph, MEASURE)
        finally:
            broken.remove()


@EACH
def test_a_graph_holds_the_model_already(algorithm: Algorithm):
    graph = graph_of()
    with unharmed(graph), graph.attached(), pytest.raises(AlreadyAttachedError):
        algorithm.call(graph, MEASURE)


@those(lambda x: x.refuses_nan)
def test_a_number_is_none(algorithm: Algorithm):
    broken = graph_of().hook(RESID_POST[0], lambda x: x * torch.nan)
    with unharmed(graph_of()), pytest.raises(HookGraphError, match="finite"):
        algorithm.call(broken, MEASURE)


@those(lambda x: x.differentiates)
def test_the_metric_depends_on_nothing(algorithm: Algorithm):
    with unharmed(graph_of()), pytest.raises(MetricError, match="does not depend on"):
        algorithm.call(graph_of(), lambda logits: logits.new_zeros(len(logits)))
