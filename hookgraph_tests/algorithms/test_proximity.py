"""Tensor-level contributions against the published unit values, and against the published formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hookgraph.algorithms import proximity
from hookgraph.errors import HookGraphError, ShapeMismatchError
from hookgraph_tests.unchecked import unchecked


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- published unit values --------------------------------------------------------------------


def test_an_mlp_that_is_the_whole_contributes_everything():
    mlp, residual = proximity.get_mlp_contributions(
        resid_mid=double([[[0.0, 0.0]]]), resid_post=double([[[1.0, 1.0]]]), mlp_out=double([[[1.0, 1.0]]])
    )
    assert (mlp.item(), residual.item()) == (1.0, 0.0)


def test_two_heads_of_one_token():
    heads, residual = proximity.get_attention_contributions(
        resid_pre=double([[[2.0, 1.0]]]),
        resid_mid=double([[[2.0, 2.0]]]),
        decomposed_attn=double([[[[[1.0, 1.0], [-1.0, 0.0]]]]]),
        distance_norm=2,
    )
    assert torch.allclose(heads, double([[[[0.43613, 0.0]]]]), atol=1e-5)
    assert residual.item() == pytest.approx(0.56387, abs=1e-5)


@pytest.mark.parametrize(
    ("pre", "post", "neurons", "expected", "rest"),
    [
        ([10.0, 10.0], [-10.0, 10.0], [[0.0, 1.0], [1.0, 0.0], [-21.0, -1.0]], [1.0, 0.0, 0.0], 0.0),
        ([1.0, 1.0], [4.0, 4.0], [[1.0, 1.0], [2.0, 2.0]], [0.25, 0.5], 0.25),
    ],
    ids=["one direction of three", "all in one direction"],
)
def test_neurons_of_one_token(
    pre: list[float], post: list[float], neurons: list[list[float]], expected: list[float], rest: float
):
    found, residual = proximity.get_decomposed_mlp_contributions(
        double(pre), double(post), double(neurons), distance_norm=2
    )
    assert torch.allclose(found, double(expected), atol=1e-12)
    assert residual == pytest.approx(rest, abs=1e-12)


def test_what_is_under_the_threshold_is_dropped_and_the_rest_scaled():
    blocks, residual = proximity.apply_threshold_and_renormalize(
        0.1, double([[0.05, 0.15], [0.05, 0.05]]), double([0.8, 0.9])
    )
    assert torch.allclose(blocks, double([[0.0, 0.15 / 0.95], [0.0, 0.0]]))
    assert torch.allclose(residual, double([0.8 / 0.95, 1.0]))


def test_a_share_equal_to_the_threshold_is_dropped():
    blocks, residual = proximity.apply_threshold_and_renormalize(0.25, double([[0.25]]), double([0.75]))
    assert (blocks.item(), residual.item()) == (0.0, 1.0)


# --- the formula ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1, 2, 3, math.inf])
def test_compat_is_the_published_formula(norm: float | int):
    parts, whole = torch.randn(3, 2, 4, 5), torch.randn(4, 5)
    distance = torch.stack(
        [torch.nn.functional.pairwise_distance(p, whole, p=norm) for p in parts.flatten(0, 1)]
    )
    close = (whole.norm(p=norm, dim=-1) - distance).clip(min=1e-5)
    expected = (close / close.sum(0)).unflatten(0, (3, 2))
    assert torch.allclose(proximity.get_contributions(parts, whole, norm, eps_mode="compat"), expected)


def test_without_the_floor_what_points_away_gets_exactly_nothing():
    parts, whole = double([[1.0, 0.0], [-1.0, 0.0]]), double([1.0, 0.0])
    assert proximity.get_contributions(parts, whole).tolist() == [1.0, 0.0]
    assert proximity.get_contributions(parts, whole, eps_mode="compat")[1] > 0


@pytest.mark.parametrize("eps_mode", ["exact", "compat"])
def test_contributions_sum_to_one_over_the_axes_of_the_parts(eps_mode: proximity.EpsMode):
    parts, one_off, whole = torch.randn(3, 2, 4, 5), torch.randn(4, 5), torch.randn(4, 5)
    one = torch.ones(4)
    alone = proximity.get_contributions(parts, whole, eps_mode=eps_mode)
    found, rest = proximity.get_contributions_with_one_off_part(parts, one_off, whole, eps_mode=eps_mode)
    assert torch.allclose(alone.sum((0, 1)), one)
    assert found.shape == (3, 2, 4)
    assert torch.allclose(found.sum((0, 1)) + rest, one)


def test_where_nothing_points_towards_the_whole_the_residual_gets_everything():
    away = double([[-1.0, 0.0], [-2.0, 0.0]])
    found, rest = proximity.get_contributions_with_one_off_part(away, away[0], double([1.0, 0.0]))
    assert (found.tolist(), rest.item()) == ([0.0, 0.0], 1.0)
    assert proximity.get_contributions(away, double([1.0, 0.0])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("threshold", [0, 0.3, 0.5, 1, 2])
def test_shares_sum_to_one_at_any_threshold(threshold: float | int):
    blocks = torch.rand(2, 3, 4, 5)
    residual = torch.rand(2, 3)
    total = residual + blocks.sum((2, 3))
    found, rest = proximity.apply_threshold_and_renormalize(
        threshold, blocks / total[..., None, None], residual / total
    )
    assert torch.allclose(found.sum((2, 3)) + rest, torch.ones(2, 3))


def test_one_block_per_residual_needs_no_axis_of_its_own():
    found, rest = proximity.apply_threshold_and_renormalize(0.1, double([0.2, 0.05]), double([0.8, 0.95]))
    assert torch.allclose(found, double([0.2, 0.0]))
    assert torch.allclose(rest, double([0.8, 1.0]))


# --- mistakes ---------------------------------------------------------------------------------


def test_shapes_that_do_not_agree_are_refused():
    with pytest.raises(ShapeMismatchError, match="last axes of the parts"):
        proximity.get_contributions(torch.zeros(2, 3, 5), torch.zeros(4, 5))
    with pytest.raises(ShapeMismatchError, match="one-off part has shape"):
        proximity.get_contributions_with_one_off_part(torch.zeros(2, 5), torch.zeros(4), torch.zeros(5))
    with pytest.raises(ShapeMismatchError, match="first axes of the blocks"):
        proximity.apply_threshold_and_renormalize(0.1, torch.zeros(2, 3), torch.zeros(3))


def test_what_is_no_norm_is_refused():
    with pytest.raises(HookGraphError, match="takes q from 1"):
        proximity.get_contributions(torch.zeros(2, 5), torch.zeros(5), 0.5)
    mode: Any = "compa"
    with unchecked(), pytest.raises(HookGraphError, match="did you mean compat"):
        proximity.get_contributions(torch.zeros(2, 5), torch.zeros(5), eps_mode=mode)
