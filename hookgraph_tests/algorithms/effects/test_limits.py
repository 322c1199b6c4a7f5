"""What holds under short memory, in half precision, and where the top nodes are measured again."""

from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor

from hookgraph.algorithms import activation_patching, causal_tracing, path_patching
from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.footprint import Footprint
from hookgraph.algorithms.effects.patching import Method, patching_effect
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.binding import HuggingFaceBinding
from hookgraph.errors import HookGraphError
from hookgraph.graph.abstract import Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import ATTN_Q, ATTN_Z, LOGITS, MLP_OUT
from hookgraph.subgraphs.autoencoder import AutoencoderGraph
from hookgraph_tests.families import bound, tokens
from hookgraph_tests.subgraphs.planted import planted

METHODS: tuple[Method, ...] = get_args(Method)
CLEAN, CORRUPT = tokens(4), tokens(4, seed=1)
MEASURE = logit_diff([3, 4, 6, 7], 5)
JOINT = ["d_head", "d_model"]
EACH = pytest.mark.parametrize("method", METHODS)


@EACH
def test_a_pass_that_runs_out_of_memory_midway_is_run_with_fewer_rows(
    method: Method, monkeypatch: pytest.MonkeyPatch
):
    graph, at = bound("gpt2", torch.float64), [ATTN_Z[1].at(head=0, pos=-1), MLP_OUT[0].at(pos=2)]
    expected = patching_effect(
        graph, CLEAN, CORRUPT, MEASURE, at, method, steps=3, joint=["d_head", "d_model"]
    )
    forward, rows = HuggingFaceBinding.forward, list[int]()

    def scarce(binding: HuggingFaceBinding, inputs: Prepared) -> Tensor:
        ids = inputs["input_ids"]
        assert isinstance(ids, Tensor)
        rows.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(binding, inputs)

    monkeypatch.setattr(HuggingFaceBinding, "forward", scarce)
    found = patching_effect(graph, CLEAN, CORRUPT, MEASURE, at, method, steps=3, joint=JOINT)
    assert max(rows) > 2
    assert found.reduced == expected.reduced
    for place in at:
        assert torch.allclose(found.effects[place], expected.effects[place], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", ["ig", "ig_inputs", "exact"])
def test_where_passes_inside_do_not_fit_with_one_copy_the_batch_is_divided(
    method: Method, monkeypatch: pytest.MonkeyPatch
):
    """The first passes fit with all examples; those over copies only with fewer examples."""
    graph, at = bound("gpt2", torch.float64), [ATTN_Z[1]]
    expected = patching_effect(graph, CLEAN, CORRUPT, MEASURE, at, method, steps=2, joint=JOINT[:1])
    forward, passes = HuggingFaceBinding.forward, list[int]()

    def scarce(binding: HuggingFaceBinding, inputs: Prepared) -> Tensor:
        ids = inputs["input_ids"]
        assert isinstance(ids, Tensor)
        passes.append(len(ids))
        if len(ids) > 2 and len(passes) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(binding, inputs)

    monkeypatch.setattr(HuggingFaceBinding, "forward", scarce)
    found = patching_effect(graph, CLEAN, CORRUPT, MEASURE, at, method, steps=2, joint=JOINT[:1])
    assert torch.allclose(found.effects[at[0]], expected.effects[at[0]], rtol=1e-9, atol=1e-13)


def few(monkeypatch: pytest.MonkeyPatch, most: int = 1_000) -> list[int]:
    """The rows of every pass from here on; passes of more than `most` run out of memory."""
    forward, rows = HuggingFaceBinding.forward, list[int]()

    def counted(binding: HuggingFaceBinding, inputs: Prepared) -> Tensor:
        ids = inputs["input_ids"]
        assert isinstance(ids, Tensor)
        rows.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(binding, inputs)

    monkeypatch.setattr(HuggingFaceBinding, "forward", counted)
    return rows


@pytest.mark.parametrize("size", [4, 8, 16])
def test_no_pass_has_more_rows_than_asked_for(size: int, monkeypatch: pytest.MonkeyPatch):
    graph, rows = bound("gpt2", torch.float64), few(monkeypatch)
    patching_effect(graph, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]], "exact", joint=["d_head"], batch_size=size)
    assert max(rows) == size


def test_the_top_nodes_are_measured_with_no_more_rows_than_the_effects(monkeypatch: pytest.MonkeyPatch):
    graph, at = bound("gpt2", torch.float64), [ATTN_Z[1]]
    expected = patching_effect(graph, CLEAN, CORRUPT, MEASURE, at).check(3)
    rows = few(monkeypatch)
    found = patching_effect(graph, CLEAN, CORRUPT, MEASURE, at, batch_size=2).check(3)
    assert max(rows) == 2
    assert [n.exact for n in found] == pytest.approx([n.exact for n in expected], rel=1e-9)
    monkeypatch.undo()
    whole = patching_effect(graph, CLEAN, CORRUPT, MEASURE, at)
    few(monkeypatch, most=2)
    assert [n.exact for n in whole.check(3)] == pytest.approx([n.exact for n in expected], rel=1e-9)


