"""Circuits: discovered over a stream, drawn, stored, and evaluated against runs made by hand."""

from dataclasses import replace
from functools import cache
from math import inf
from typing import Any, get_args

import networkx as nx
import pytest
import torch
from torch import Tensor

from hookgraph.algorithms.circuits.ablating import Ablation, Errors
from hookgraph.algorithms.circuits.circuit import Circuit
from hookgraph.algorithms.circuits.direct import edges
from hookgraph.algorithms.circuits.discovery import discover_circuit
from hookgraph.algorithms.circuits.evaluation import Faithfulness, faithfulness, random_circuit
from hookgraph.algorithms.circuits.sizes import SizeCurve, size_curve
from hookgraph.algorithms.effects.patching import Method, patching_effect
from hookgraph.algorithms.interventions.replacements import moved
from hookgraph.algorithms.interventions.statistics import mean_activations
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.binding import bind
from hookgraph.errors import HookGraphError, InputError, MetricError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import ATTN_Z, LOGITS, MLP_OUT, RESID_POST
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs import AutoencoderGraph
from hookgraph_tests.families import bound, tokens
from hookgraph_tests.planted_circuits import PLANTED
from hookgraph_tests.planted_dictionaries import edges_between_writers, planted_dictionaries, writer_of
from hookgraph_tests.subgraphs.planted import planted
from hookgraph_tests.unchecked import unchecked

METRIC = logit_diff(3, 5)
CLEAN, CORRUPT = tokens(4, 4, seed=1), tokens(4, 4, seed=2)
SITES = (MLP_OUT[1], RESID_POST[1], MLP_OUT[2])


@cache
def spliced() -> tuple[HookGraph, tuple[AutoencoderGraph, ...]]:
    saes = tuple(AutoencoderGraph(planted(32, 12, seed=i), site) for i, site in enumerate(SITES))
    return bound("gpt2", torch.float64).inject(*saes), saes


@cache
def found() -> Circuit:
    graph, saes = spliced()
    return discover_circuit(
        graph, [(CLEAN, CORRUPT)], METRIC, saes, node_threshold=0.02, edge_threshold=0.001, steps=4
    )


def test_nodes_are_those_whose_effect_exceeds_the_threshold():
    graph, saes = spliced()
    at = [x for s in saes for x in (s.latents, s.error)]
    effect = patching_effect(graph, CLEAN, CORRUPT, METRIC, at, "ig", steps=4).effects
    totals = effect.sum("pos").mean("batch")
    for sae in saes:
        for latent, value in enumerate(totals[sae.latents].tolist()):
            node = sae.latents.at(latent=latent)
            assert (node in found().nodes) == (abs(value) > 0.02)
            assert found().nodes.get(node, value) == pytest.approx(value)
        error = float(totals[sae.error])
        assert found().nodes.get(sae.error, error) == pytest.approx(error)
    assert 0 < len(found().nodes) < 39


def test_edges_are_those_of_edges_between_nodes_of_the_circuit():
    graph, saes = spliced()
    expected = edges(graph, CLEAN, CORRUPT, METRIC, saes, saes, method="ig", steps=4, node_threshold=0.02,
                     aggregation="sum", edge_threshold=0.001)  # fmt: skip
    kept = {(e.source, e.target): e.weight for e in found().edges.each() if e.target != LOGITS}
    whole = {(e.source, e.target): e.weight for e in expected.each()}
    assert kept == pytest.approx({k: w for k, w in whole.items() if set(k) <= set(found().nodes)})
    assert kept


