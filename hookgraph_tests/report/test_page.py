"""A page is one file that needs nothing else, and in which every text is escaped."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from hookgraph.algorithms.effects.results import Node, PatchingEffect, Ranking
from hookgraph.graph.conformance import ConformanceReport, Proof
from hookgraph.ontology.transformer import MLP_OUT
from hookgraph.report import (
    Attribution,
    Page,
    Picture,
    Prompt,
    PromptPair,
    Section,
    attribution_page,
    page,
)

HOSTILE = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "source", "br", "link"}


class Outline(HTMLParser):
    """What a page is made of; raises where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def picture() -> Picture:
    return Picture(b"\x89PNG light", b"\x89PNG dark", 4.0, HOSTILE)


@pytest.fixture
def content(
    effect: PatchingEffect, pair: PromptPair, ranking: Ranking, conformance: ConformanceReport
) -> Attribution:
    return Attribution(
        "Why?",
        "Tiny, 2 layers",
        pair,
        effect,
        {"Nodes": ranking},
        [(picture(), "a map")],
        conformance,
        (Section("More", (page.paragraph("more of it"),)),),
    )


def test_the_page_holds_everything(content: Attribution):
    outline = Outline(attribution_page(content).render())
    text = " ".join(outline.texts)
    for part in (
        "Why?",
        "Tiny, 2 layers",
        "75.0%",
        "-1.50",
        "mean of 2 pairs",
        "attn.z[1]@head=2",
        "+0.250",
        "a map",
    ):
        assert part in text, part
    for part in ("corrupt - clean", "float32", "1 fail", "off by 5.0e-01", "absent: there is <no> MLP"):
        assert part in text, part
    assert text.index("more of it") < text.index("Conventions")


def test_the_page_needs_nothing_else(content: Attribution):
    text = attribution_page(content).render()
    outline = Outline(text)
    assert not {"script", "link", "iframe", "object"} & set(outline.tags)
    references = [v for k, v in outline.attributes if k in ("src", "srcset", "href")]
    assert references
    assert all(v.startswith("data:image/png;base64,") for v in references)
    assert not re.search(r"https?:|@import|url\(", text)


def test_the_page_follows_the_readers_theme(content: Attribution):
    text = attribution_page(content).render()
    assert "prefers-color-scheme: dark" in text
    assert 'media="(prefers-color-scheme: dark)"' in text


@pytest.mark.parametrize(
    "piece",
    [
        page.paragraph(HOSTILE, css=HOSTILE),
        page.facts([(HOSTILE, HOSTILE)]),
        page.table((HOSTILE,), ((HOSTILE,),)),
        page.folded(HOSTILE, page.paragraph(HOSTILE)),
        page.picture(picture(), HOSTILE),
        page.ranking(Ranking((Node(MLP_OUT[0].at(pos=0), 1.0),)), node=HOSTILE, tokens=(HOSTILE,)),
        page.prompts(
            PromptPair(
                Prompt(HOSTILE, (HOSTILE, "a"), 0.5, 0.5, 0.0),
                Prompt(HOSTILE, (HOSTILE, "b"), 0.5, 0.5, 0.0),
                HOSTILE,
                HOSTILE,
            )
        ),
    ],
)
def test_every_text_is_escaped(piece: page.Html):
    outline = Outline(Page(HOSTILE, HOSTILE, (Section(HOSTILE, (piece,)),)).render())
    assert "script" not in outline.tags
    assert not {name for name, _ in outline.attributes if name.startswith(("on", "alert"))}
    assert HOSTILE in outline.texts


def test_bars_go_left_below_zero_and_right_above(ranking: Ranking):
    bars = re.findall(r'<i class="(\w+) (\w+)" style="(\w+):50%;width:([\d.]+)%"', page.ranking(ranking))
    assert bars[:4] == [
        ("estimate", "negative", "right", "50.00"),
        ("exact", "negative", "right", "37.50"),
        ("estimate", "positive", "left", "12.50"),
        ("exact", "positive", "left", "6.25"),
    ]
    assert len(bars) == 5


def test_what_differs_between_the_prompts_is_marked(pair: PromptPair):
    assert re.findall(r"<mark>(.*?)</mark>", page.prompts(pair)) == ["c", "d"]


def test_a_page_is_written_where_it_is_asked_for(tmp_path: Path):
    path = Page("Ü", "", ()).write(tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "<title>Ü</title>" in path.read_text(encoding="utf-8")


def test_numbers_of_this_pair_and_means_are_told_apart(content: Attribution):
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", attribution_page(content).render()))
    assert tiles == {
        "this pair: logit difference, clean": "+1.50",
        "this pair: logit difference, corrupt": "-0.50",
        "this pair: corrupt − clean": "-2.00",
        "mean of 2 pairs: total effect": "-1.50",
    }


def test_a_model_from_a_folder_is_told_by_its_name(content: Attribution, effect: PatchingEffect):
    for name, told in (("/home/me/tiny", "tiny"), ("openai-community/gpt2", "openai-community/gpt2")):
        known = replace(content, effect=replace(effect, metadata={"model": name}))
        assert f"<td>model</td><td>{told}</td>" in attribution_page(known).render()


def test_an_invariant_is_told_once_for_each_location_by_its_worst_proof(content: Attribution):
    proofs = tuple(
        Proof(MLP_OUT[0], invariant, holds, error, 0.1)
        for invariant, holds, error in (
            ("conserved", True, 0.0),
            ("shape", True, 0.0),
            ("conserved", False, 0.5),
            ("conserved", True, 0.0),
            ("shape", True, 0.0),
        )
    )
    known = replace(content, conformance=ConformanceReport(proofs, {MLP_OUT[0]: "hook"}))
    assert "<td>conserved: off by 5.0e-01; shape: holds</td>" in attribution_page(known).render()


def test_one_pair_is_not_called_a_mean(content: Attribution, effect: PatchingEffect):
    one = replace(content, effect=replace(effect, total_effect=torch.tensor([-1.0])))
    text = attribution_page(one).render()
    assert "mean of" not in text
    assert "this pair" not in text


def test_a_ranking_of_which_nothing_was_measured_claims_nothing(content: Attribution):
    guess = Ranking((Node(MLP_OUT[0], 1.0),))
    text = attribution_page(replace(content, rankings={"Guess": guess})).render()
    assert "Rank correlation" not in text
    assert "Largest gap" not in text
