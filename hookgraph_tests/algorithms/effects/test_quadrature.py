"""Quadrature: what each rule integrates exactly, and what is refused."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hookgraph.algorithms.effects.quadrature import Quadrature, nodes_and_weights
from hookgraph.errors import HookGraphError
from hookgraph_tests.unchecked import unchecked

RULES = get_args(Quadrature)
DEGREE = {"midpoint": 1, "trapezoid": 1, "left": 0, "right": 0}


@given(rule=st.sampled_from(RULES), steps=st.integers(2, 64))
def test_weights_sum_to_one_and_nodes_lie_between_the_ends(rule: Quadrature, steps: int):
    nodes, weights = nodes_and_weights(rule, steps)
    assert len(nodes) == len(weights) == steps
    assert abs(float(weights.sum()) - 1) < 1e-12
    assert bool(((nodes >= 0) & (nodes <= 1)).all())


@given(rule=st.sampled_from(RULES), steps=st.integers(2, 12))
def test_polynomials_up_to_the_degree_of_the_rule_are_exact(rule: Quadrature, steps: int):
    nodes, weights = nodes_and_weights(rule, steps)
    highest = DEGREE.get(rule, 2 * steps - 1)
    for degree in range(highest + 1):
        assert abs(float((weights * nodes**degree).sum()) - 1 / (degree + 1)) < 1e-12
    assert abs(float((weights * nodes ** (highest + 1)).sum()) - 1 / (highest + 2)) > 1e-16


def test_nodes_of_gauss_and_legendre_are_those_of_numpy():
    nodes, weights = nodes_and_weights("gauss-legendre", 10)
    import numpy as np

    expected, masses = np.polynomial.legendre.leggauss(10)
    assert torch.allclose(nodes, torch.tensor((expected + 1) / 2), atol=1e-14)
    assert torch.allclose(weights, torch.tensor(masses / 2), atol=1e-14)


@pytest.mark.parametrize(
    ("rule", "steps", "message"),
    [
        ("gauss", 3, "unknown quadrature 'gauss': did you mean gauss-legendre"),
        ("trapezoid", 1, "trapezoid needs at least 2 steps, not 1"),
        ("midpoint", 0, "midpoint needs at least 1 steps, not 0"),
    ],
)
def test_what_cannot_be_a_rule_is_refused(rule: Quadrature, steps: int, message: str):
    with unchecked(), pytest.raises(HookGraphError, match=message):
        nodes_and_weights(rule, steps)
