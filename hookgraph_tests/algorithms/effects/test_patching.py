"""Every method of `patching_effect` against a closed form, brute force, and one another."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

import hookgraph as hg
from hookgraph.algorithms import memory
from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.patching import Method, patching_effect
from hookgraph.algorithms.interventions.statistics import mean_activations
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.errors import HookGraphError, LocationError, MetricError, ShapeMismatchError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import (
    ATTN_K,
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Q,
    ATTN_Z,
    EMBED,
    LOGITS,
    MLP_OUT,
    MLP_POST,
    RESID_POST,
    RESID_PRE,
)
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs import Autoencoder
from hookgraph_tests.families import FAMILIES, bound, tokens
from hookgraph_tests.toy import Coordinates, ToyBinding, orthonormal
from hookgraph_tests.unchecked import unchecked

METHODS: tuple[Method, ...] = get_args(Method)
LINEAR: tuple[Method, ...] = ("attrib", "ig", "exact", "relp")
CLEAN, CORRUPT = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 3, 3], [0, 5, 2]])


def metric(logits: Tensor) -> Tensor:
    """A metric that is not one of the library's: it reads all logits and cannot be divided."""
    return logits[:, -1, 2] - logits[:, 0, 1] + logits[:, 1, 3]


def toy(*, quadratic: bool = False) -> HookGraph:
    return HookGraph(ToyBinding(quadratic=quadratic))


def by_hand(
    graph: HookGraph, node: Location, corrupt: Tensor | None, measure: hg.metrics.LogitDifference
) -> Tensor:
    """One full forward pass for one node."""
    clean = graph.run(tokens(), metric=measure).metric
    values = None if corrupt is None else graph.run(corrupt, save=[node])[node]
    patched = graph.hook(node, lambda x: torch.zeros_like(x) if values is None else values)
    after = patched.run(tokens(), metric=measure).metric
    assert clean is not None
    assert after is not None
    return after - clean


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("corrupt", [CORRUPT, None], ids=["corrupt", "zero"])
def test_on_a_linear_network_every_method_is_exact(method: Method, corrupt: Tensor | None):
    graph = toy()
    at = [RESID_PRE[0], ATTN_OUT[1], MLP_OUT[2].at(pos=1), RESID_POST[1].at(pos=[0, 2])]
    got = patching_effect(graph, CLEAN, corrupt, metric, at, method)
    run = graph.run(CLEAN, save=[*at, *(x.grad for x in at)], metric=metric)
    other = {x: torch.zeros_like(run[x]) for x in at} if corrupt is None else graph.run(corrupt, save=at)
    for place in at:
        expected = (other[place] - run[place]) * run[place.grad]
        assert torch.allclose(got.effects[place], expected, rtol=0, atol=1e-10)
        assert got.effects[place].abs().max() > 1e-3


def test_on_a_quadratic_network_two_points_integrate_exactly_and_one_gradient_does_not():
    graph, site = toy(quadratic=True), MLP_OUT[1]
    # One quadratic layer follows: the gradient along the way is linear.
    last = patching_effect(graph, CLEAN, CORRUPT, metric, [site], "ig", steps=1, quadrature="midpoint")
    assert last.residuals[site].abs().max() < 1e-12
    left = patching_effect(graph, CLEAN, CORRUPT, metric, [site], "ig", steps=1, quadrature="left")
    attrib = patching_effect(graph, CLEAN, CORRUPT, metric, [site], "attrib")
    assert torch.allclose(left.effects[site], attrib.effects[site], atol=1e-14)
    assert left.residuals[site].abs().max() > 1e-3


def test_the_residual_is_the_sum_of_effects_less_what_the_site_changes():
    graph, site = toy(quadratic=True), RESID_PRE[0]
    got = patching_effect(graph, CLEAN, CORRUPT, metric, [site], "ig", steps=2, quadrature="right")
    change = exact_effects(graph, CLEAN, CORRUPT, metric, [site])[0]
    expected = got.effects[site].sum((1, 2)) - change
    assert torch.allclose(got.residuals[site], expected, atol=1e-12)
    assert got.total_effect is not None
    assert torch.allclose(change, got.total_effect, atol=1e-12)


