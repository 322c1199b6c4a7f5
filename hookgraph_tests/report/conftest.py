"""Results made by hand: a report needs no model."""

import pytest
import torch

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.effects.results import Convention, Node, PatchingEffect, Ranking
from hookgraph.graph.conformance import ConformanceReport, Proof
from hookgraph.ontology.transformer import ATTN_Z, MLP_OUT, RESID_POST
from hookgraph.report import Prompt, PromptPair


@pytest.fixture
def effect() -> PatchingEffect:
    """Two examples of three positions, two layers of four heads; nothing is reduced yet."""
    places = [ATTN_Z[0], ATTN_Z[1], MLP_OUT[0], RESID_POST[0], RESID_POST[1]]
    shapes = {ATTN_Z: (2, 3, 4, 2), MLP_OUT: (2, 3, 5), RESID_POST: (2, 3, 5)}
    effects = {x: torch.randn(shapes[x.type]) for x in places}
    total = torch.tensor([-1.0, -2.0])
    metadata = {"model": "tiny", "dtype": "float32"}
    none = Attribution({})
    return PatchingEffect(Attribution(effects), none, none, total, Convention("attrib"), metadata=metadata)


@pytest.fixture
def pair() -> PromptPair:
    """One token differs, and one token is hostile to HTML."""
    clean = Prompt("a <b> c", ("a", "<b>", "c"), 0.75, 0.125, 1.5)
    corrupt = Prompt("a <b> d", ("a", "<b>", "d"), 0.25, 0.5, -0.5)
    return PromptPair(clean, corrupt, "yes", "no & never")


@pytest.fixture
def ranking() -> Ranking:
    return Ranking(
        (
            Node(ATTN_Z[1].at(head=2), -2.0, -1.5),
            Node(MLP_OUT[0], 0.5, 0.25),
            Node(RESID_POST[1].at(pos=2), 0.1, None),
        )
    )


@pytest.fixture
def conformance() -> ConformanceReport:
    proofs = (
        Proof(ATTN_Z[0], "shape", True, 0.0, 0.0),
        Proof(ATTN_Z[1], "shape", True, 2e-9, 1e-6),
        Proof(MLP_OUT[0], "conserved", False, 0.5, 1e-6, "off"),
    )
    mechanisms = dict.fromkeys((ATTN_Z[0], ATTN_Z[1], MLP_OUT[0]), "hook")
    return ConformanceReport(proofs, mechanisms, {MLP_OUT[1]: "there is <no> MLP"}, {"class": "Tiny"})
