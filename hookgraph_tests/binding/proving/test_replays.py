"""Passes that begin between layers are proven; where one does not end as a whole pass does, none begins."""

from dataclasses import replace

import pytest
import torch

from hookgraph.binding import bind
from hookgraph.binding.data.findings import FREE, Findings
from hookgraph.binding.proving.proving import prove
from hookgraph.binding.running.huggingface import HuggingFaceBinding
from hookgraph.errors import LocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import ATTN_Z, RESID_POST, RESID_PRE
from hookgraph_tests.families import FAMILIES, binding_of, bound
from hookgraph_tests.tiny.models import build


@pytest.mark.parametrize("family", FAMILIES)
def test_every_boundary_of_an_ordinary_model_is_replayed(family: str):
    graph = bound(family, torch.float64)
    boundaries = [x for x in graph.locations if x.type in (RESID_PRE, RESID_POST)]
    assert all(graph.report.proves(x, "replayed") for x in boundaries)
    assert {p.location for p in graph.report.proofs if p.invariant == "replayed"} <= {*boundaries}


def handing_nothing_on(findings: Findings) -> Findings:
    """As if layers handed on the stream and nothing else."""
    layers = {k: [replace(x, after=FREE) for x in found] for k, found in findings.layers.items()}
    return replace(findings, layers=layers)


@pytest.mark.parametrize(
    ("table", "architecture", "after"), [("seq2seq", "t5", (0,)), ("causal", "gemma4_text", (0, 1, 2))]
)
def test_what_a_layer_hands_on_beside_the_stream_is_noticed(
    table: str, architecture: str, after: tuple[int, ...]
):
    binding = binding_of(bind(build(table, architecture), check=False))
    careless = HuggingFaceBinding(
        binding.model, handing_nothing_on(binding.findings), example=binding.example
    )
    outcome = prove(careless)
    graph = HookGraph(careless.proven(outcome.findings, outcome.report))
    assert {block - 1 for stack, block in outcome.findings.closed if stack == "decoder"} == {*after}
    assert not outcome.report.why_unchecked(RESID_PRE[0], "replayed")
    assert "begins here" in outcome.report.why_unchecked(RESID_PRE[1], "replayed")
    assert graph.entry(ATTN_Z[1]) == RESID_PRE[0]
    run = graph.run(binding.example, save=[RESID_PRE[1]])
    with pytest.raises(LocationError, match=r"entered after layer 0 of its decoder: .* begins here"):
        graph.replay(run, RESID_PRE[1])
