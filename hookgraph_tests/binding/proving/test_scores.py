"""The equations of attention, and those that a model leaves out."""

import torch
from torch import Tensor

from hookgraph import HookGraph
from hookgraph.binding.proving.conformance import _unpaired
from hookgraph.binding.proving.equations import Identity, Unapplied
from hookgraph.binding.proving.scores import of_scores
from hookgraph.graph.conformance import Gap
from hookgraph.locations import ATTN_K, ATTN_PATTERN, ATTN_Q, ATTN_SCORES, ATTN_V, ATTN_Z
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import DECODER
from hookgraph_tests.families import bound

TYPES = DECODER.attention
MADE = "scores = q k times a number"


def values(*, cap: float = 0.0, sink: bool = False, keys: int = 2) -> dict[Location, Tensor]:
    """Of an attention with two heads for each key, masked."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 5, h, 3, generator=generator) for h in (4, keys, keys))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(4 // keys, 2)) * 0.7
    scores = cap * (scores / cap).tanh() if cap else scores
    scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -1e9)
    pattern = scores.softmax(-1)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(4 // keys, 2))
    scores = torch.cat([scores, scores[..., :1]], -1) if sink else scores
    kinds = (ATTN_Q, ATTN_K, ATTN_V, ATTN_SCORES, ATTN_PATTERN, ATTN_Z)
    return {kind[0]: x for kind, x in zip(kinds, (q, k, v, scores, pattern, z), strict=True)}


def equations(present: dict[Location, Tensor]) -> dict[str, Identity | Unapplied]:
    return {x.text: x for x in of_scores(TYPES, 0, present)}


def test_every_equation_holds_of_an_ordinary_attention_and_fails_of_another_query():
    present = values()
    found = equations(present)
    assert all(isinstance(x, Identity) for x in found.values())
    assert set(found) == {MADE, "pattern = softmax(scores)", "z = pattern v"}
    equation = found[MADE]
    assert isinstance(equation, Identity)
    assert equation.about == (ATTN_Q[0], ATTN_K[0])
    torch.testing.assert_close(*equation.sides(present))
    expected, got = equation.sides({**present, ATTN_Q[0]: present[ATTN_Q[0]] * 2})
    assert not torch.allclose(expected, got)


def test_an_equation_that_is_left_out_tells_between_which_locations_and_why():
    capped = equations(values(cap=0.5))[MADE]
    assert isinstance(capped, Unapplied)
    assert capped.about == (ATTN_Q[0], ATTN_K[0], ATTN_SCORES[0])
    assert "a bias is added or a cap put on them" in capped.why
    sunk = equations(values(sink=True))
    assert sunk["pattern = softmax(scores)"] == Unapplied(
        "pattern = softmax(scores)",
        (ATTN_SCORES[0], ATTN_PATTERN[0]),
        "the pattern is without what a sink gets: attn.scores 4 5 6, attn.pattern 4 5 5",
    )
    assert "their sizes do not fit: attn.q 5 4 3, attn.k 5 2 3, attn.scores 4 5 6" in str(sunk[MADE])


def test_heads_that_the_model_repeats_are_said_to_be_the_same():
    present = values()
    present[ATTN_V[0]] = present[ATTN_V[0]].repeat_interleave(2, 2)
    repeated = equations(present)["each head has keys and values of its own"]
    assert isinstance(repeated, Unapplied)
    assert repeated.about == (ATTN_V[0],)
    assert repeated.why.startswith("every 2 heads in a row are the same, which the model repeats before it")


def test_what_is_left_out_stands_among_the_gaps_beside_what_is_proven():
    def of_queries(graph: HookGraph) -> list[Gap]:
        return [g for g in graph.report.gaps if g.location == ATTN_Q[0] and g.invariant == "conserved"]

    plain, capped = bound("gpt2", torch.float64), bound("gemma2", torch.float64)
    notes = {p.note for p in plain.report.proofs if p.location == ATTN_Q[0]}
    assert MADE in notes
    assert not of_queries(plain)
    assert [g.reason.partition(":")[0] for g in of_queries(capped)] == [MADE]


def test_queries_and_keys_of_one_attention_have_one_width():
    clean = {
        ATTN_Q[0]: torch.zeros(1, 5, 4, 3),
        ATTN_K[0]: torch.zeros(1, 5, 2, 6),
        ATTN_K[1]: torch.zeros(1),
    }
    note = "queries have width 3, keys 6"
    assert _unpaired(clean) == {ATTN_Q[0]: note, ATTN_K[0]: note}
