"""Edge attribution against an oracle with split inputs, planted circuits, and runs of circuits."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hookgraph.algorithms.batches import PairBatch
from hookgraph.algorithms.circuits.components import readers_of, writers_of
from hookgraph.algorithms.circuits.curves import Curve, cmd, cpr
from hookgraph.algorithms.circuits.eap import EapMethod, edge_attribution
from hookgraph.algorithms.circuits.reading import Readings
from hookgraph.algorithms.circuits.roc import EdgeRoc
from hookgraph.algorithms.circuits.running import CircuitRunner
from hookgraph.algorithms.circuits.scores import EdgeScores
from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.binding import bind
from hookgraph.errors import HookGraphError, InputError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.locations import (
    ATTN_IN,
    ATTN_K_IN,
    ATTN_OUT,
    ATTN_Q_IN,
    ATTN_RESULT,
    ATTN_V_IN,
    ATTN_Z,
    EMBED,
    LOGITS,
    MLP_IN,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
)
from hookgraph.ontology.locations import Location
from hookgraph_tests.families import FAMILIES, LAYERS, bound, layers_of, model_of, tokens
from hookgraph_tests.planted_circuits import EDGES, PLANTED
from hookgraph_tests.tiny.models import build
from hookgraph_tests.unchecked import unchecked

METRIC = logit_diff(3, 5)
CLEAN, CORRUPT = tokens(3, 5, seed=1), tokens(3, 5, seed=2)


def stream_changes(family: str, graph: HookGraph) -> dict[Any, Tensor]:
    """By how much each writer's part of the stream changes, every head's result made whole."""
    places = [RESID_PRE[0], *(x for i in range(LAYERS) for x in (ATTN_RESULT[i], ATTN_OUT[i], MLP_OUT[i]))]
    clean, corrupt = (graph.run(x, save=places) for x in (CLEAN, CORRUPT))
    found: dict[Any, Tensor] = {EMBED: corrupt[RESID_PRE[0]] - clean[RESID_PRE[0]]}
    for i, layer in enumerate(layers_of(family, model_of(graph))):
        found[MLP_OUT[i]] = corrupt[MLP_OUT[i]] - clean[MLP_OUT[i]]
        for head in range(4):
            delta = (corrupt[ATTN_RESULT[i]] - clean[ATTN_RESULT[i]])[:, :, head]
            if family == "gemma2":  # a norm follows the heads: to first order, how it passes a change on
                norm: Any = layer.post_attention_layernorm
                total = clean[ATTN_RESULT[i]].sum(2)
                _, delta = torch.autograd.functional.jvp(norm, total, delta)
            found[ATTN_Z[i].at(head=head)] = delta
    return found


def oracle(family: str) -> dict[Any, float]:
    """Each head reads a copy of its own; the gradient at each copy goes back through the norm alone."""
    graph = bound(family, torch.float64)
    changes = stream_changes(family, graph)
    parallel = RESID_MID[0] not in graph.locations
    found: dict[Any, float] = {}
    copies = {ATTN_Q_IN: "attn.q", ATTN_K_IN: "attn.k", ATTN_V_IN: "attn.v"}
    for i in range(LAYERS):
        middle = RESID_PRE[i] if parallel else RESID_MID[i]
        split = [kind[i] for kind in copies]
        run = graph.run(
            CLEAN, save=[*split, ATTN_IN[i], MLP_IN[i], RESID_PRE[i], middle], metric=METRIC, grad=True
        )
        assert run.metric is not None
        gradients = torch.autograd.grad(
            run.metric.sum(), [*(run[x] for x in split), run[MLP_IN[i]]], retain_graph=True
        )
        before = [EMBED, *(x for j in range(i) for x in (*heads(j), MLP_OUT[j]))]
        for place, gradient in zip(split, gradients[:3], strict=True):
            axis = "head" if place.type == ATTN_Q_IN else "kv_head"
            for head in range(gradient.shape[2]):
                (back,) = torch.autograd.grad(
                    run[ATTN_IN[i]], run[RESID_PRE[i]], gradient[:, :, head], retain_graph=True
                )
                for writer in before:
                    name = f"{copies[place.type]}[{i}]@{axis}={head}"
                    found[str(writer), name] = float((changes[writer] * back).sum()) / 3
        (back,) = torch.autograd.grad(run[MLP_IN[i]], run[middle], gradients[3], retain_graph=True)
        for writer in [*before, *([] if parallel else heads(i))]:
            found[str(writer), f"mlp.in[{i}]"] = float((changes[writer] * back).sum()) / 3
    last = graph.run(CLEAN, save=[RESID_POST[LAYERS - 1].grad], metric=METRIC)[RESID_POST[LAYERS - 1].grad]
    for writer, change in changes.items():
        found[str(writer), "logits"] = float((change * last).sum()) / 3
    return found


def heads(layer: int) -> list[Any]:
    return [ATTN_Z[layer].at(head=head) for head in range(4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_split_inputs(family: str):
    scores = edge_attribution(bound(family, torch.float64), [(CLEAN, CORRUPT)], METRIC)
    ours = {(str(e.source), str(e.target)): e.weight for e in scores.edges.each()}
    expected = oracle(family)
    assert set(ours) == set(expected)
    assert max(abs(ours[k] - v) for k, v in expected.items()) < 1e-10
    assert max(map(abs, ours.values())) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_copies_of_what_heads_read_give_the_same_where_weights_do_not(family: str):
    graph = bound(family, torch.float64)

    def execute(hooked: HookGraph, save: Any) -> Any:
        return hooked.run(CLEAN, save=save, metric=METRIC, grad=True)

    readers = readers_of(graph)
    cheap, split = (Readings._take(graph, readers, execute, copies=c) for c in (False, True))
    for (_, a), (_, b) in zip(cheap.at_stream(readers), split.at_stream(readers), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert cheap._adds_up(readers)


def test_a_model_of_gpt2_smalls_shape_has_32491_edges():
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=24, n_layer=12, n_head=12, bos_token_id=0, eos_token_id=0
    )
    graph = bind(GPT2LMHeadModel(config).eval(), check=False)
    scores = edge_attribution(graph, [(tokens(1, 3) % 20, tokens(1, 3, seed=1) % 20)], METRIC)
    assert len(scores) == 32_491


@pytest.mark.parametrize("method", ["eap-ig-inputs", "eap-ig-activations"])
def test_integrated_scores_are_means_over_the_path(method: EapMethod):
    graph = bound("gpt2", torch.float64)
    pairs = [(CLEAN, CORRUPT)]
    found = edge_attribution(graph, pairs, METRIC, method, steps=3, quadrature="midpoint")
    moved = RESID_PRE[0] if method == "eap-ig-inputs" else MLP_OUT[1]
    clean, corrupt = (graph.run(x, save=moved)[moved] for x in (CLEAN, CORRUPT))
    key = MLP_OUT[1], MLP_IN[2]
    changes = [graph.run(x, save=MLP_OUT[1])[MLP_OUT[1]] for x in (CLEAN, CORRUPT)]
    total = 0.0
    for alpha in (1 / 6, 1 / 2, 5 / 6):
        at = graph.hook(moved, lambda _, alpha=alpha: torch.lerp(clean, corrupt, alpha))
        run = at.run(CLEAN, save=[MLP_IN[2], RESID_MID[2]], metric=METRIC, grad=True)
        assert run.metric is not None
        (slope,) = torch.autograd.grad(run.metric.sum(), run[MLP_IN[2]], retain_graph=True)
        (back,) = torch.autograd.grad(run[MLP_IN[2]], run[RESID_MID[2]], slope)
        total += float(((changes[1] - changes[0]) * back).sum()) / 9
    assert float(found[key]) == pytest.approx(total, abs=1e-10)


def test_edges_of_a_writer_add_up_to_its_own_effect():
    """Node scores use the gradient at the node's own output, not at what an MLP reads."""
    graph = bound("gpt2", torch.float64)
    scores = edge_attribution(graph, [(CLEAN, CORRUPT)], METRIC).nodes()
    effect = patching_effect(graph, CLEAN, CORRUPT, METRIC, [*graph.every(ATTN_Z), *graph.every(MLP_OUT)])
    for place in graph.every(MLP_OUT):
        assert scores[place] == pytest.approx(float(effect.effects[place].sum() / 3), abs=1e-12)
    for place in graph.every(ATTN_Z):
        each = effect.effects[place].sum((0, 1, 3)) / 3
        assert [scores[place.at(head=h)] for h in range(4)] == pytest.approx(each.tolist(), abs=1e-12)