def test_adaptive_steps_bring_the_residual_within_the_tolerance_or_say_so():
    graph, site = toy(quadratic=True), RESID_PRE[0]
    rough = patching_effect(graph, CLEAN, CORRUPT, metric, [site], "ig", steps=2, quadrature="left")
    fine = patching_effect(
        graph, CLEAN, CORRUPT, metric, [site], "ig", steps=2, quadrature="gauss-legendre", tolerance=0.01
    )
    assert rough.total_effect is not None
    assert bool((rough.residuals[site].abs() > 0.01 * rough.total_effect.abs()).any())
    assert bool((fine.residuals[site].abs() <= 0.01 * rough.total_effect.abs()).all())
    assert fine.incomplete == ()
    hopeless = patching_effect(
        graph, CLEAN, CORRUPT, metric, [site], "ig", steps=2, quadrature="left", tolerance=1e-9
    )
    assert hopeless.incomplete == (site,)
    assert "not within the tolerance" in repr(hopeless)


def test_steps_over_inputs_adapt_to_the_tolerance_too():
    graph, at = bound("gpt2", torch.float64), [ATTN_Z[1]]
    given = (graph, tokens(), tokens(seed=1), logit_diff(3, 5), at, "ig_inputs")
    found = patching_effect(*given, steps=1, tolerance=0.01)
    plain = patching_effect(*given, steps=found.convention.steps)
    total = found.total_effect
    assert total is not None
    assert bool((found.residuals[EMBED].abs() <= 0.01 * total.abs()).all())
    assert 1 < found.convention.steps <= 64
    assert found.convention.tolerance == 0.01
    assert torch.allclose(found.effects[at[0]], plain.effects[at[0]], rtol=1e-12, atol=1e-15)
    hopeless = patching_effect(*given, steps=64, quadrature="left", tolerance=1e-9)
    assert hopeless.incomplete == (EMBED,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "attrib", "tolerance": 0.1}, "attrib takes no steps that could be adapted to it"),
        ({"method": "ig", "tolerance": -1}, "tolerance=-1: it has to be a positive number"),
        ({"method": "ig", "tolerance": float("nan")}, "tolerance=nan: it has to be a positive number"),
        ({"method": "ig", "steps": 2.5}, "steps=2.5: it has to be a whole number"),
        ({"method": "attrib", "steps": 0}, "steps=0: it has to be a whole number"),
        ({"method": "attrib", "quadrature": "simpson"}, "unknown quadrature 'simpson'"),
        ({"batch_size": 0}, "batch_size=0: it has to be a whole number"),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_every_method(given: dict[str, Any], message: str):
    with unchecked(), pytest.raises(HookGraphError, match=message):
        patching_effect(toy(), CLEAN, CORRUPT, metric, [MLP_OUT[1]], **given)


def test_what_was_adapted_is_told_of_all_sites_and_examples_and_can_be_kept(tmp_path: Path):
    graph, site = toy(quadratic=True), RESID_PRE[0]
    given: dict[str, Any] = {"method": "ig", "steps": np.int64(2), "tolerance": np.float32(0.25)}
    with unchecked():
        found = patching_effect(graph, CLEAN, CORRUPT, metric, [site], quadrature="left", **given)
    assert found.convention.steps in (4, 8, 16, 32, 64)
    found.save(tmp_path / "effect")
    assert hg.PatchingEffect.load(tmp_path / "effect").convention == found.convention


