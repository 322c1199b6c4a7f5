"""Mixers without attention: what they read, their gate, and what they project out."""

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from torch.nn.functional import silu

import hookgraph as hg
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import MIXER_GATE, MIXER_IN, MIXER_LN_SCALE, MIXER_OUT, MIXER_Z
from hookgraph.ontology.locations import LocationType
from hookgraph_tests.families import model_of, tokens
from hookgraph_tests.tiny import build

UNGATED = {MIXER_LN_SCALE, MIXER_IN, MIXER_Z, MIXER_OUT}
FAMILIES: Mapping[str, set[LocationType]] = {
    "mamba": UNGATED | {MIXER_GATE},
    "mamba2": UNGATED | {MIXER_GATE},
    "lfm2": UNGATED | {MIXER_GATE},
    "recurrent_gemma": UNGATED | {MIXER_GATE},
    "qwen3_next": UNGATED,
}
IDS = tokens(2, 6)


@cache
def graph_of(family: str) -> HookGraph:
    return hg.bind(build("causal", family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixer_has_these_locations_all_proven(family: str):
    graph = graph_of(family)
    listed = {x.type for x in graph.locations if x.layer == 0 and x.type.name.startswith("mixer.")}
    assert listed == FAMILIES[family]
    assert not [p for p in graph.report.failures if p.location.type.name.startswith("mixer.")]
    equations = {p.location for p in graph.report.proofs if p.invariant == "conserved"}
    assert {MIXER_LN_SCALE[0], MIXER_Z[0], MIXER_OUT[0]} <= equations


@pytest.mark.parametrize("family", FAMILIES)
def test_axes_are_positions_and_features(family: str):
    graph = graph_of(family)
    places = [x for x in graph.locations if x.layer == 0 and x.type.name.startswith("mixer.")]
    for location, value in graph.run(IDS, save=places).items():
        assert value.shape[:2] == IDS.shape, location
        assert value.ndim == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_projected_out_is_all_that_a_mixer_adds(family: str):
    graph = graph_of(family)
    model = model_of(graph)
    run = graph.hook(MIXER_Z[0], torch.zeros_like).run(IDS, save=[MIXER_OUT[0]])
    down = model.get_submodule(graph.report.mechanisms[MIXER_Z[0]].removeprefix("input of ").split("[")[0])
    bias = getattr(down, "bias", None)
    expected = torch.zeros_like(run[MIXER_OUT[0]]) if bias is None else bias.expand_as(run[MIXER_OUT[0]])
    torch.testing.assert_close(run[MIXER_OUT[0]], expected)


def test_the_gate_multiplies_through_its_activation():
    graph = graph_of("mamba")
    plain = graph.run(IDS, save=[MIXER_GATE[0], MIXER_Z[0]])
    new = plain[MIXER_GATE[0]].flip(1) + 0.3
    moved = graph.hook(MIXER_GATE[0], lambda _: new).run(IDS, save=[MIXER_Z[0]])
    expected = plain[MIXER_Z[0]] / silu(plain[MIXER_GATE[0]]) * silu(new)
    torch.testing.assert_close(moved[MIXER_Z[0]], expected, rtol=1e-3, atol=1e-5)


def test_a_gate_without_activation_multiplies():
    graph = graph_of("lfm2")
    plain = graph.run(IDS, save=[MIXER_Z[0]])
    moved = graph.hook(MIXER_GATE[0].at(pos=2), lambda g: 2 * g).run(IDS, save=[MIXER_Z[0]])
    expected = plain[MIXER_Z[0]].clone()
    expected[:, 2] *= 2
    torch.testing.assert_close(moved[MIXER_Z[0]], expected)


def test_a_mixer_without_a_gate_of_its_own_says_why():
    with pytest.raises(hg.UnknownLocationError, match="no projection multiplies what the mixer computed"):
        graph_of("qwen3_next").check(MIXER_GATE[0])
