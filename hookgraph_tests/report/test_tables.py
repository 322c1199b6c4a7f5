"""Tables say everything that a result holds, in plain text."""

import pytest
from rich.console import Console
from rich.table import Table

from hookgraph.algorithms.effects.results import Node, Ranking
from hookgraph.graph.conformance import ConformanceReport
from hookgraph.ontology.transformer import ATTN_Z, EMBED, RESID_POST
from hookgraph.report import Prompt, PromptPair, tables


def text(table: Table, width: int = 120) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def rows(table: Table) -> list[list[str]]:
    """The words of each line below the header."""
    return [line.split() for line in text(table).splitlines()[1:]]


@pytest.mark.parametrize(
    ("layers", "printed"),
    [([], ""), ([3], "3"), ([2, 0, 1], "0-2"), ([0, 1, 5, 7, 8, 8], "0-1, 5, 7-8")],
)
def test_layers_print_as_ranges(layers: list[int], printed: str):
    assert tables.ranges(layers) == printed


def test_locations_of_one_shape_share_a_row():
    sizes = {EMBED: (1, 3, 8), **{ATTN_Z[i]: (1, 3, 4, 2) for i in range(3)}}
    assert rows(tables.locations_table(sizes)) == [
        ["embed", "batch", "pos", "d_model=8"],
        ["attn.z", "batch", "pos", "head=4", "d_head=2", "0-2"],
    ]


def test_layers_of_other_shapes_have_their_own_row():
    sizes = {ATTN_Z[0]: (1, 3, 4, 2), ATTN_Z[1]: (1, 3, 8, 2), ATTN_Z[2]: (1, 3, 4, 2)}
    found = rows(tables.locations_table(sizes))
    assert [row[-2:] for row in found] == [["0,", "2"], ["d_head=2", "1"]]
    assert [row[3] for row in found] == ["head=4", "head=8"]


def test_the_worst_error_over_the_layers_is_shown(conformance: ConformanceReport):
    z, mlp = rows(tables.conformance_table(conformance))
    assert z[:2] == ["attn.z", "0-1"]
    assert z[2:4] == ["✓", "2e-09"]
    assert mlp[3:5] == ["✗", "5e-01"]


def test_a_location_that_failed_and_was_taken_out_is_shown(conformance: ConformanceReport):
    without = ConformanceReport(conformance.proofs, {ATTN_Z[0]: "hook"})
    assert "mlp.out" in text(tables.conformance_table(without))


def test_what_fails_is_listed_with_its_numbers(conformance: ConformanceReport):
    assert rows(tables.failures_table(conformance)) == [
        ["mlp.out[0]", "conserved", "5.0e-01", "1e-06", "off"]
    ]


def test_what_is_absent_comes_with_its_reason(conformance: ConformanceReport):
    assert "there is <no> MLP" in text(tables.absent_table(conformance))


def test_a_ranking_shows_estimate_beside_exact(ranking: Ranking):
    first, second, third = rows(tables.ranking_table(ranking))
    assert first[:3] == ["attn.z[1]@head=2", "-2.000", "-1.500"]
    assert second[:3] == ["mlp.out[0]", "+0.500", "+0.250"]
    assert third[:3] == ["resid.post[1]@pos=2", "+0.100", "–"]


def test_bars_are_as_long_as_effects_are_large(ranking: Ranking):
    bars = [row[-1].count("█") for row in rows(tables.ranking_table(ranking))]
    assert bars == sorted(bars, reverse=True)
    assert bars[-1] >= 1


def test_a_ranking_without_exact_effects_has_no_such_column():
    table = tables.ranking_table(Ranking((Node(RESID_POST[0], 1.0),)))
    assert "exact" not in text(table)


def test_an_empty_ranking_prints():
    assert "node" in text(tables.ranking_table(Ranking(())))


def test_a_position_is_named_by_its_token(ranking: Ranking):
    printed = text(tables.ranking_table(ranking, tokens=("a", "b", "c")))
    assert "resid.post[1]@pos=2 “c”" in printed
    assert "attn.z[1]@head=2 “" not in printed


def test_answers_are_shown_for_both_prompts(pair: PromptPair):
    clean, corrupt = rows(tables.answers_table(pair))
    assert clean == ["clean", "a", "<b>", "c", "75.0%", "12.5%", "+1.50"]
    assert corrupt == ["corrupt", "a", "<b>", "d", "25.0%", "50.0%", "-0.50"]


def test_words_are_no_markup(pair: PromptPair):
    hostile = Prompt("[bold]x [/nothing]", ("x",), 0.5, 0.5, 0.0)
    assert "[/nothing]" in text(tables.answers_table(PromptPair(hostile, hostile, "[red]", "y")))


def test_prompts_of_other_lengths_still_print(pair: PromptPair):
    longer = Prompt("a b c d", pair.clean.tokens, 0.5, 0.5, 0.0)
    assert "a b c d" in text(tables.answers_table(PromptPair(longer, pair.corrupt, "x", "y")))
