"""Sweeps, path patching, ablation and steering against one pass per node, written by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hookgraph.algorithms import (
    AblationStatistics,
    SteeringVector,
    ablate,
    activation_patching,
    mean_activations,
    optimal_constants,
    path_patching,
    sample_activations,
    steering_vector,
)
from hookgraph.algorithms.interventions.replacements import moved
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.errors import HookGraphError, InputError, LocationError, ShapeMismatchError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import ATTN_OUT, ATTN_PATTERN, ATTN_Z, LOGITS, MLP_OUT, RESID_POST
from hookgraph.ontology.locations import Location
from hookgraph_tests.families import bound, model_of, tokens
from hookgraph_tests.toy import toy_graph, toy_of, toy_tokens
from hookgraph_tests.unchecked import unchecked

MODELS = ("gpt2", "llama")
MEASURE = logit_diff([3, 4], 5)
OTHER = torch.tensor([[1, 3, 3], [0, 5, 2]])


def measured(graph: HookGraph, inputs: Tensor) -> Tensor:
    found = graph.run(inputs, metric=MEASURE).metric
    assert found is not None
    return found


def patched(graph: HookGraph, start: Tensor, end: Tensor, node: Location) -> Tensor:
    value = graph.run(end, save=[node])[node]
    return measured(graph.hook(node, lambda _: value), start) - measured(graph, start)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_a_sweep_is_one_pass_per_node(family: str, direction):
    graph, clean, corrupt = bound(family, torch.float64), tokens(), tokens(seed=1)
    start, end = (clean, corrupt) if direction == "noising" else (corrupt, clean)
    streams = activation_patching(
        graph, clean, corrupt, MEASURE, [RESID_POST[0], RESID_POST[1]], direction=direction, progress=False
    )
    assert streams.dims(RESID_POST[0]) == ("batch", "pos")
    for pos in (0, 4):
        expected = patched(graph, start, end, RESID_POST[1].at(pos=pos))
        assert torch.allclose(streams.effects[RESID_POST[1]][:, pos], expected, rtol=1e-10, atol=1e-12)
    heads = activation_patching(
        graph, clean, corrupt, MEASURE, [ATTN_Z[1]], over=["head"], direction=direction, batch_size=3
    )
    assert heads.effects[ATTN_Z[1]].shape == (2, 4)
    expected = patched(graph, start, end, ATTN_Z[1].at(head=3))
    assert torch.allclose(heads.effects[ATTN_Z[1]][:, 3], expected, rtol=1e-10, atol=1e-12)
    assert heads.total_effect is not None
    assert torch.allclose(heads.total_effect, measured(graph, end) - measured(graph, start))
    assert heads.convention.sign == f"{'corrupt - clean' if direction == 'noising' else 'clean - corrupt'}"
    assert heads.mean("batch").plot().axes


def test_a_sweep_of_the_toy_network_is_its_closed_form():
    graph = toy_graph(quadratic=False)
    found = activation_patching(graph, toy_tokens(), OTHER, logit_diff(1, 2, 1), [ATTN_OUT[2]])
    toy = toy_of(graph)
    none = torch.zeros(7, dtype=torch.float64)
    clean, corrupt = (toy.closed_form(x, none)[ATTN_OUT[2]] for x in (toy_tokens(), OTHER))
    through = torch.eye(4, dtype=torch.float64) + toy.into[2] @ toy.out[2]
    change = (corrupt - clean)[:, 1] @ through @ (toy.unembedding[:, 1] - toy.unembedding[:, 2])
    assert torch.allclose(found.effects[ATTN_OUT[2]][:, 1], change, atol=1e-12)
    assert torch.equal(found.effects[ATTN_OUT[2]][:, 0], torch.zeros_like(change))


@pytest.mark.parametrize("per_position", [False, True])
def test_means_are_those_of_real_tokens(per_position: bool, tmp_path: Path):
    graph, ids = bound("gpt2", torch.float64), tokens(3, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3])
    batches = [{"input_ids": ids[i], "attention_mask": mask[i]} for i in (slice(0, 1), slice(1, 3))]
    place, head = MLP_OUT[1], ATTN_Z[0].at(head=2)
    found = mean_activations(graph, batches, [place, head], per_position=per_position, progress=False)
    value = graph.run({"input_ids": ids, "attention_mask": mask}, save=[place, head])
    for here in (place, head):
        weight = mask[..., None].double()
        total = (value[here] * weight).sum(0), weight.sum(0)
        expected = total[0] / total[1] if per_position else total[0].sum(0) / total[1].sum(0)
        assert torch.allclose(found.means[here].squeeze(0), expected, atol=1e-12)
    found.save(tmp_path / "s.safetensors")
    again = AblationStatistics.load(tmp_path / "s.safetensors")
    assert torch.equal(again.means[head], found.means[head])
    assert repr(again) == repr(found)
    logits = ablate(graph, [head], statistics=again).run(ids).logits
    mean = again.means[head]
    assert torch.allclose(logits, graph.hook(head, lambda x: mean.expand_as(x).clone()).run(ids).logits)


def test_resampling_takes_the_value_of_another_example():
    graph, ids, place = bound("llama", torch.float64), tokens(4), RESID_POST[0]
    order = moved(4, seed=7)
    assert not bool((order == torch.arange(4)).any())
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    logits = ablate(graph, [place], "resample", seed=7).run(ids).logits
    assert torch.allclose(logits, graph.run(ids[order]).logits, atol=1e-10)
    zero = ablate(graph, [MLP_OUT[1]], "zero").run(ids).logits
    assert torch.equal(zero, graph.hook(MLP_OUT[1], torch.zeros_like).run(ids).logits)


def test_a_sweep_is_exact_and_not_checked():
    found = activation_patching(toy_graph(), toy_tokens(), None, logit_diff(1, 2), [ATTN_OUT[0]])
    with pytest.raises(HookGraphError, match="it is exact already: every node"):
        found.check()


def test_fitted_constants_do_better_than_means():
    graph, data, at = bound("gpt2", torch.float64), [tokens(4)], [MLP_OUT[0]]
    before = [p.requires_grad for p in model_of(graph).parameters()]
    means = mean_activations(graph, data, at)
    fitted = optimal_constants(graph, data, at, means, steps=25, progress=False)
    target = graph.run(data[0]).logits.log_softmax(-1)
    losses = [
        (
            target.exp()
            * (target - ablate(graph, at, m, statistics=fitted).run(data[0]).logits.log_softmax(-1))
        )
        .sum(-1)
        .mean()
        for m in ("mean", "optimal")
    ]
    assert float(losses[1]) < float(losses[0])
    assert fitted.seed == 0
    assert [p.requires_grad for p in model_of(graph).parameters()] == before


@pytest.mark.parametrize("pos", [-1, 1, None])
def test_a_steering_vector_is_the_mean_difference_at_real_tokens(pos: int | None, tmp_path: Path):
    graph, first, second = bound("llama", torch.float64), tokens(4), tokens(4, 5, seed=1)
    mask = torch.ones_like(first)
    mask[1, 4:] = 0
    positive = {"input_ids": first, "attention_mask": mask}
    pairs = [({k: v[i] for k, v in positive.items()}, second[i]) for i in (slice(0, 3), slice(3, 4))]
    found = steering_vector(graph, pairs, RESID_POST[1], pos=pos)
    a = graph.run(positive, save=[RESID_POST[1]])[RESID_POST[1]]
    b = graph.run(second, save=[RESID_POST[1]])[RESID_POST[1]]
    lengths = [6, 4, 6, 6]
    pick = (lambda x, n: x[:n].mean(0)) if pos is None else (lambda x, n: x[:n][pos])
    rows = [pick(a[i], n) - pick(b[i], 5) for i, n in enumerate(lengths)]
    assert torch.allclose(found.vector, torch.stack(rows).mean(0), atol=1e-12)
    assert found.pairs == 4
    found.save(tmp_path / "v.safetensors")
    again = SteeringVector.load(tmp_path / "v.safetensors")
    steered = again.add_to(graph, 2).run(first).logits
    by_hand = graph.hook(RESID_POST[1], lambda x: x + 2 * found.vector).run(first).logits
    assert torch.allclose(steered, by_hand)
    assert "4 pairs" in repr(again)


def test_bad_requests_are_refused():
    graph, ids = toy_graph(), toy_tokens()
    with pytest.raises(LocationError, match="no location has an axis 'head'"):
        activation_patching(graph, ids, OTHER, MEASURE, [ATTN_OUT[0]], over=["head"])
    with pytest.raises(HookGraphError, match="denoising runs the corrupt inputs"):
        activation_patching(graph, ids, None, MEASURE, [ATTN_OUT[0]], direction="denoising")
    with pytest.raises(ShapeMismatchError, match="clean and corrupt differ"):
        activation_patching(graph, ids, OTHER[:, :2], MEASURE, [ATTN_OUT[0]])
    with pytest.raises(HookGraphError, match="mean ablation needs statistics"):
        ablate(graph, [ATTN_OUT[0]])
    with pytest.raises(HookGraphError, match=r"no mean of mlp\.out\[0\] is known"):
        ablate(graph, [MLP_OUT[0]], statistics=mean_activations(graph, [ids], [ATTN_OUT[0]]))
    with pytest.raises(HookGraphError, match="the batch has 1"):
        ablate(graph, [ATTN_OUT[0]], "resample").run(ids[:1])
    for single in ("a text", {"input_ids": ids}, ids):
        with pytest.raises(InputError, match="the data are a stream of batches, and this is one of them, a "):
            mean_activations(graph, single, [ATTN_OUT[0]])  # pyright: ignore[reportArgumentType]
        with pytest.raises(InputError, match=r"pass a list of batches, \[inputs\]"):
            sample_activations(graph, single, [ATTN_OUT[0]])  # pyright: ignore[reportArgumentType]
    with unchecked(), pytest.raises(LocationError, match=r"'attn\.out' is text: write Location\.parse"):
        ablate(graph, "attn.out", "zero")  # pyright: ignore[reportArgumentType]
    with unchecked(), pytest.raises(HookGraphError, match=r"a Tensor at attn\.out.* cannot be called"):
        graph.hook(ATTN_OUT[0], ids)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="no data to take means of"):
        mean_activations(graph, [], [ATTN_OUT[0]])
    with pytest.raises(InputError, match="there are no pairs"):
        steering_vector(graph, [], ATTN_OUT[0])
    with (
        unchecked(),
        pytest.raises(InputError, match="a batch of pairs is "),
    ):
        steering_vector(graph, [(ids, ids, ids)], ATTN_OUT[0])  # pyright: ignore[reportArgumentType]
    with unchecked(), pytest.raises(LocationError, match="a steering vector is read at one location"):
        steering_vector(graph, [(ids, ids)], [ATTN_OUT[0]])  # pyright: ignore[reportArgumentType]
    with pytest.raises(HookGraphError, match="pos=5 is out of range"):
        steering_vector(graph, [(ids, ids)], ATTN_OUT[0], pos=5)
    with pytest.raises(LocationError, match="an axis per key"):
        mean_activations(bound("gpt2", torch.float64), [tokens()], [ATTN_PATTERN[0]])
    short = mean_activations(graph, [ids[:, :2]], [ATTN_OUT[0]], per_position=True)
    with pytest.raises(ShapeMismatchError, match="no longer than those"):
        ablate(graph, [ATTN_OUT[0]], statistics=short).run(ids)


class UnluckyError(Exception):
    pass


def test_a_metric_that_raises_leaves_the_model_as_it_was():
    graph, ids = bound("gpt2", torch.float64), tokens()
    before = graph.run(ids).logits

    def unlucky(logits: Tensor) -> Tensor:
        raise UnluckyError

    with pytest.raises(UnluckyError):
        activation_patching(graph, ids, tokens(seed=1), unlucky, [RESID_POST[0]])
    with pytest.raises(UnluckyError):
        path_patching(graph, ids, tokens(seed=1), unlucky, [ATTN_OUT[0]], [LOGITS])
    means = mean_activations(graph, [ids], [MLP_OUT[0]])
    with pytest.raises(UnluckyError):
        optimal_constants(graph, [ids], [MLP_OUT[0]], means, loss=unlucky)
    assert not any(m._forward_hooks for m in model_of(graph).modules())
    assert all(p.requires_grad for p in model_of(graph).parameters())
    assert torch.equal(graph.run(ids).logits, before)
