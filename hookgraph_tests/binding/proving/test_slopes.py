"""Finite differences agree with the gradient also where a model bends within larger steps."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from hookgraph.binding import bind
from hookgraph.binding.proving import slopes
from hookgraph.binding.proving.slopes import check_gradients
from hookgraph.ontology.transformer import MLP_OUT, RESID_MID, RESID_PRE
from hookgraph_tests.families import bound, tokens
from hookgraph_tests.tiny import build


def wave(x: Tensor) -> Tensor:
    """A steep and narrow one on top of the value."""
    return x + 1e-4 * torch.sin(1e5 * x)


def holds(*, fine: bool) -> bool:
    graph = bound("gpt2", torch.float64).hook(MLP_OUT[1], wave)
    example = {"input_ids": tokens()[:1]}
    clean = graph.run(example, save=[RESID_PRE[1]])
    with patch.object(slopes, "_FINE", slopes._FINE if fine else (1e-2,)):  # pyright: ignore[reportPrivateUsage]
        (proof,) = check_gradients(graph, example, clean).proofs
    return proof.holds


@pytest.mark.parametrize("fine", [True, False])
def test_a_steep_model_is_measured_by_smaller_steps(fine: bool):
    assert holds(fine=fine) == fine


def test_a_wrong_gradient_is_wrong_by_every_step():
    graph = bound("gpt2", torch.float64).hook(MLP_OUT[1], Tensor.detach)
    example = {"input_ids": tokens()[:1]}
    clean = graph.run(example, save=[RESID_PRE[1]])
    found = check_gradients(graph, example, clean)
    assert not any(proof.holds for proof in found.proofs)


def test_a_gradient_that_is_another_beside_earlier_ones_is_wrong():
    graph = bind(build("causal", "dbrx"))  # the norm before its experts reads the stream first
    assert RESID_MID[1] not in graph.locations
    assert "edit = gradient fails" in graph.binding.why_absent(RESID_MID[1])
