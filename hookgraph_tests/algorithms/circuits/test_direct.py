"""Edge weights against brute force: every target differentiated alone, through the whole model."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import hookgraph as hg
from hookgraph.algorithms.circuits.direct import edges
from hookgraph.algorithms.circuits.pulling import Way
from hookgraph.algorithms.circuits.results import Edges
from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.errors import HookGraphError, LoadError, LocationError, SubgraphError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import (
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Q,
    ATTN_Z,
    EMBED,
    ERROR,
    LATENTS,
    MLP_OUT,
    MLP_POST,
    RESID_POST,
    RESID_PRE,
)
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs import AutoencoderGraph
from hookgraph.subgraphs.activations import TopK
from hookgraph.subgraphs.dictionary import Autoencoder
from hookgraph_tests.families import FAMILIES, bound, tokens
from hookgraph_tests.subgraphs.planted import planted
from hookgraph_tests.toy import Coordinates, ToyBinding, orthonormal
from hookgraph_tests.unchecked import unchecked

METRIC = logit_diff(3, 5)
CLEAN, CORRUPT = tokens(pos=4, seed=1), tokens(pos=4, seed=2)
SITES = [EMBED, ATTN_OUT[0], MLP_OUT[0], RESID_POST[0], ATTN_OUT[1], MLP_OUT[1], RESID_POST[1]]
ATTENTION, MLP, STREAM = ATTN_OUT[1], MLP_OUT[1], RESID_POST[1]
PAIRS: dict[tuple[Location, Location], list[Location]] = {
    (MLP, STREAM): [],
    (ATTENTION, STREAM): [MLP],
    (ATTENTION, MLP): [],
    (RESID_POST[0], MLP): [ATTENTION],
    (RESID_POST[0], ATTENTION): [],
    (RESID_POST[0], STREAM): [ATTENTION, MLP],
    (EMBED, ATTN_OUT[0]): [],
    (EMBED, RESID_POST[0]): [ATTN_OUT[0], MLP_OUT[0]],
}
"""The pair types of the specification, with what is stopped for each."""


@cache
def coders(width: int) -> dict[Location, Autoencoder]:
    return {site: planted(width, 12, seed=i) for i, site in enumerate(SITES)}


def injected(family: str) -> tuple[HookGraph, dict[Location, AutoencoderGraph]]:
    graph = bound(family, torch.float64)
    width = graph.run(tokens(), save=RESID_PRE[0])[RESID_PRE[0]].shape[-1]
    saes = {site: AutoencoderGraph(coder, site) for site, coder in coders(width).items()}
    return graph.inject(*saes.values()), saes


def by_hand(
    graph: HookGraph, sae: tuple[AutoencoderGraph, AutoencoderGraph], stops: Sequence[Location], method: Any
) -> dict[tuple[Location, Location], Tensor]:
    """One backward pass through the whole model for each coordinate of each target, nothing shared."""
    early, late = sae
    clean, corrupt = CLEAN, CORRUPT
    at = [early.latents, early.error, late.latents, late.error]
    effect = patching_effect(graph, clean, corrupt, METRIC, at, method, steps=3)
    bare = bound_without(graph)
    x = bare.run(clean, save=early.site)[early.site]
    coder: Any = early.autoencoder
    f = coder.encode(x).detach().requires_grad_()
    e = (x - coder.decode(f)).detach().requires_grad_()
    moved = bare.hook(early.site, lambda _: coder.decode(f) + e)
    for stop in stops:
        moved = moved.hook(stop, Tensor.detach)
    y = moved.run(clean, save=[late.site], grad=True)[late.site]
    reader: Any = late.autoencoder
    latents = reader.encode(y)
    values = {late.latents: latents, late.error: y - reader.decode(latents)}
    deltas = {k: effect.deltas[k] for k in (early.latents, early.error)}
    found: dict[tuple[Location, Location], Tensor] = {}
    for place, value in values.items():
        products = value * effect.grads[place]
        nodes = products.sum(-1, keepdim=True) if place == late.error else products
        shape = nodes.shape
        for source, leaf in ((early.latents, f), (early.error, e)):
            rows = [
                torch.autograd.grad(n, leaf, retain_graph=True, allow_unused=True)[0] for n in nodes.flatten()
            ]
            stacked = torch.stack([torch.zeros_like(leaf) if row is None else row for row in rows])
            stacked = stacked * deltas[source]
            stacked = stacked.sum(-1, keepdim=True) if source == early.error else stacked
            found[source, place] = stacked.view(*shape, *stacked.shape[1:])
    return found


def bound_without(graph: HookGraph) -> HookGraph:
    return HookGraph(graph.binding, graph.registrations)


def dense(found: Edges, pair: tuple[Location, Location], like: Tensor) -> Tensor:
    """Weights per example over target axes, then source axes, an axis of size 1 for a whole vector."""
    block = found[pair]
    result = torch.zeros_like(like)
    target, source = (list(x.T) for x in (block.target, block.source))
    target += [torch.zeros_like(target[0])] * (3 - len(target))
    source += [torch.zeros_like(source[0])] * (3 - len(source))
    result[(*target, *source)] = block.values
    return result


@pytest.mark.parametrize("ends", PAIRS, ids=lambda x: f"{x[0]}-{x[1]}")
@pytest.mark.parametrize("family", FAMILIES)
def test_edges_equal_brute_force_for_every_kind_of_pair(family: str, ends: tuple[Location, Location]):
    graph, saes = injected(family)
    early, late = (saes[site] for site in ends)
    stop = PAIRS[ends]
    found = edges(graph, CLEAN, CORRUPT, METRIC, early, late, stop=stop, aggregation="examples")
    expected = by_hand(graph, (early, late), stop, "attrib")
    parallel = family == "neox" and ends == (ATTENTION, MLP)
    for pair, value in expected.items():
        assert (dense(found, pair, value) - value).abs().max() < 1e-10, pair
        # Errors act as well, and in a parallel block nothing leads from attention to the MLP.
        assert bool(value.any()) is not parallel, pair


@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma2"])
def test_all_pairs_at_once_stop_at_each_other(family: str):
    graph, saes = injected(family)
    chosen = [saes[x] for x in (RESID_POST[0], ATTENTION, MLP, STREAM)]
    found = edges(
        graph, CLEAN, CORRUPT, METRIC, chosen, chosen, method="ig", steps=3,
        aggregation="examples",
    )  # fmt: skip
    for ends, stops in PAIRS.items():
        if EMBED in ends:
            continue
        expected = by_hand(graph, (saes[ends[0]], saes[ends[1]]), stops, "ig")
        for pair, value in expected.items():
            assert (dense(found, pair, value) - value).abs().max() < 1e-10, pair


def test_nothing_passes_the_stream():
    graph, saes = injected("gpt2")
    found = edges(graph, tokens(), tokens(seed=2), METRIC, list(saes.values()), saes[STREAM])
    assert {s.site for s, _ in found} == {RESID_POST[0], ATTENTION, MLP}
    with pytest.raises(HookGraphError, match="nothing leads from"):
        edges(graph, tokens(), tokens(seed=2), METRIC, saes[STREAM], saes[MLP])


def test_an_error_acts_on_an_error():
    """A published implementation overwrites the gradient before it reads it, and finds exactly 0."""
    graph, saes = injected("gpt2")
    found = edges(graph, tokens(), tokens(seed=2), METRIC, saes[MLP].error, saes[STREAM].error)
    assert found[saes[MLP].error, saes[STREAM].error].values.abs().min() > 1e-6


def test_aggregations_agree():
    graph, saes = injected("gpt2")
    each, kept, summed = (
        edges(graph, tokens(3), tokens(3, seed=2), METRIC, saes[ATTENTION], saes[MLP], aggregation=how)
        for how in ("examples", "none", "sum")
    )
    pair = saes[ATTENTION].latents, saes[MLP].latents
    sizes = dict(zip(LATENTS().dims, (3, 6, 12), strict=True))
    whole = each[pair].to_sparse(sizes, sizes).to_dense()
    mean = whole.sum((0, 3)) / 3
    assert torch.allclose(kept[pair].to_sparse(sizes, sizes).to_dense(), mean, atol=1e-14)
    assert torch.allclose(summed[pair].to_sparse(sizes, sizes).to_dense(), mean.sum((0, 2)), atol=1e-14)


def test_thresholds_leave_out_nodes_of_either_end_and_edges():
    graph, saes = injected("gpt2")
    clean, corrupt = tokens(), tokens(seed=2)
    early, late = saes[ATTENTION], saes[MLP]
    whole = edges(graph, clean, corrupt, METRIC, early, late, aggregation="examples")
    effect = patching_effect(graph, clean, corrupt, METRIC, [early.latents, late.latents])
    least = float(effect.effects[late.latents].abs().quantile(0.8))
    some = edges(graph, clean, corrupt, METRIC, early, late, aggregation="examples", node_threshold=least)
    block, full = some[early.latents, late.latents], whole[early.latents, late.latents]
    assert (effect.effects[early.latents][tuple(block.source.T)].abs() > least).all()
    assert (effect.effects[late.latents][tuple(block.target.T)].abs() > least).all()
    big = [
        bool(effect.effects[early.latents][tuple(s)].abs() > least)
        and bool(effect.effects[late.latents][tuple(t)].abs() > least)
        for s, t in zip(full.source, full.target, strict=True)
    ]
    assert sum(big) == len(block) < len(full)
    cut = edges(graph, clean, corrupt, METRIC, early, late, aggregation="examples", edge_threshold=1e-3)
    assert len(cut[early.latents, late.latents]) == int((full.values.abs() > 1e-3).sum())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_and_neurons_have_edges_without_a_dictionary(family: str):
    graph = bound(family, torch.float64)
    clean, corrupt = tokens(seed=1), tokens(seed=2)
    source, target = ATTN_Z[0], MLP_POST[2]
    found = edges(
        graph, clean, corrupt, METRIC, source, [ATTN_Q[1], target], joint=["d_head"], aggregation="examples"
    )
    effect = patching_effect(graph, clean, corrupt, METRIC, [source, target])
    leaf = graph.run(clean, save=source)[source].detach().requires_grad_()
    run = graph.hook(ATTN_Q[1], Tensor.detach).hook(source, lambda _: leaf)
    value = run.run(clean, save=[target], grad=True)[target] * effect.grads[target]
    block = found[source, target]
    assert len(block) > 100
    for s, t, weight in list(zip(block.source, block.target, block.values, strict=True))[::37]:
        gradient = torch.autograd.grad(value[tuple(t)], leaf, retain_graph=True)[0]
        expected = (gradient * effect.deltas[source]).sum(-1)[tuple(s)]
        assert abs(weight - expected) < 1e-10


class Halves:
    """A dictionary of which nothing is known but that it encodes and decodes."""

    def __init__(self, width: int) -> None:
        self.inner = planted(width, 7)

    def encode(self, x: Tensor) -> Tensor:
        return self.inner.encode(x) / 2

    def decode(self, latents: Tensor) -> Tensor:
        return self.inner.decode(2 * latents)


@pytest.mark.parametrize("kind", ["opaque", "top-k", "unit norm", "layer norm"])
def test_dictionaries_of_every_kind_are_differentiated(kind: str):
    graph, width = bound("gpt2", torch.float64), 32

    def coder(seed: int) -> Any:
        weights = planted(width, 12, seed=seed)
        if kind == "opaque":
            return Halves(width)
        if kind == "top-k":
            return planted(width, 12, activation=TopK(3), seed=seed)
        return Autoencoder(weights.W_enc, weights.W_dec, weights.b_enc, normalisation=kind)  # pyright: ignore[reportArgumentType]

    early, late = AutoencoderGraph(coder(0), ATTENTION), AutoencoderGraph(coder(1), STREAM)
    graph = graph.inject(early, late)
    found = edges(graph, tokens(seed=1), tokens(seed=2), METRIC, early, late, aggregation="examples")
    leaf = bound_without(graph).run(tokens(seed=1), save=ATTENTION)[ATTENTION]
    for which in (early.latents, early.error):
        for place in (late.latents, late.error):
            block = found[which, place]
            assert block.values.abs().sum() > 1e-6
    # A step along every source at once changes each target by what its edges add up to.
    effect = patching_effect(graph, tokens(seed=1), tokens(seed=2), METRIC, [early.latents, late.latents])
    own: Any = early.autoencoder
    x = leaf.detach()
    f = own.encode(x)

    def reached(size: float) -> Tensor:
        f_moved = f + size * effect.deltas[early.latents]
        made = x + (decoded(own, f_moved, x) - decoded(own, f, x))
        y = bound_without(graph).hook(ATTENTION, lambda _: made).run(tokens(seed=1), save=STREAM)[STREAM]
        return late.autoencoder.encode(y)

    slope = (reached(1e-5) - reached(-1e-5)) / 2e-5 * effect.grads[late.latents]
    sizes = dict(zip(LATENTS().dims, f.shape, strict=True))
    total = found[early.latents, late.latents].to_sparse(sizes, sizes).to_dense().sum((0, 1, 2))
    counted = effect.effects[late.latents] != 0
    assert torch.allclose(total[counted], slope[counted], atol=1e-7)


def decoded(coder: Any, latents: Tensor, x: Tensor) -> Tensor:
    return coder.decode(latents, x) if isinstance(coder, Autoencoder) else coder.decode(latents)


def test_they_print_save_and_load(tmp_path: Any):
    graph, saes = injected("gpt2")
    found = edges(graph, tokens(), tokens(seed=2), METRIC, saes[MLP], saes[STREAM])
    path = tmp_path / "edges.safetensors"
    found.save(path)
    again = Edges.load(path)
    assert repr(again) == repr(found)
    assert again.to_frame().equals(found.to_frame())
    assert again.convention == found.convention
    assert again.top(3)[0].source.whole in (saes[MLP].latents, saes[MLP].error)
    assert "<table" in again._repr_html_()
    least = abs(found.top(5)[-1].weight)
    assert found.threshold(least).count == 4
    hg.Run({}).save(path)
    with pytest.raises(LoadError, match="expected a edges"):
        Edges.load(path)
    with pytest.raises(LocationError, match="there are no edges"):
        found[saes[STREAM].latents, saes[MLP].latents]


def test_edges_refuse_what_has_no_meaning():
    graph, saes = injected("gpt2")
    inputs = tokens(), tokens(seed=2)
    with pytest.raises(HookGraphError, match="is a part: edges are between nodes"):
        edges(graph, *inputs, METRIC, ATTN_Z[0].at(head=1), MLP_OUT[1])
    wrong: Any = "mean"
    with unchecked(), pytest.raises(HookGraphError, match="aggregation='mean' is unknown"):
        edges(graph, *inputs, METRIC, saes[MLP], saes[STREAM], aggregation=wrong)
    hooked = graph.hook(saes[MLP].latents, torch.zeros_like)
    with pytest.raises(HookGraphError, match="is hooked: edges are those of the model as it is"):
        edges(hooked, *inputs, METRIC, saes[MLP], saes[STREAM])
    with pytest.raises(HookGraphError, match="pos is not joint"):
        edges(graph, *inputs, METRIC, saes[MLP], saes[STREAM], joint=["pos"])


def test_a_subgraph_that_does_not_tell_says_what_it_lacks():
    toy = HookGraph(ToyBinding())
    coordinates = Coordinates(MLP_OUT[0], "coordinates", orthonormal(4, 2))
    graph = toy.inject(coordinates)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 0]

    with pytest.raises(SubgraphError, match="need the methods `pull` and `push`"):
        edges(graph, torch.tensor([[1, 2]]), torch.tensor([[1, 3]]), metric, coordinates, MLP_OUT[1])
    found = edges(graph, torch.tensor([[1, 2]]), torch.tensor([[1, 3]]), metric, MLP_OUT[0], MLP_OUT[1])
    assert found.count


def test_errors_and_latents_are_what_a_subgraph_stands_for():
    graph, saes = injected("gpt2")
    found = edges(graph, tokens(), tokens(seed=2), METRIC, saes[MLP], saes[STREAM])
    assert {(s.type, t.type) for s, t in found} == {
        (a, b) for a in (LATENTS, ERROR) for b in (LATENTS, ERROR)
    }


@pytest.mark.parametrize("source", range(5))
def test_a_way_is_local_only_if_no_two_positions_meet(source: int):
    start = torch.randn(1, 5, 3, requires_grad=True)
    assert Way(start, 2 * start).is_local
    assert not Way(start, start[:, :3]).is_local
    for target in set(range(5)) - {source}:
        end = 2 * start
        end[:, target] += start[:, source]
        assert not Way(start, end).is_local


def test_edges_between_positions_are_there_though_the_last_one_sees_itself_alone():
    def alone(pattern: Tensor) -> Tensor:
        last = torch.zeros_like(pattern[:, :, -1])
        last[..., -1] = 1
        return torch.cat([pattern[:, :, :-1], last[:, :, None]], dim=2)

    graph = bound("gpt2", torch.float64).hook(ATTN_PATTERN[1], alone)
    found = edges(graph, CLEAN, CORRUPT, METRIC, RESID_POST[0], ATTN_OUT[1])
    block = found.blocks[RESID_POST[0], ATTN_OUT[1]]
    assert (block.source[:, 1] != block.target[:, 1]).any()