PLACES = [ATTN_Z[1], MLP_OUT[2]]
BOUNDED: dict[str, Callable[..., object]] = {
    "exact_effects": partial(exact_effects, nodes=[x.at(pos=p) for x in PLACES for p in range(6)]),
    "activation_patching": partial(activation_patching, at=PLACES),
    "path_patching": partial(path_patching, senders=PLACES, receivers=[LOGITS], over=["pos"]),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_no_pass_takes_more_memory_than_allowed(name: str, monkeypatch: pytest.MonkeyPatch):
    graph, measure, work = bound("gpt2", torch.float64), logit_diff(3, 5), BOUNDED[name]
    with Footprint() as one:
        work(graph, CLEAN[:1], CORRUPT[:1], measure, batch_size=1)
    expected = work(graph, CLEAN, CORRUPT, measure)
    rows = few(monkeypatch)
    allowed = int(2.95 * one.peak)
    with Footprint() as used:
        found = work(graph, CLEAN, CORRUPT, measure, max_memory=allowed)
    assert 1 < max(rows) < 10
    assert used.peak < 1.1 * allowed
    with pytest.raises(HookGraphError, match=r"a pass over one example takes .* and max_memory is"):
        work(graph, CLEAN, CORRUPT, measure, max_memory=1000)
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def tensors(found: object) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found.effects.values())  # pyright: ignore


def test_causal_tracing_takes_no_more_memory_than_allowed(monkeypatch: pytest.MonkeyPatch):
    trace = partial(causal_tracing, bound("gpt2", torch.float64), CLEAN, logit_diff(3, 5), [1], [MLP_OUT[1]])
    expected = trace(samples=4)
    with Footprint() as two:
        trace(samples=1, batch_size=2)
    rows = few(monkeypatch)
    found = trace(samples=4, max_memory=2 * two.peak)
    assert max(rows) <= 6
    assert torch.allclose(found.effects[MLP_OUT[1]], expected.effects[MLP_OUT[1]], rtol=1e-9, atol=1e-12)


def test_where_one_row_fits_late_positions_are_patched_in_the_whole_pass(monkeypatch: pytest.MonkeyPatch):
    graph, measure = bound("llama", torch.float64), logit_diff(3, 5)
    at, joint = [ATTN_Z[1].at(pos=slice(-2, None))], ["d_head"]
    expected = patching_effect(graph, CLEAN[:1], CORRUPT[:1], measure, at, "exact", joint=joint)
    few(monkeypatch, most=1)
    found = patching_effect(graph, CLEAN[:1], CORRUPT[:1], measure, at, "exact", joint=joint)
    assert torch.allclose(found.effects[at[0]], expected.effects[at[0]], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_where_few_rows_fit_nodes_of_late_positions_are_patched_in_the_whole_pass(
    most: int, monkeypatch: pytest.MonkeyPatch
):
    graph, measure = bound("llama", torch.float64), logit_diff(3, 5)
    nodes = [ATTN_Z[i].at(head=h, pos=-1) for i in (0, 1) for h in (0, 1)]
    expected = exact_effects(graph, CLEAN[:1], CORRUPT[:1], measure, nodes)
    rows = few(monkeypatch, most=most)
    found = exact_effects(graph, CLEAN[:1], CORRUPT[:1], measure, nodes)
    assert max(rows) > most
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", ["ig_inputs", "relp"])
def test_the_memory_of_a_pass_is_that_of_the_method(method: Method, monkeypatch: pytest.MonkeyPatch):
    """Three rows of `attrib` would fit into what is allowed here."""
    graph, measure = bound("gpt2", torch.float64), logit_diff(3, 5)
    at = graph.every(ATTN_Z)
    with Footprint() as one:
        patching_effect(graph, CLEAN[:1], CORRUPT[:1], measure, at, method, steps=1, batch_size=1)
    rows, allowed = few(monkeypatch), int(2.95 * one.peak)
    patching_effect(graph, CLEAN, CORRUPT, measure, at, method, steps=1, max_memory=allowed)
    assert max(rows) == 2


@EACH
def test_in_half_precision_effects_are_those_of_single_precision_up_to_its_rounding(method: Method):
    graphs = bound("llama", torch.bfloat16), bound("llama")
    at = [ATTN_Q[1], ATTN_Z[1], MLP_OUT[0]] if method == "atp_star" else [ATTN_Z[1], MLP_OUT[0]]
    several = [patching_effect(x, CLEAN, CORRUPT, MEASURE, at, method, joint=JOINT) for x in graphs]
    a, b = (torch.cat([found.effects[x].flatten().float() for x in at]) for found in several)
    # What is measured is in single precision, gradients are not.
    expected = torch.float32 if method == "exact" else torch.bfloat16
    assert several[0].effects[at[-1]].dtype == expected
    assert bool(a.isfinite().all())
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.98


def test_the_top_nodes_among_latents_and_errors_are_measured_exactly():
    sae = AutoencoderGraph(planted(32, 96), MLP_OUT[1])
    graph: HookGraph = bound("gpt2", torch.float64).inject(sae)
    found = patching_effect(graph, CLEAN, CORRUPT, MEASURE, [sae.latents, sae.error], "ig", steps=4)
    ranking = found.mean("batch").check(top=12)
    kinds = {node.location.type.name for node in ranking}
    assert kinds == {"latents", "error"}
    clean = graph.run(CLEAN, metric=MEASURE).metric
    values = graph.run(CORRUPT, save=[sae.latents, sae.error])
    for node in ranking:
        patched = graph.hook(node.location, lambda _, new=values[node.location]: new)
        after = patched.run(CLEAN, metric=MEASURE).metric
        assert clean is not None
        assert after is not None
        assert node.exact == pytest.approx(float((after - clean).mean()), rel=1e-9, abs=1e-12)
    assert ranking.spread == pytest.approx(max(abs(n.effect - (n.exact or 0)) for n in ranking))
