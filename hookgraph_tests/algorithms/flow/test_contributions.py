"""Contributions against parts written out one by one, on four families."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hookgraph.algorithms import contributions, proximity
from hookgraph.algorithms.flow.dividing import Shares
from hookgraph.algorithms.flow.results import Contributions
from hookgraph.algorithms.flow.streaming import proximities
from hookgraph.errors import HookGraphError, LocationError, UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import (
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_V,
    MLP_OUT,
    MLP_POST,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
)
from hookgraph.ontology.weights import W_O, W_out, b_O, b_out
from hookgraph_tests.families import FAMILIES, PADDING, bound, tokens

NORMS = [1, 2, 3]


def every(shares: Shares) -> list[Tensor]:
    """All shares, one axis for the parts."""
    found = [shares.residual, *shares.updates.values(), *shares.biases.values()]
    return [x.flatten(2) if x.ndim > 2 else x[..., None] for x in found]


def total(shares: Shares) -> Tensor:
    return torch.cat(every(shares), -1).sum(-1)


def sums(found: Contributions) -> list[Shares]:
    return [shares for layer in found.layers for shares in layer]


def weight_or_zero(graph: HookGraph, kind, like: Tensor) -> Tensor:
    try:
        return graph.weight(kind, 1).detach().to(like)
    except UnknownLocationError:
        return torch.zeros(like.shape[-1], dtype=like.dtype)


def by_hand(graph: HookGraph) -> tuple[Tensor, Tensor, Tensor]:
    """In layer 1: the parts of attention, (batch, pos, key_pos, head, d_model), its bias, and attn.out.

    After a norm of the update every part has the factor that the sum of all of them has.
    """
    run = graph.run(tokens(), save=[ATTN_PATTERN[1], ATTN_V[1], ATTN_OUT[1]])
    out = run[ATTN_OUT[1]]
    weight = graph.weight(W_O, 1).detach().to(out)
    v = run[ATTN_V[1]].to(out)
    v = v.repeat_interleave(len(weight) // v.shape[2], 2)
    parts = torch.einsum("bhqk,bkhe,hed->bqkhd", run[ATTN_PATTERN[1]].to(out), v, weight)
    bias = weight_or_zero(graph, b_O, out).expand(out.shape)
    factor = out / (parts.sum((2, 3)) + bias)
    return parts * factor[:, :, None, None], bias * factor, out


# --- shares -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_attention_are_those_of_its_parts_written_out(family: str, norm: int):
    graph = bound(family, torch.float64)
    shares = contributions(graph, tokens(), norm).attention(1)
    parts, bias, out = by_hand(graph)
    run = graph.run(tokens(), save=[shares.before, shares.whole, MLP_OUT[1]])
    others = [run[shares.before], bias, *([run[MLP_OUT[1]]] if MLP_OUT[1] in shares.updates else [])]
    listed = torch.cat([parts.flatten(2, 3), torch.stack(others, 2)], 2).movedim(2, 0)
    assert torch.allclose(listed.sum(0), run[shares.whole], atol=1e-6)
    # shares of what lies towards nothing are equal there, and the residual's here: neither occurs
    expected = proximity.get_contributions(listed, run[shares.whole], norm).movedim(0, 2)
    length = out.shape[1]
    heads = shares.heads
    assert heads is not None
    assert torch.allclose(heads, expected[:, :, : length * 4].unflatten(2, (length, 4)), atol=1e-7)
    assert torch.allclose(shares.residual, expected[:, :, length * 4], atol=1e-7)
    assert torch.allclose(shares.biases[ATTN_OUT[1]], expected[:, :, length * 4 + 1], atol=1e-7)
    if MLP_OUT[1] in shares.updates:
        assert torch.allclose(shares.updates[MLP_OUT[1]], expected[:, :, -1], atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up_to_the_whole(family: str):
    found = contributions(bound(family, torch.float64), tokens(), neurons=True)
    assert found.gap < (1e-12 if FAMILIES[family].double_throughout else 1e-6)


def test_sequential_blocks_have_two_sums_and_parallel_ones_have_one():
    for family, wholes in (("gpt2", [RESID_MID[0], RESID_POST[0]]), ("neox", [RESID_POST[0]])):
        first = contributions(bound(family, torch.float64), tokens()).layers[0]
        assert [x.whole for x in first] == wholes
        assert first[0].before == RESID_PRE[0]
    assert set(first[0].updates) == {ATTN_OUT[0], MLP_OUT[0]}


def test_the_whole_mlp_is_one_part_as_published():
    graph = bound("llama", torch.float64)
    run = graph.run(tokens(), save=[RESID_MID[1], RESID_POST[1], MLP_OUT[1]])
    mlp, residual = proximity.get_mlp_contributions(run[RESID_MID[1]], run[RESID_POST[1]], run[MLP_OUT[1]])
    shares = contributions(graph, tokens()).mlp(1)
    assert torch.allclose(shares.updates[MLP_OUT[1]], mlp)
    assert torch.allclose(shares.residual, residual)
    assert shares.neurons is None


def test_neurons_are_parts_of_their_own_if_asked_for():
    graph = bound("gpt2", torch.float64)
    shares = contributions(graph, tokens(), 2, neurons=True).mlp(1)
    run = graph.run(tokens(), save=[RESID_MID[1], RESID_POST[1], MLP_POST[1]])
    table, bias = graph.weight(W_out, 1).detach(), graph.weight(b_out, 1).detach()
    parts = run[MLP_POST[1]][0, 3, :, None] * table
    others = torch.stack([bias, run[RESID_MID[1]][0, 3]])
    expected = proximity.get_contributions(torch.cat([parts, others]), run[RESID_POST[1]][0, 3], 2)
    assert shares.neurons is not None
    assert torch.allclose(shares.neurons[0, 3], expected[:-2])
    assert torch.allclose(shares.biases[MLP_OUT[1]][0, 3], expected[-2])
    assert torch.allclose(shares.residual[0, 3], expected[-1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [None, 0, 0.02, 0.5, 1, 3])
def test_shares_sum_to_one_at_any_threshold(family: str, threshold: float | int | None):
    found = contributions(bound(family, torch.float64), tokens(), threshold=threshold)
    for shares in sums(found):
        assert torch.allclose(total(shares), torch.ones_like(shares.residual))
    if threshold is not None and threshold >= 1:
        assert all(bool((shares.residual == 1).all()) for shares in sums(found))


def test_a_threshold_drops_what_is_no_more_and_scales_the_rest():
    found = contributions(bound("gpt2", torch.float64), tokens())
    for before, after in zip(sums(found), sums(found.threshold(0.05)), strict=True):
        kept = torch.cat(every(before), -1)
        kept = kept * (kept > 0.05)
        expected = kept / kept.sum(-1, keepdim=True)
        assert torch.allclose(torch.cat(every(after), -1), expected.nan_to_num())


@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_contribute_nothing_and_padding_is_in_no_graph(family: str):
    graph, ids = bound(family), tokens()
    ids[0, :2] = PADDING
    mask = (ids != PADDING).long()
    found = contributions(graph, {"input_ids": ids, "attention_mask": mask})
    shares, unpadded = found.attention(1), contributions(graph, ids[:1, 2:]).attention(1)
    assert shares.heads is not None
    assert unpadded.heads is not None
    assert float(shares.heads.sum(-1).triu(1).abs().max()) == 0
    assert torch.allclose(shares.heads[:1, 2:, 2:], unpadded.heads, atol=1e-5)
    assert shares.residual[0, :2].tolist() == [1.0, 1.0]
    assert {x.pos for x in found.flows(0)} == {2, 3, 4, 5}


def test_in_single_precision_the_shares_are_the_same():
    single = contributions(bound("gpt2"), tokens())
    double = contributions(bound("gpt2", torch.float64), tokens())
    for a, b in zip(sums(single), sums(double), strict=True):
        assert torch.allclose(torch.cat(every(a), -1).double(), torch.cat(every(b), -1), atol=1e-5)


# --- cost -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that anything makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() > 8 * self.elements:
            self.elements = result.untyped_storage().nbytes() // 8
        return result


@pytest.mark.parametrize("norm", NORMS)
def test_no_tensor_of_positions_keys_heads_and_dimensions_is_made(norm: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hookgraph.algorithms.flow.streaming._CELLS", {"cpu": 4096})
    graph = bound("gpt2", torch.float64)
    ids = tokens(1, 40)
    with Largest() as seen:
        contributions(graph, ids, norm)
    # the pattern by (pos, key, head) has 6400 elements; with d_model it would be 204 800
    assert seen.elements <= 3 * 40 * 40 * 4


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch):
    coefficients, vectors, whole = torch.rand(7, 30).tril(3), torch.randn(30, 5), torch.randn(7, 5)
    at_once = proximities(coefficients, vectors, whole, 1)
    monkeypatch.setattr("hookgraph.algorithms.flow.streaming._CELLS", {"cpu": 40})
    assert torch.allclose(proximities(coefficients, vectors, whole, 1), at_once)
    parts = coefficients[..., None] * vectors
    expected = whole.abs().sum(-1)[:, None] - (whole[:, None] - parts).abs().sum(-1)
    assert torch.allclose(at_once, expected.clamp(min=0), atol=1e-5)


# --- hooked graphs ----------------------------------------------------------------------------


def test_hooks_of_the_graph_apply():
    graph = bound("gpt2", torch.float64).hook(ATTN_PATTERN[1].at(head=2), torch.zeros_like)
    heads = contributions(graph, tokens()).attention(1).heads
    assert heads is not None
    assert float(heads[..., 2].abs().max()) == 0
    assert float(heads[..., 1].max()) > 0


def test_a_hook_at_a_boundary_is_part_of_what_is_divided():
    def double(x: Tensor) -> Tensor:
        return 2 * x

    plain = bound("gpt2", torch.float64)
    found = contributions(plain.hook(RESID_PRE[1], double), tokens())
    run = plain.hook(RESID_PRE[1], double).run(tokens(), save=[RESID_MID[2], RESID_POST[2], MLP_OUT[2]])
    mlp, _ = proximity.get_mlp_contributions(run[RESID_MID[2]], run[RESID_POST[2]], run[MLP_OUT[2]])
    assert torch.allclose(found.mlp(2).updates[MLP_OUT[2]], mlp)


def test_a_stream_that_is_no_sum_is_refused():
    graph = bound("gpt2", torch.float64).hook(RESID_MID[1], lambda x: x + 1)
    with pytest.raises(HookGraphError, match=r"resid.mid\[1\] is not resid.pre\[1\] \+ attn.out\[1\]"):
        contributions(graph, tokens())


def test_an_update_that_is_not_what_its_projection_writes_is_one_part_on_request():
    graph = bound("gpt2", torch.float64).hook(ATTN_OUT[1], lambda x: x + 1)
    with pytest.raises(HookGraphError, match=r"attn.out\[1\] is neither.*heads=False"):
        contributions(graph, tokens())
    shares = contributions(graph, tokens(), heads=False).attention(1)
    assert shares.heads is None
    assert shares.updates[ATTN_OUT[1]].shape == (2, 6)
    assert torch.allclose(total(shares), torch.ones_like(shares.residual))


# --- the graph of tokens ----------------------------------------------------------------------


def test_weights_into_every_stream_sum_to_one():
    graph = contributions(bound("gpt2", torch.float64), tokens()).graph(example=1)
    for node in graph:
        if node[0] in "AI":
            assert sum(w for _, _, w in graph.in_edges(node, data="weight")) == pytest.approx(1.0)
    assert {"X0_0", "A0_0", "M0_0", "I0_0", "B0", "I2_5"} <= set(graph)


def test_the_stream_and_attention_to_the_same_token_are_edges_apart():
    found = contributions(bound("gpt2", torch.float64), tokens())
    graph, shares = found.graph(), found.attention(2)
    edges = graph["I1_3"]["A2_3"]
    assert shares.heads is not None
    assert edges["residual"]["weight"] == pytest.approx(float(shares.residual[0, 3]))
    assert edges["attention"]["weight"] == pytest.approx(float(shares.heads[0, 3, 3].sum()))
    heads = found.graph(heads=True)["I1_3"]["A2_3"]
    assert heads["head 2"]["weight"] == pytest.approx(float(shares.heads[0, 3, 3, 2]))


def test_paths_hold_what_leads_to_a_token_over_strong_edges():
    found = contributions(bound("llama", torch.float64), tokens())
    whole, part = found.graph(), found.paths(2, threshold=0.1)
    assert "I2_2" in part
    assert all(part.nodes[node]["pos"] in (0, 1, 2, None) for node in part)
    for source, target, weight in part.edges(data="weight"):
        assert weight > 0.1
        assert target == "I2_2" or part.out_degree(target) > 0
        assert whole.has_edge(source, target)
    assert set(found.paths(-4, threshold=0.1).edges) == set(part.edges)


def test_parallel_blocks_lead_straight_to_the_stream_after_the_layer():
    graph = contributions(bound("neox", torch.float64), tokens()).graph()
    assert not any(node.startswith("A") for node in graph)
    assert graph.has_edge("X0_1", "M0_1")
    assert graph.has_edge("M0_1", "I0_1")
    assert graph["X0_0"]["I0_1"]["attention"]["weight"] > 0


# --- results ----------------------------------------------------------------------------------


def test_results_are_saved_whole(tmp_path: Path):
    found = contributions(bound("gpt2", torch.float64), tokens(), 2, 0.1, neurons=True)
    found.save(tmp_path / "flow.safetensors")
    loaded = Contributions.load(tmp_path / "flow.safetensors")
    for a, b in zip(sums(found), sums(loaded), strict=True):
        assert (a.whole, a.before, a.gap, list(a.updates)) == (b.whole, b.before, b.gap, list(b.updates))
        assert torch.equal(torch.cat(every(a), -1), torch.cat(every(b), -1))
    assert (loaded.norm, loaded.cut, loaded.metadata) == (2, 0.1, found.metadata)
    assert repr(loaded) == repr(found)
    assert "resid.mid[0]" in repr(found)
    assert "<table" in found._repr_html_()


def test_rows_into_each_stream_sum_to_one():
    frame = contributions(bound("neox", torch.float64), tokens()).to_frame()
    assert frame.groupby(["batch", "layer", "pos"])["share"].sum().to_numpy() == pytest.approx(1.0)
    assert set(frame["kind"]) == {"residual", "attention", "mlp.out", "bias"}


def test_the_drawing_has_a_line_for_each_edge_between_tokens():
    found = contributions(bound("gpt2", torch.float64), tokens())
    figure = found.plot(threshold=0.1)
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert len(lines) == sum(x.key is not None for x in found.leading_to(-1, 0.1))


def test_mistakes_are_named():
    graph = bound("gpt2", torch.float64)
    found = contributions(graph, tokens())
    with pytest.raises(UnknownLocationError, match="there is no layer 7"):
        found.attention(7)
    with pytest.raises(LocationError, match="example=2 is out of range"):
        found.graph(2)
    with pytest.raises(LocationError, match="token=9 is no token of example 0"):
        found.paths(9)
    with pytest.raises(HookGraphError, match="takes q from 1"):
        contributions(graph, tokens(), 0)