# --- circuits of edges ---------------------------------------------------------------------------


@cache
def planted(name: str) -> HookGraph:
    return bind(PLANTED[name](), check=False)


PLANTED_PAIR = (torch.tensor([[1, 9, 4], [7, 2, 1]]), torch.tensor([[6, 3, 11], [0, 8, 11]]))


@pytest.mark.parametrize("method", ["eap-ig-inputs", "exact"])
@pytest.mark.parametrize("name", PLANTED)
def test_planted_edges_are_told_from_all_others(name: str, method: EapMethod):
    scores = edge_attribution(planted(name), [PLANTED_PAIR], METRIC, method)
    assert scores.auroc(EDGES) == 1.0
    circuit = scores.circuit(len(EDGES))
    assert {(e.source, e.target) for e in circuit.edges.each()} == set(EDGES)
    greedy = scores.circuit(len(EDGES), "greedy")
    assert {(e.source, e.target) for e in greedy.edges.each()} == set(EDGES)


def test_the_roc_counts_true_and_other_edges_above_each_score(tmp_path: Path):
    sizes = torch.tensor([3.0, 2.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    roc = EdgeRoc.of(sizes, torch.tensor([True, True, False, False, True]))
    assert roc.thresholds.tolist() == [torch.inf, 3.0, 2.0, 1.0, 0.5]
    assert roc.true_positives.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3, 1])
    assert roc.false_positives.tolist() == [0, 0, 0.5, 1, 1]
    # Pairs (true, other) in order: 3 > 2 and 1, 2 = 2 counts half, 2 > 1; 0.5 is below both.
    assert float(roc) == pytest.approx(3.5 / 6)
    assert "AUROC 0.583" in repr(roc)
    assert list(roc.to_frame()["true positives"]) == roc.true_positives.tolist()
    assert roc.plot().axes[0].get_title(loc="left") == "AUROC 0.583"
    assert roc._repr_html_().count("<tr") == 1 + 3  # where a third, two and all true edges are reached
    roc.save(tmp_path / "roc.safetensors")
    again = EdgeRoc.load(tmp_path / "roc.safetensors")
    assert again.to_frame().equals(roc.to_frame())