class Divided:
    """A metric with nothing but a method `rows`."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[:, -1].gather(1, self.tokens[:, None])[:, 0]

    def rows(self, chosen: slice) -> "Divided":
        return Divided(self.tokens[chosen])


def test_a_metric_with_a_method_for_some_rows_is_divided():
    own, at = Divided(torch.tensor([3, 4])), [ATTN_OUT[1]]
    found = patching_effect(toy(), CLEAN, CORRUPT, own, at, batch_size=1)
    whole = patching_effect(toy(), CLEAN, CORRUPT, own, at)
    assert torch.allclose(found.effects[at[0]], whole.effects[at[0]], rtol=1e-12, atol=1e-14)


# --- brute force, on models ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_exact_equals_one_full_pass_per_node(family: str, batch_size: int):
    graph, measure = bound(family, torch.float64), logit_diff([3, 4], 5)
    at = [EMBED.at(pos=2), ATTN_Z[0], MLP_OUT[1].at(pos=[-1, 0]), RESID_PRE[2]]
    got = patching_effect(
        graph,
        tokens(),
        tokens(seed=1),
        measure,
        at,
        "exact",
        joint=["d_head", "d_model"],
        batch_size=batch_size,
    )
    nodes = [ATTN_Z[0].at(pos=p, head=h) for p in (0, 3, 5) for h in (0, 3)]
    nodes += [MLP_OUT[1].at(pos=-1), MLP_OUT[1].at(pos=0), RESID_PRE[2].at(pos=4), EMBED.at(pos=2)]
    found = {n.location: n.effect for n in got.nodes()}
    for node in nodes:
        expected = by_hand(graph, node, tokens(seed=1), measure)
        for example in range(2):
            effect = found[node.at(batch=example)]
            assert effect == pytest.approx(float(expected[example]), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_over_coordinates_has_the_shape_of_the_estimates(family: str):
    graph, measure, place = bound(family, torch.float64), logit_diff(3, 5), ATTN_Z[1].at(pos=-1, head=[0, 3])
    exact = patching_effect(graph, tokens(), None, measure, [place], "exact")
    attrib = patching_effect(graph, tokens(), None, measure, [place])
    assert exact.effects[place].shape == attrib.effects[place].shape == (2, 2, 8)
    node = ATTN_Z[1].at(pos=-1, head=3, d_head=6)
    assert torch.allclose(exact.effects[place][:, 1, 6], by_hand(graph, node, None, measure), atol=1e-13)
    assert exact.total_effect is None
    assert exact.convention.ablation == "zero"


@pytest.mark.parametrize("family", FAMILIES)
def test_nodes_given_by_lists_and_slices_are_patched_together(family: str):
    graph, measure = bound(family, torch.float64), logit_diff(3, 5)
    nodes = [
        ATTN_Z[1].at(head=[0, 2], pos=slice(2, None)),
        MLP_OUT[0],
        ATTN_Z[0].at(head=1),
        LOGITS.at(pos=-1),
    ]
    got = exact_effects(graph, tokens(), tokens(seed=1), measure, nodes)
    for node, effect in zip(nodes, got, strict=True):
        assert torch.allclose(effect, by_hand(graph, node, tokens(seed=1), measure), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_add_up_at_each_site(family: str):
    graph, measure = bound(family, torch.float64), logit_diff(3, 5)
    at = [ATTN_Z[1], MLP_POST[2], RESID_PRE[2].at(pos=-1)]
    got = patching_effect(graph, tokens(), tokens(seed=1), measure, at, "ig", steps=40)
    whole = exact_effects(graph, tokens(), tokens(seed=1), measure, at)
    for place, change in zip(at, whole, strict=True):
        total = got.effects[place].flatten(1).sum(1)
        assert torch.allclose(total, change, rtol=1e-2, atol=1e-3)
        assert torch.allclose(total - change, got.residuals[place], atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_integration_in_pieces_is_integration_at_once(family: str):
    graph, measure, at = bound(family, torch.float64), logit_diff([3, 4], 5), [ATTN_Z[1], MLP_OUT[0]]
    methods: tuple[Method, ...] = ("ig", "ig_inputs")
    for method in methods:
        whole, parts = (
            patching_effect(graph, tokens(), tokens(seed=1), measure, at, method, batch_size=n)
            for n in (256, 3)
        )
        for place in at:
            assert torch.allclose(whole.effects[place], parts.effects[place], rtol=1e-10, atol=1e-13)


def test_integration_over_inputs_adds_up_at_the_embedding():
    graph, measure = bound("gpt2", torch.float64), logit_diff(3, 5)
    got = patching_effect(
        graph, tokens(), tokens(seed=1), measure, [EMBED, RESID_PRE[1]], "ig_inputs", steps=40
    )
    assert got.total_effect is not None
    assert torch.allclose(got.effects[EMBED].sum((1, 2)), got.total_effect, rtol=1e-4)
    assert torch.allclose(got.effects[RESID_PRE[1]].sum((1, 2)), got.total_effect, rtol=0.3)


def test_estimates_without_a_sign_are_checked_against_absolute_values():
    graph, ids, other = bound("gpt2", torch.float64), tokens(), tokens(seed=1)
    found = patching_effect(graph, ids, other, logit_diff(5, 7), [MLP_OUT[2].at(pos=-1)], "atp_star")
    by_example = exact_effects(graph, ids, other, logit_diff(5, 7), [MLP_OUT[2].at(pos=-1)])[0]
    node = found.mean("batch").check(1)[0]
    assert node.exact == pytest.approx(float(by_example.abs().mean()), rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_of_a_patched_query_or_key_is_exact_in_atp_star(family: str):
    """With a metric linear in the pattern's row, the effect through the pattern is the whole effect."""
    graph = bound(family, torch.float64)
    clean, corrupt, layer = tokens(1), tokens(1, seed=1), 1
    q, k, pattern = ATTN_Q[layer], ATTN_K[layer], ATTN_PATTERN[layer]
    measure = logit_diff(3, 5)
    got = patching_effect(graph, clean, corrupt, measure, [q, k], "atp_star")
    base = graph.run(clean, save=[pattern])[pattern]
    values = graph.run(corrupt, save=[q, k])
    drops = [_slopes(graph, clean, measure, pattern, drop) for drop in (0, 2)]
    for location, axis in ((q, "head"), (k, "kv_head")):
        for pos, head in ((5, 0), (2, 1)):
            node = location.at(**{"pos": pos, axis: head})
            value = values[location][:, pos, head]
            moved = graph.hook(node, lambda _, v=value: v).run(clean, save=[pattern])[pattern]
            expected = torch.stack([((moved - base) * g).sum().abs().double() for g in drops]).mean()
            # Only GPT-2 computes its softmax in double precision when the model is.
            error = 1e-12 if family == "gpt2" else 1e-5
            assert torch.allclose(got.effects[location][0, pos, head], expected, rtol=error, atol=error)


