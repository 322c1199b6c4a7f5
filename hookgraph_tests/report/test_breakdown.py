"""What a report shows of an effect, and what it sums over."""

import pytest
import torch

from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.graph.conformance import ConformanceReport
from hookgraph.ontology.transformer import ATTN_Z, EMBED, MLP_OUT, MLP_POST, RESID_POST
from hookgraph.report import breakdown


def test_units_keep_heads_and_sum_the_rest(effect: PatchingEffect):
    units = breakdown.units(effect)
    assert units is not None
    assert list(units.effects) == [ATTN_Z[0], ATTN_Z[1], MLP_OUT[0]]
    torch.testing.assert_close(units.effects[ATTN_Z[1]], effect.effects[ATTN_Z[1]].mean(0).sum((0, 2)))
    torch.testing.assert_close(units.effects[MLP_OUT[0]], effect.effects[MLP_OUT[0]].mean(0).sum())


def test_places_keep_positions(effect: PatchingEffect):
    places = breakdown.places(effect)
    assert places is not None
    assert list(places.effects) == [RESID_POST[0], RESID_POST[1]]
    torch.testing.assert_close(places.effects[RESID_POST[0]], effect.effects[RESID_POST[0]].mean(0).sum(-1))


def test_what_was_not_asked_for_is_none(effect: PatchingEffect):
    assert breakdown.places(breakdown.only(effect, ATTN_Z)) is None
    assert breakdown.units(breakdown.only(effect, RESID_POST)) is None


def test_a_reduced_effect_stays_as_it_is(effect: PatchingEffect):
    units = breakdown.units(effect)
    assert units is not None
    again = breakdown.units(units)
    assert again is not None
    assert torch.equal(again.effects[ATTN_Z[0]], units.effects[ATTN_Z[0]])


def test_effects_by_type(effect: PatchingEffect):
    assert list(breakdown.by_type(effect)) == ["attn.z", "mlp.out", "resid.post"]


@pytest.mark.parametrize(("location", "stream"), [(EMBED, True), (RESID_POST[1], True), (MLP_POST[0], False)])
def test_the_residual_stream_is_known_by_its_name(location: object, stream: bool):
    assert breakdown.is_stream(location) is stream  # pyright: ignore[reportArgumentType]


def test_the_total_effect_is_a_mean(effect: PatchingEffect):
    assert breakdown.total(effect) == pytest.approx(-1.5)


def test_the_verdict_counts(conformance: ConformanceReport):
    assert breakdown.verdict(conformance).startswith("3 locations, 3 invariants checked")
    assert breakdown.verdict(conformance).endswith("1 fail")
    assert breakdown.verdict(ConformanceReport()).endswith("all hold")