def test_edges_to_the_metric_go_past_later_sites_and_never_past_the_stream():
    graph, (early, stream, late) = spliced()
    last = {e.source: e.weight for e in found().edges.each() if e.target == LOGITS}
    assert not [x for x in last if x.site == early.site]
    together = [late.latents, late.error]
    counted = patching_effect(graph, CLEAN, CORRUPT, METRIC, together, "ig", steps=4).effects
    for node in (x for x in last if x.site == late.site):
        each = counted[late.error] if node == late.error else counted[late.latents][..., _index(node)]
        assert last[node] == pytest.approx(float(each[each.abs() > 0.02].sum() / 4))
    # Past mlp.out[2], which is stopped: what of the stream reaches the metric along the stream alone.
    cut = graph.hook(MLP_OUT[2].grad, torch.zeros_like)
    direct = patching_effect(cut, CLEAN, CORRUPT, METRIC, [stream.latents]).effects[stream.latents]
    together = [stream.latents, stream.error]
    whole = patching_effect(graph, CLEAN, CORRUPT, METRIC, together, "ig", steps=4)
    past = direct * (whole.effects[stream.latents].abs() > 0.02)
    for node in (x for x in last if x.whole == stream.latents):
        assert last[node] == pytest.approx(float(past[..., _index(node)].sum() / 4))


def _index(node: Location) -> int:
    index = node.index[-1][1]
    assert isinstance(index, int)
    return index


def test_a_stream_of_batches_gives_the_circuit_of_all_examples():
    graph, saes = spliced()
    parts = [(CLEAN[:1], CORRUPT[:1]), (CLEAN[1:], CORRUPT[1:], METRIC)]
    streamed = discover_circuit(
        graph, parts, METRIC, saes, node_threshold=0.02, edge_threshold=0.001, steps=4
    )
    assert streamed.nodes == pytest.approx(found().nodes)
    assert streamed.edges.examples == 4
    theirs, ours = ({(e.source, e.target): e.weight for e in c.edges.each()} for c in (found(), streamed))
    assert ours == pytest.approx(theirs)


def test_positions_are_kept_on_request():
    graph, saes = spliced()
    placed = discover_circuit(
        graph, [(CLEAN, CORRUPT)], METRIC, saes[2], node_threshold=0.0, edge_threshold=0.0, aggregation="none"
    )
    assert {dict(x.index)["pos"] for x in placed.nodes} <= {0, 1, 2, 3}
    assert placed.edges.count


def test_it_draws_stores_and_tells(tmp_path: Any):
    circuit = found()
    path = tmp_path / "circuit.safetensors"
    circuit.save(path)
    again = Circuit.load(path)
    assert again.nodes == circuit.nodes
    assert again.places == circuit.places
    assert repr(again) == repr(circuit)
    drawn = circuit.to_networkx()
    assert nx.is_directed_acyclic_graph(drawn)
    assert drawn.number_of_edges() == circuit.edges.count
    assert drawn.nodes[str(next(iter(circuit.nodes)))]["effect"] == next(iter(circuit.nodes.values()))
    dot = circuit.to_dot(most=5)
    assert dot.startswith("digraph circuit {")
    assert dot.count(" -> ") == 5
    assert all(str(node) in dot for node in circuit.nodes)
    labels = {x.get_text() for x in circuit.plot().axes[0].texts}
    assert "error" in labels
    assert "<table" in circuit._repr_html_()
    frame = circuit.to_frame()
    assert frame["edges out"].sum() == circuit.edges.count
    fewer = circuit.threshold(nodes=0.05, edges=0.01)
    assert all(abs(x) > 0.05 for x in fewer.nodes.values())
    assert all(abs(e.weight) > 0.01 and e.source in fewer.nodes for e in fewer.edges.each())
    with pytest.raises(HookGraphError, match="is not in this circuit of"):
        circuit.within([MLP_OUT[0]])


@pytest.mark.parametrize("name", PLANTED)
def test_planted_edges_between_latents_come_out_and_no_others(name: str):
    graph, saes = bind(PLANTED[name](), check=False), planted_dictionaries()
    pair = torch.tensor([[1, 9, 4], [7, 2, 1]]), torch.tensor([[6, 3, 11], [0, 8, 11]])
    circuit = discover_circuit(
        graph.inject(*saes), [pair], METRIC, saes, node_threshold=0.0, edge_threshold=0.0, steps=4
    )
    weights: dict[tuple[Any, Any], float] = {}
    for edge in circuit.edges.each():
        ends = writer_of(edge.source), writer_of(edge.target)
        weights[ends] = weights.get(ends, 0.0) + abs(edge.weight)
    true = edges_between_writers()
    others = [weight for ends, weight in weights.items() if ends not in true]
    assert true <= set(weights)
    assert min(weights[ends] for ends in true) > 1000 * max(others)