def test_the_roc_of_no_edges_is_shown():
    none = torch.zeros(0)
    assert "<table" in EdgeRoc.of(none, none.bool())._repr_html_()


def runner(family: str) -> CircuitRunner:
    graph = bound(family, torch.float64)
    batch = PairBatch(CLEAN, CORRUPT, METRIC)
    return CircuitRunner.of(graph, batch, writers_of(graph), readers_of(graph))


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_all_edges_are_the_model_and_none_the_corrupt_run(family: str):
    graph, run = bound(family, torch.float64), runner(family)
    every = run.everything()
    assert torch.allclose(run.run(every), METRIC(graph.run(CLEAN).logits), atol=1e-12)
    assert torch.allclose(run.run({}), METRIC(graph.run(CORRUPT).logits), atol=1e-12)
    # One writer's edges to all readers are what patching it does.
    patched = {k: m & (k[0].place != MLP_OUT[1]) for k, m in every.items()}
    value = graph.run(CORRUPT, save=MLP_OUT[1])[MLP_OUT[1]]
    expected = METRIC(graph.hook(MLP_OUT[1], lambda _: value).run(CLEAN).logits)
    assert torch.allclose(run.run(patched), expected, atol=1e-12)


@pytest.mark.parametrize("family", [f.name for f in FAMILIES.values() if f.double_throughout])
def test_patching_a_fraction_of_an_edge_is_what_its_score_says(family: str):
    graph, whole = bound(family, torch.float64), runner(family)
    scores = edge_attribution(graph, [(CLEAN, CORRUPT)], METRIC)
    every, size = whole.everything(), 1e-5
    near = Run({k: torch.lerp(whole.base[k], v, size) for k, v in whole.corrupt.items()})
    run = replace(whole, corrupt=near)
    for pair in list(every)[::5]:
        left = every[pair].clone()
        left[-1, 0] = False
        change = float((run.run({**every, pair: left}) - run.measured).sum()) / 3 / size
        block = scores.edges[pair[0].place, pair[1].place].values.view(left.shape)
        assert change == pytest.approx(float(block[-1, 0]), abs=1e-5)


def test_curves_start_at_few_edges_and_end_at_the_model(tmp_path: Path):
    graph, pairs = bound("gpt2", torch.float64), [(CLEAN, CORRUPT)]
    scores = edge_attribution(graph, pairs, METRIC, "eap-ig-inputs")
    curve = cpr(graph, scores, pairs, METRIC, fractions=(0.0, 0.1, 0.5, 1.0))
    f = curve.faithfulness.tolist()
    assert f[0] == pytest.approx(0)
    assert f[-1] == pytest.approx(1)
    assert float(curve) == pytest.approx(
        0.1 * (f[0] + f[1]) / 2 + 0.4 * (f[1] + f[2]) / 2 + 0.5 * (f[2] + f[3]) / 2
    )
    distance = cmd(graph, scores, pairs, METRIC, fractions=(0.0, 1.0))
    assert distance.area == pytest.approx(0.5)
    assert "CMD 0.5" in repr(distance)
    assert curve.plot().axes[0].get_xlabel() == "share of edges"
    assert "<p>CPR" in curve._repr_html_()
    curve.save(tmp_path / "curve.safetensors")
    again = Curve.load(tmp_path / "curve.safetensors")
    assert repr(again) == repr(curve)
    assert again.metadata == dict(graph.binding.metadata)
    assert len(scores.plot(7).axes[0].patches) == 7


