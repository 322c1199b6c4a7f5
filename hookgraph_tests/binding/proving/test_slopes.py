"""Finite differences agree with the gradient also where a model bends within larger steps."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from hookgraph.binding import bind
from hookgraph.binding.proving import slopes
from hookgraph.binding.proving.slopes import DEAD, check_gradients
from hookgraph.ontology.transformer import (
    ATTN_K,
    ATTN_Q,
    ATTN_SCORES,
    ATTN_V,
    MLP_OUT,
    MLP_POST,
    RESID_MID,
    RESID_PRE,
    ROUTER_LOGITS,
)
from hookgraph_tests.families import FAMILIES, bound, tokens
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


def test_a_slope_of_zero_where_nothing_depends_on_the_location_proves_nothing():
    graph = bound("gpt2", torch.float64).hook(MLP_OUT[1], lambda out: 0 * out)
    example = {"input_ids": tokens()[:1]}
    clean = graph.run(example, save=[MLP_POST[1], RESID_PRE[1]])
    dead, alive = check_gradients(graph, example, clean).proofs
    assert (dead.location, dead.holds, dead.note) == (MLP_POST[1], False, DEAD)
    assert (alive.location, alive.holds) == (RESID_PRE[1], True)


def test_a_slope_of_zero_is_one_where_only_larger_edits_lead_elsewhere():
    graph = bind(build("causal", "phimoe"))  # one expert, of weight one, until another is chosen
    assert ROUTER_LOGITS[1] in graph.locations


def test_a_slope_that_rounding_hides_proves_nothing_either():
    """What is added to the output moves it by less than the last digit of a double."""
    graph = bound("gpt2", torch.float64).hook(MLP_OUT[1], lambda out: 1e-18 * out)
    example = {"input_ids": tokens()[:1]}
    (proof,) = check_gradients(graph, example, graph.run(example, save=[MLP_POST[1]])).proofs
    assert (proof.holds, proof.note) == (False, DEAD)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_values_that_are_all_alike_are_dead(family: str):
    """Also where the pass without edits is computed by a fused kernel, which rounds otherwise."""
    alike = bound(family, torch.float64).hook(ATTN_V[1], lambda v: v[:, :1].expand_as(v).clone())
    example = {"input_ids": tokens()[:1]}
    clean = alike.run(example, save=[ATTN_SCORES[1], ATTN_Q[1], ATTN_K[1]])
    proofs = check_gradients(alike, example, clean).proofs
    assert [(p.holds, p.note) for p in proofs] == [(False, DEAD)] * 3


def test_a_value_of_zero_is_moved_too():
    graph = bound("llama", torch.float64).hook(MLP_POST[1], torch.zeros_like)
    graph = graph.hook(MLP_OUT[1], lambda out: 0.01 * out)
    example = {"input_ids": tokens()[:1]}
    (proof,) = check_gradients(graph, example, graph.run(example, save=[MLP_POST[1]])).proofs
    assert proof.holds


def test_what_has_no_slope_but_an_effect_is_said_to_be_flat():
    graph = bind(build("causal", "phimoe"))
    (proof,) = (
        p for p in graph.report.proofs if (p.location, p.invariant) == (ROUTER_LOGITS[1], "edit = gradient")
    )
    assert proof.holds
    assert "no slope" in proof.note