# --- faithfulness --------------------------------------------------------------------------------


def by_hand(circuit: Circuit, ablation: str, errors: str, part: str) -> Tensor:
    """Site by site: encode what the stream is by then, keep, replace, decode, and go on."""
    graph, saes = spliced()
    bare = HookGraph(graph.binding)
    values = graph.run(CLEAN, save=[x for s in saes for x in (s.latents, s.error)])
    other = graph.run(CORRUPT, save=list(values))
    means = mean_activations(graph, [CLEAN], list(values), per_position=True)
    order = moved(4, 0)

    def stand_in(place: Location) -> Tensor:
        if ablation == "mean":
            return means.of(place, "mean")
        return {
            "zero": torch.zeros_like(values[place]),
            "resample": values[place][order],
            "corrupt": other[place],
        }[ablation]

    def inside(place: Location, size: int) -> Tensor:
        if place.type.name == "error" and errors != "default":
            return torch.full((1,), errors == "keep")
        named = [place.at(latent=i) if size > 1 else place for i in range(size)]
        mask = torch.tensor([x in circuit.nodes for x in named])
        return {"circuit": mask, "rest": ~mask, "nothing": torch.zeros_like(mask)}[part]

    def splice(sae: AutoencoderGraph) -> Any:
        coder: Any = sae.autoencoder

        def at_site(x: Tensor) -> Tensor:
            f = coder.encode(x)
            e = x - coder.decode(f)
            f = torch.where(inside(sae.latents, f.shape[-1]), f, stand_in(sae.latents))
            e = torch.where(inside(sae.error, 1), e, stand_in(sae.error))
            return coder.decode(f) + e

        return at_site

    for sae in saes:
        bare = bare.hook(sae.site, splice(sae))
    measured = bare.run(CLEAN, metric=METRIC).metric
    assert measured is not None
    return measured


@pytest.mark.parametrize("errors", get_args(Errors))
@pytest.mark.parametrize("ablation", get_args(Ablation))
def test_faithfulness_equals_a_pass_made_by_hand(ablation: Ablation, errors: Errors):
    graph, _ = spliced()
    before = dict(found().nodes)
    result = faithfulness(graph, found(), [(CLEAN, CORRUPT)], METRIC, ablation=ablation, errors=errors)
    for part in ("circuit", "rest", "nothing"):
        expected = by_hand(found(), ablation, errors, part)
        assert torch.allclose(getattr(result, part), expected, atol=1e-12), part
    assert torch.allclose(result.model, METRIC(graph.run(CLEAN).logits))
    span = (result.model - result.nothing).mean()
    assert result.faithfulness == pytest.approx(float((result.circuit - result.nothing).mean() / span))
    assert found().nodes == before


def test_a_circuit_of_all_nodes_is_faithful_and_complete():
    graph, saes = spliced()
    everything = discover_circuit(
        graph, [(CLEAN, CORRUPT)], METRIC, saes, node_threshold=0.0, edge_threshold=1e9, method="attrib"
    )
    nodes = {x: 0.0 for s in saes for x in (*(s.latents.at(latent=i) for i in range(12)), s.error)}
    everything = Circuit(nodes, everything.edges, everything.places)
    result = faithfulness(graph, everything, [(CLEAN, None)], METRIC, ablation="zero")
    assert result.faithfulness == pytest.approx(1)
    assert result.completeness == pytest.approx(0)


def test_raw_locations_are_evaluated_too():
    graph = bound("gpt2", torch.float64)
    circuit = discover_circuit(
        graph, [(CLEAN, CORRUPT)], METRIC, graph.every(ATTN_Z), joint=["d_head"], node_threshold=0.05
    )
    assert circuit.nodes
    result = faithfulness(graph, circuit, [(CLEAN, CORRUPT)], METRIC, ablation="zero")
    ablated = graph
    for place in graph.every(ATTN_Z):
        kept = torch.tensor([place.at(head=i) in circuit.nodes for i in range(4)])
        ablated = ablated.hook(place, lambda z, kept=kept: z * kept[:, None])
    assert torch.allclose(result.circuit, METRIC(ablated.run(CLEAN).logits), atol=1e-12)