def test_the_performance_ratio_begins_with_the_edge_without_which_the_metric_falls_most():
    graph, pairs = bound("gpt2", torch.float64), [(CLEAN, CORRUPT)]
    scores = edge_attribution(graph, pairs, METRIC)
    first = min(scores.edges.each(), key=lambda edge: edge.weight)
    runner = CircuitRunner.of(graph, PairBatch(CLEAN, CORRUPT, METRIC), writers_of(graph), readers_of(graph))
    masks = {pair: torch.zeros_like(mask) for pair, mask in runner.everything().items()}
    for (writer, reader), mask in masks.items():
        if (writer.place, reader.place) == (first.source.whole, first.target.whole):
            mask[tuple(_head(end) for end in (first.source, first.target))] = True
    nothing, model = runner.run({}).mean(), runner.measured.mean()
    expected = (runner.run(masks).mean() - nothing) / (model - nothing)
    curve = cpr(graph, scores, pairs, METRIC, fractions=(1 / len(scores),))
    assert float(curve.faithfulness) == pytest.approx(float(expected))
    (one,) = scores.circuit(1, "greedy", signed=True).edges.each()
    assert one.weight == min(e.weight for e in scores.edges.each() if e.target == LOGITS)


def _head(end: Location) -> int:
    found = [i for _, i in end.index if isinstance(i, int)]
    return found[0] if found else 0


def test_what_does_not_reach_the_logits_is_pruned():
    scores = edge_attribution(bound("llama", torch.float64), [(CLEAN, CORRUPT)], METRIC)
    for how in ("top", "greedy"):
        circuit = scores.circuit(30, how)
        drawn = {(e.source, e.target) for e in circuit.edges.each()}
        assert 0 < len(drawn) <= 30
        sources = {source for source, _ in drawn}
        for _, target in drawn - {(s, t) for s, t in drawn if t == LOGITS}:
            own = {"mlp.in": {MLP_OUT[target.layer or 0]}}.get(target.type.name)
            if own is None:
                size = 1 if target.type.name == "attn.q" else 2
                head = next(i for _, i in target.index)
                assert isinstance(head, int)
                own = {ATTN_Z[target.layer or 0].at(head=h) for h in range(head * size, (head + 1) * size)}
            assert own & sources
        assert all(x in circuit.nodes for x in sources)
    assert len(list(scores.circuit(30, "greedy").edges.each())) == 30


def test_scores_save_load_and_print(tmp_path: Any):
    scores = edge_attribution(bound("gpt2", torch.float64), [(CLEAN, CORRUPT), (CLEAN, CORRUPT)], METRIC)
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    again = EdgeScores.load(path)
    assert repr(again) == repr(scores)
    assert scores.edges.examples == 6
    assert scores[ATTN_Z[0], MLP_IN[1]].shape == (4,)
    assert "<table" in scores._repr_html_()
    assert len(scores.to_frame()) == len(scores)
    with pytest.raises(HookGraphError, match="is no edge of these scores"):
        scores.auroc([(MLP_OUT[2], MLP_IN[0])])


def test_what_cannot_be_scored_or_run_is_refused():
    graph = bound("gemma2", torch.float64)
    scores = edge_attribution(graph, [(CLEAN, CORRUPT)], METRIC)
    with pytest.raises(HookGraphError, match="is no sum of what its heads add"):
        cpr(graph, scores, [(CLEAN, CORRUPT)], METRIC)
    with pytest.raises(InputError, match="a batch has none such"):
        cpr(bound("gpt2", torch.float64), scores, [(CLEAN, None)], METRIC)
    with pytest.raises(HookGraphError, match="are not those of the edges of this model"):
        cpr(bound("gpt2", torch.float64), scores, [(CLEAN, CORRUPT)], METRIC)
    wrong: Any = "eap-ig"
    with unchecked(), pytest.raises(HookGraphError, match="unknown method 'eap-ig': did you mean"):
        edge_attribution(graph, [(CLEAN, CORRUPT)], METRIC, wrong)
    normed = bind(build("causal", "bert"), check=False)
    with pytest.raises(HookGraphError, match=r"\[1\] is not resid.pre\[0\] and what is added to it"):
        edge_attribution(normed, [(CLEAN, CORRUPT)], METRIC)
    without = edge_attribution(graph, [(CLEAN, None)], METRIC)
    assert len(without) == len(scores)