def _slopes(graph: HookGraph, clean: Tensor, measure: Any, pattern: Location, drop: int) -> Tensor:
    """dm/dpattern with the updates of one layer cut out of the gradient."""
    for location in (ATTN_OUT[drop], MLP_OUT[drop]):
        graph = graph.hook(location.grad, torch.zeros_like)
    return graph.run(clean, save=[pattern.grad], metric=measure)[pattern.grad]


def test_relevance_with_linear_activations_is_exact_where_scales_are_constant():
    """RelP's gradient equals that of the network with scales, patterns and secant slopes frozen."""
    graph, measure, place = bound("gpt2", torch.float64), logit_diff(3, 5), RESID_PRE[2]
    got = patching_effect(graph, tokens(), None, measure, [place], "relp")
    layer = 2
    names = [hg.locations.ATTN_LN_SCALE[layer], hg.locations.MLP_LN_SCALE[layer], hg.locations.FINAL_LN_SCALE]
    ratio = [hg.locations.MLP_PRE[layer], MLP_POST[layer]]
    run = graph.run(tokens(), save=[place, *names, ATTN_PATTERN[layer], *ratio])
    slope = run[ratio[1]] / run[ratio[0]]
    frozen = graph
    for name in (*names, ATTN_PATTERN[layer]):
        frozen = frozen.hook(name, lambda _, v=run[name]: v)
    pre: dict[str, Tensor] = {}

    def keep(x: Tensor) -> None:
        pre["x"] = x

    frozen = frozen.hook(ratio[0], keep).hook(ratio[1], lambda _: pre["x"] * slope)
    direct = frozen.run(tokens(), save=[place, place.grad], metric=measure)
    assert torch.allclose(got.grads[place], direct[place.grad], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_relevance_shares_the_gradient_of_gated_neurons(family: str):
    graph, measure = bound(family, torch.float64), logit_diff(3, 5)
    last = 2
    plain = patching_effect(graph, tokens(), None, measure, [MLP_POST[last]], "attrib")
    relp = patching_effect(graph, tokens(), None, measure, [MLP_POST[last]], "relp")
    # Behind the last neurons there are only norms: their gradient is not halved, and its sign is kept.
    assert relp.grads[MLP_POST[last]].abs().max() > 0
    ratio = (relp.grads[MLP_POST[last]] / plain.grads[MLP_POST[last]])[:, -1].median()
    assert 0.5 < float(ratio) < 2


# --- subgraphs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["attrib", "ig", "exact"])
def test_coordinates_of_a_subgraph_are_attributed_like_locations_of_the_model(method: Method):
    basis = Coordinates(MLP_OUT[1], "basis", orthonormal(4, 3))
    graph = toy().inject(basis)
    got = patching_effect(graph, CLEAN, CORRUPT, metric, [basis.latents, MLP_OUT[1]], method)
    run = graph.run(CLEAN, save=[basis.latents, basis.latents.grad], metric=metric)
    delta = graph.run(CORRUPT, save=[basis.latents])[basis.latents] - run[basis.latents]
    assert torch.allclose(got.effects[basis.latents], delta * run[basis.latents.grad], atol=1e-12)


@pytest.mark.parametrize("method", ["attrib", "ig", "exact", "atp_star"])
def test_errors_keep_the_axis_along_which_they_are_one_node_by_every_method(method: Method):
    graph = bound("gpt2", torch.float64)
    weights = torch.randn(32, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sae = hg.AutoencoderGraph(Autoencoder(weights, weights.T / 8), at=MLP_OUT[1])
    at = [ATTN_Z[1].at(pos=-1), sae.error.at(pos=[-1]), sae.latents.at(pos=[-1])]
    found = patching_effect(
        graph.inject(sae), tokens(), tokens(seed=1), logit_diff(3, 5), at, method, joint=["d_head"], steps=2
    )
    assert [tuple(found.effects[x].shape) for x in at] == [(2, 4), (2, 1, 1), (2, 1, 8)]
    assert found.dims(at[1]) == at[1].dims


# --- batches, memory, hooks ------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_in_pieces_gives_what_it_gives_at_once(method: Method):
    graph, measure = bound("llama", torch.float64), logit_diff([3, 4, 6], 5, pos=[-1, 2, 3])
    at = [ATTN_Z[1].at(pos=-1, head=[0, 1])]
    clean, corrupt = tokens(3), tokens(3, seed=1)
    whole, parts = (
        patching_effect(graph, clean, corrupt, measure, at, method, batch_size=n, steps=3) for n in (64, 2)
    )
    assert torch.allclose(whole.effects[at[0]], parts.effects[at[0]], rtol=1e-9, atol=1e-13)
    assert whole.total_effect is not None
    assert parts.total_effect is not None
    assert torch.allclose(whole.total_effect, parts.total_effect, rtol=1e-10)


def test_a_metric_that_cannot_be_divided_says_so():
    with pytest.raises(MetricError, match="2 examples have to be run 1 at a time, and this metric cannot"):
        patching_effect(toy(), CLEAN, CORRUPT, metric, [MLP_OUT[1]], batch_size=1)


def test_work_that_does_not_fit_in_memory_is_halved_and_nothing_is_done_twice():
    done: list[int] = []

    def work(piece: Any) -> int:
        if len(piece) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(piece)
        return sum(piece)

    found = list(memory.in_pieces(range(10), 8, work))
    assert done == list(range(10))
    assert sum(total for _, total in found) == 45


def test_what_fits_in_no_memory_is_one_error_and_the_model_is_unharmed():
    graph = toy()

    def greedy(logits: Tensor) -> Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    with pytest.raises(HookGraphError, match="out of memory with the smallest batch"):
        patching_effect(graph, CLEAN[:1], CORRUPT[:1], greedy, [MLP_OUT[1]])
    assert graph.run(CLEAN, metric=metric).metric is not None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("hooked", [RESID_PRE[1], RESID_PRE[2], MLP_OUT[0], ATTN_Z[2]], ids=str)
def test_nodes_of_a_hooked_graph_are_patched_in_the_hooked_model(family: str, hooked: Location):
    """Hooks hold values of the clean batch, as the patches of other runs do, and apply once."""
    measure = logit_diff(3, 5)
    bare = bound(family, torch.float64)
    shape = bare.run(tokens(), save=[hooked])[hooked].shape
    shift = torch.randn(shape, dtype=torch.float64)
    graph = bare.hook(hooked, lambda x: x + shift)
    nodes = [ATTN_Z[1].at(head=1), MLP_OUT[1].at(pos=-1), RESID_PRE[2].at(pos=3), ATTN_Z[2].at(head=0)]
    got = exact_effects(graph, tokens(), tokens(seed=1), measure, nodes)
    for node, effect in zip(nodes, got, strict=True):
        assert torch.allclose(effect, by_hand(graph, node, tokens(seed=1), measure), rtol=1e-11, atol=1e-12)
    ig = patching_effect(graph, tokens(), tokens(seed=1), measure, nodes, "ig", steps=40)
    for node, effect in zip(nodes, got, strict=True):
        assert torch.allclose(ig.effects[node].flatten(1).sum(1), effect, rtol=2e-2, atol=2e-3)


def test_a_result_is_indexed_like_a_run():
    found = patching_effect(toy(), CLEAN, CORRUPT, metric, [MLP_OUT[0]])
    assert torch.equal(found[MLP_OUT[0]], found.effects[MLP_OUT[0]])
    with pytest.raises(LocationError, match=r"nothing was attributed to mlp.out\[1\]"):
        found[MLP_OUT[1]]


def test_a_result_is_handed_to_another_process_without_the_model():
    found = patching_effect(toy(), CLEAN, CORRUPT, metric, [MLP_OUT[0]])
    other = pickle.loads(pickle.dumps(found))
    assert torch.equal(other[MLP_OUT[0]], found[MLP_OUT[0]])
    with pytest.raises(HookGraphError, match="it was copied elsewhere"):
        other.sum("d_model").check()


# --- what is refused -------------------------------------------------------------------------------

REFUSED: Mapping[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no places": (
        lambda: patching_effect(toy(), CLEAN, None, metric, None),  # pyright: ignore[reportArgumentType]
        HookGraphError,
        "`at` names the locations to patch, and None is no list",
    ),
    "method": (
        lambda: patching_effect(toy(), CLEAN, None, metric, [MLP_OUT[0]], "atp"),  # pyright: ignore[reportArgumentType]
        HookGraphError,
        "unknown method 'atp': did you mean",
    ),
    "nothing": (lambda: patching_effect(toy(), CLEAN, None, metric, []), HookGraphError, "names no location"),
    "gradient": (
        lambda: patching_effect(toy(), CLEAN, None, metric, [MLP_OUT[0].grad]),
        HookGraphError,
        "is a gradient: name the activation",
    ),
    "batch": (
        lambda: patching_effect(toy(), CLEAN, None, metric, [MLP_OUT[0].at(batch=0)]),
        HookGraphError,
        "is a part of the batch",
    ),
    "length": (
        lambda: patching_effect(toy(), CLEAN, CORRUPT[:, :2], metric, [MLP_OUT[0]]),
        ShapeMismatchError,
        "clean and corrupt differ in input_ids",
    ),
    "nan": (
        lambda: patching_effect(toy(), CLEAN, CORRUPT, lambda x: metric(x) / 0, [MLP_OUT[0]]),
        MetricError,
        "the metric is not a finite number in example 0, 1",
    ),
    "independent": (
        lambda: patching_effect(toy(), CLEAN, CORRUPT, lambda x: torch.zeros(2), [MLP_OUT[0]]),
        MetricError,
        "the metric does not depend on",
    ),
    "no embedding": (
        lambda: patching_effect(toy(), CLEAN, CORRUPT, metric, [MLP_OUT[0]], "ig_inputs"),
        HookGraphError,
        "ig_inputs moves the embeddings",
    ),
    "no pattern": (
        lambda: patching_effect(
            bound("gpt2", torch.float64), tokens(), None, logit_diff(1, 2), [ATTN_Q[1].at(head=0)], "atp_star"
        ),
        HookGraphError,
        "takes queries and keys of a whole layer",
    ),
    "range": (
        lambda: exact_effects(toy(), CLEAN, CORRUPT, metric, [MLP_OUT[0].at(pos=9)]),
        HookGraphError,
        "pos=9 is out of range, pos has size 3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name: str):
    call, kind, message = REFUSED[name]
    with unchecked(), pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("method", METHODS)
def test_a_metric_that_raises_leaves_the_model_as_it_was(method: Method):
    graph = bound("gpt2", torch.float64)
    before = graph.run(tokens()).logits

    def broken(logits: Tensor) -> Tensor:
        raise ValueError("my metric is broken")

    with pytest.raises(ValueError, match="my metric is broken"):
        patching_effect(graph, tokens(), tokens(seed=1), broken, [ATTN_Z[1]], method)
    assert torch.equal(graph.run(tokens()).logits, before)


@pytest.mark.parametrize("method", ["attrib", "ig", "exact", "atp_star", "relp"])
def test_means_of_a_part_stand_in_for_it_as_those_of_the_whole_do(method: Method):
    graph, part, data = bound("gpt2", torch.float64), ATTN_Z[1].at(head=1), [tokens(seed=2), tokens(seed=3)]
    found = [
        patching_effect(
            graph,
            tokens(),
            None,
            logit_diff(5, 7),
            [part],
            method,
            statistics=mean_activations(graph, data, [place]),
        ).effects[part]
        for place in (part, part.whole)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert found[0].abs().max() > 0