def test_random_circuits_have_the_same_size(tmp_path: Any):
    circuit, (sae, *_) = found(), spliced()[1]
    among = [x for s in spliced()[1] for x in (*(s.latents.at(latent=i) for i in range(12)), s.error)]
    drawn = random_circuit(circuit, among, seed=1)
    assert len(drawn.nodes) == len(circuit.nodes)
    assert set(drawn.nodes) <= set(among)
    assert random_circuit(circuit, among, seed=1).nodes == drawn.nodes
    with pytest.raises(HookGraphError, match="cannot be drawn from"):
        random_circuit(circuit, [sae.error])
    graph, _ = spliced()
    result = faithfulness(graph, drawn, [(CLEAN, CORRUPT)], METRIC)
    result.save(tmp_path / "f.safetensors")
    assert repr(Faithfulness.load(tmp_path / "f.safetensors")) == repr(result)
    assert len(result.to_frame()) == 4
    assert "completeness" in result._repr_html_()
    assert [x.get_text() for x in result.plot().axes[0].get_yticklabels()] == list(result.to_frame())


@pytest.mark.parametrize("ablation", ["mean", "resample", "zero"])
def test_nodes_are_chosen_against_what_stands_in_for_them(ablation: Ablation):
    """The effects of all nodes of a site add up to what putting the stand-ins there changes."""
    graph, saes = spliced()
    circuit = discover_circuit(
        graph, [(CLEAN, CORRUPT)], METRIC, saes[2], node_threshold=0.0, edge_threshold=inf, steps=32,
        ablation=ablation,
    )  # fmt: skip
    assert not circuit.edges.blocks
    result = faithfulness(graph, circuit, [(CLEAN, CORRUPT)], METRIC)
    assert result.ablation == ablation
    assert sum(circuit.nodes.values()) == pytest.approx(
        float((result.nothing - result.model).mean()), abs=1e-6
    )
    assert result.faithfulness == pytest.approx(1)


def test_means_are_of_all_positions_where_rows_begin_with_padding():
    graph, saes = spliced()
    mask = torch.ones_like(CLEAN)
    mask[0, 0] = 0
    padded = {"input_ids": CLEAN, "attention_mask": mask}
    means = mean_activations(graph, [padded], [saes[2].latents, saes[2].error])
    ours, theirs = (
        faithfulness(graph, found().within([]), [(padded, None)], METRIC, ablation="mean", statistics=x)
        for x in (None, mean_activations(graph, [padded], found().places))
    )
    assert torch.equal(ours.nothing, theirs.nothing)
    with pytest.raises(HookGraphError, match="one of them stands in"):
        patching_effect(graph, padded, padded, METRIC, list(means.means), statistics=means)
    with pytest.raises(HookGraphError, match="ig_inputs moves the embeddings"):
        patching_effect(graph, padded, None, METRIC, list(means.means), "ig_inputs", statistics=means)


def test_exact_effects_against_means_are_those_of_setting_the_mean():
    graph = bound("gpt2", torch.float64)
    means = mean_activations(graph, [CLEAN], [ATTN_Z[1]], per_position=True)
    effect = patching_effect(
        graph, CLEAN, None, METRIC, [ATTN_Z[1]], "exact", joint=["d_head"], statistics=means
    )
    assert effect.convention.ablation == "mean"
    value = means.of(ATTN_Z[1], "mean")[2, 3]
    hooked = graph.hook(ATTN_Z[1].at(pos=2, head=3), lambda _: value.expand(4, -1))
    expected = METRIC(hooked.run(CLEAN).logits) - METRIC(graph.run(CLEAN).logits)
    assert torch.allclose(effect.effects[ATTN_Z[1]][:, 2, 3].flatten(), expected, atol=1e-12)
    again = effect.sum("pos").check(1)[0]
    assert again.exact is not None


