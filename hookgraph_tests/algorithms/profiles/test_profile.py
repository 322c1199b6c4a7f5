"""Path profiles against exact patches, finite differences, and on linear ground."""

from pathlib import Path

import pytest
import torch

from hookgraph.algorithms import PathProfile, exact_effects, path_profile
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.errors import LocationError
from hookgraph.locations import ATTN_Z, FINAL_LN_OUT, MLP_OUT, RESID_PRE
from hookgraph_tests.families import FAMILIES, bound, tokens

METRIC = logit_diff(3, 5)
CLEAN, CORRUPT = tokens(), tokens(seed=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_integral_is_the_endpoint_difference_is_the_patch(family: str):
    graph = bound(family, torch.float64)
    found = path_profile(graph, CLEAN, CORRUPT, METRIC, [ATTN_Z[1], MLP_OUT[2].at(pos=-1)], over=["head"])
    assert found.nodes == (*(ATTN_Z[1].at(head=h) for h in range(4)), MLP_OUT[2].at(pos=-1))
    exact = exact_effects(graph, CLEAN, CORRUPT, METRIC, found.nodes)
    assert torch.allclose(found.endpoint_difference, exact, atol=1e-6)
    assert float(found.residuals.abs().max()) < 1e-6


def test_slopes_are_finite_differences_of_the_values():
    graph, node = bound("gpt2", torch.float64), ATTN_Z[0].at(head=2)
    found = path_profile(graph, CLEAN, CORRUPT, METRIC, node, 201, quadrature="trapezoid")
    step = found.alphas[1] - found.alphas[0]
    differences = (found.values[:, 2:] - found.values[:, :-2]) / (2 * step)
    assert torch.allclose(found.slopes[:, 1:-1], differences, rtol=1e-3, atol=1e-5)
    assert torch.allclose(found.values[0, 0], found.start)
    assert torch.allclose(found.values[0, -1], found.end[0])


def test_where_the_metric_is_linear_the_slope_is_the_patch_everywhere():
    found = path_profile(bound("gpt2", torch.float64), CLEAN, CORRUPT, METRIC, FINAL_LN_OUT)
    assert float(found.gradient_range.abs().max()) < 1e-10
    assert torch.allclose(found.slopes[:, 7], found.endpoint_difference)
    inside = (found.alphas[-1] - found.alphas[0]) * found.endpoint_difference.abs()
    assert torch.allclose(found.output_range, inside)


def test_pieces_change_nothing_and_zero_stands_in_without_a_corrupt_input():
    graph, nodes = bound("llama", torch.float64), [ATTN_Z[0].at(head=1), RESID_PRE[2].at(pos=2)]
    found = path_profile(graph, CLEAN, None, METRIC, nodes, 8)
    small = path_profile(graph, CLEAN, None, METRIC, nodes, 8, batch_size=6)
    assert torch.allclose(found.values, small.values)
    assert torch.allclose(found.slopes, small.slopes)
    assert (found.ablation, found.total_effect) == ("zero", None)
    assert torch.allclose(found.endpoint_difference, exact_effects(graph, CLEAN, None, METRIC, nodes))


def test_profiles_are_saved_told_and_drawn(tmp_path: Path):
    found = path_profile(bound("gpt2", torch.float64), CLEAN, CORRUPT, METRIC, ATTN_Z[1], 6, over=["head"])
    found.save(tmp_path / "profile.safetensors")
    loaded = PathProfile.load(tmp_path / "profile.safetensors")
    assert loaded.nodes == found.nodes
    assert torch.equal(loaded.slopes, found.slopes)
    assert repr(loaded) == repr(found)
    assert "attn.z[1]@head=3" in repr(found)
    assert "<table" in found._repr_html_()
    assert [len(axes.lines) for axes in found.plot().axes] == [5, 5]


def test_an_axis_that_no_location_has_is_named():
    with pytest.raises(LocationError, match="has an axis 'heat'"):
        path_profile(bound("gpt2", torch.float64), CLEAN, CORRUPT, METRIC, ATTN_Z[1], over=["heat"])