@pytest.mark.parametrize("method", ["attrib", "ig", "exact"])
def test_means_per_position_are_those_of_the_positions_behind_padding(method: Method):
    graph = bound("gpt2", torch.float64)
    means = mean_activations(graph, [tokens(3, 5, seed=4)], [ATTN_Z[1]], per_position=True)
    padded = {"input_ids": CLEAN, "attention_mask": torch.ones_like(CLEAN)}
    padded["attention_mask"][0, 0] = 0
    found, alone = (
        patching_effect(graph, x, None, METRIC, [ATTN_Z[1]], method, joint=["d_head"], statistics=means)
        for x in (padded, CLEAN[:1, 1:])
    )
    expected = alone.effects[ATTN_Z[1]][0]
    assert torch.allclose(found.effects[ATTN_Z[1]][0, 1:], expected, atol=1e-9)
    assert not torch.allclose(expected, torch.zeros_like(expected), atol=1e-3)


def test_the_curve_over_sizes_is_that_of_the_largest_nodes_beside_random_ones(tmp_path: Any):
    graph, saes = spliced()
    pairs = [(CLEAN, CORRUPT)]
    circuit = discover_circuit(graph, pairs, METRIC, saes, node_threshold=0.0, edge_threshold=inf, steps=2)
    total = len(circuit.nodes)
    curve = size_curve(graph, circuit, pairs, METRIC, sizes=(2, 9, total), random=2)
    nine = faithfulness(graph, circuit.largest(9), pairs, METRIC)
    assert curve.to_frame().loc[9, "faithfulness"] == pytest.approx(nine.faithfulness)
    assert curve.to_frame().loc[9, "completeness"] == pytest.approx(nine.completeness)
    drawn = random_circuit(circuit.largest(9), list(circuit.nodes), seed=1)
    assert float(curve.random[1, 1]) == pytest.approx(faithfulness(graph, drawn, pairs, METRIC).faithfulness)
    assert curve.faithfulness[-1] == pytest.approx(1)
    dipping = replace(curve, sizes=(1, 2, 3, 4), faithfulness=torch.tensor([0.9, 0.3, 0.85, 1.0]))
    assert dipping.smallest(0.8) == 3, "from there on, all are"
    with pytest.raises(HookGraphError, match=r"has a faithfulness of 1\.5"):
        dipping.smallest(1.5)
    with pytest.raises(HookGraphError, match=f"give numbers from 1 to {total}"):
        size_curve(graph, circuit, pairs, METRIC, sizes=(0,))
    curve.save(tmp_path / "curve.safetensors")
    assert repr(SizeCurve.load(tmp_path / "curve.safetensors")) == repr(curve)
    assert [x.get_label() for x in curve.plot().axes[0].get_lines()][-4:-2] == [
        "the largest nodes",
        "all others",
    ]
    assert len(size_curve(graph, circuit, pairs, METRIC, random=0).sizes) > 3


def test_what_cannot_be_evaluated_is_refused():
    graph, saes = spliced()
    wrong: Any = "median"
    with unchecked(), pytest.raises(HookGraphError, match="ablation='median' is unknown"):
        faithfulness(graph, found(), [(CLEAN, CORRUPT)], METRIC, ablation=wrong)
    with pytest.raises(InputError, match="a batch has none"):
        faithfulness(graph, found(), [(CLEAN, None)], METRIC, ablation="corrupt")
    with pytest.raises(InputError, match="there are no pairs"):
        faithfulness(graph, found(), [], METRIC)
    with pytest.raises(MetricError, match="nothing is measured"):
        discover_circuit(graph, [(CLEAN, CORRUPT)], None, saes)
    with unchecked(), pytest.raises(InputError, match="pass a list of batches"):
        discover_circuit(graph, (CLEAN, CORRUPT), METRIC, saes)  # pyright: ignore[reportArgumentType]
    with pytest.raises(HookGraphError, match="a circuit is that of many examples"):
        discover_circuit(graph, [(CLEAN, CORRUPT)], METRIC, saes, aggregation="examples")


def test_a_share_of_nothing_is_no_number_but_an_error():
    graph, _ = spliced()
    pairs = [(CLEAN, CLEAN)]
    with pytest.raises(MetricError, match="ablating everything does not change the metric"):
        faithfulness(graph, found(), pairs, METRIC, ablation="corrupt")
    with pytest.raises(MetricError, match="ablating everything does not change the metric"):
        size_curve(graph, found(), pairs, METRIC, ablation="corrupt")
