"""The demo as it is told: every step is printed as it is computed, the page and the map come last."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.ranking import Ranking
from hookgraph.binding import bind
from hookgraph.demo import load, model_path, story
from hookgraph.demo.card import stated_figures
from hookgraph.demo.story import Speaker, Steering
from hookgraph.demo.tour import Guide, tour
from hookgraph.ontology.transformer import ATTN_Z
from hookgraph.report import page, tables
from hookgraph.report.attribution import Attribution, attribution_page
from hookgraph.report.breakdown import only, places, total, units, verdict
from hookgraph.report.figures import Picture, head_map, png, position_map
from hookgraph.report.page import Section
from hookgraph.report.prompts import PromptPair

TOP: Final = 10
"""How many nodes are listed."""


@dataclass(frozen=True)
class Findings:
    """What the steps found out."""

    pair: PromptPair
    nodes: PatchingEffect
    ranking: Ranking
    """Every head and MLP, estimate and exact."""
    positions: PatchingEffect
    places: Ranking
    steering: Steering


def tell(console: Console, out: Path, *, everything: bool = False) -> None:
    """Run the demo on the embedded model, print it, and write a page and a map to the folder `out`.

    Args:
        console: where it is told.
        out: the folder.
        everything: run every other algorithm as well, and write a figure for each and a page of all.

    Raises:
        HookGraphError: matplotlib is not installed.
    """
    model, tokenizer = load()
    speaker = Speaker(bind(model, tokenizer), model, tokenizer)
    card = card_line(model)
    console.print(Text(card, style="dim"))
    _tell_locations(console, speaker)
    pair = _tell_pair(console, speaker)
    nodes, ranking = _tell_heads(console, speaker)
    effect = story.effect_of_places(speaker)
    positions = places(effect) or effect
    steering = _tell_steering(console, speaker, pair)
    found = Findings(pair, nodes, ranking, positions, positions.check(TOP), steering)
    _write(console, speaker, card, found, out)
    if everything:
        tour(console, Guide(speaker), out, card)


def card_line(model: PreTrainedModel) -> str:
    """The model in one line, with the figures that its card states."""
    figures = stated_figures((model_path() / "README.md").read_text(encoding="utf-8"))
    config = model.config
    return (
        f"Embedded model: {type(model).__name__}, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads, {config.hidden_size} dimensions, "
        f"{model.num_parameters():,} parameters; right on {figures.ioi_accuracy:.1%} of indirect objects "
        "that it never saw"
    )


def _tell_locations(console: Console, speaker: Speaker) -> None:
    graph = speaker.graph
    run = graph.run(story.STORY.text, save=graph.locations)
    console.rule("What can be hooked", align="left")
    _print(console, tables.locations_table({k: tuple(v.shape) for k, v in run.items()}))
    console.print(verdict(graph.report))


def _tell_pair(console: Console, speaker: Speaker) -> PromptPair:
    pair = story.prompts(speaker)
    console.rule(f"{pair.answer} or {pair.wrong}?", align="left")
    _print(console, tables.answers_table(pair))
    return pair


def _tell_heads(console: Console, speaker: Speaker) -> tuple[PatchingEffect, Ranking]:
    """Estimate every head and MLP over held-out pairs, then measure all of them exactly."""
    pairs = story.held_out()
    effect = story.effect_of_nodes(speaker, pairs)
    nodes = units(effect) or effect
    ranking = nodes.check(sum(x.numel() for x in nodes.effects.values()))
    console.rule("What carries the answer", align="left")
    console.print(
        f"Mean over {len(pairs)} held-out pairs: how much logit(answer) - logit(wrong) changes when one "
        f"head or MLP takes its value from the corrupt prompt. All at once: {total(effect):+.2f}."
    )
    _print(console, tables.ranking_table(ranking[:TOP], node="head or MLP"))
    console.print(
        f"estimate: one backward pass for all {len(ranking)} nodes; exact: each patched alone. "
        f"Rank correlation {ranking.correlation:.2f} over all {len(ranking)}"
    )
    return nodes, ranking


def _tell_steering(console: Console, speaker: Speaker, pair: PromptPair) -> Steering:
    found = story.steer(speaker)
    console.rule("Steering", align="left")
    console.print(f"A vector at the last position of {found.at}: mean of x({pair.wrong}) - x({pair.answer})")
    lines = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    lines.add_row(
        "as it is", Text(f"… {story.STORY.text.split(',')[-1].strip()} "), *_said(found, steered=False)
    )
    lines.add_row(
        "steered", Text(f"… {story.STORY.text.split(',')[-1].strip()} "), *_said(found, steered=True)
    )
    _print(console, lines)
    console.print(f"The answer changes in {found.flipped:.0%} of {found.others} other sentences about them")
    return found


def _said(found: Steering, *, steered: bool) -> tuple[Text, str, str]:
    words = found.steered_words if steered else found.plain_words
    prompt = found.steered if steered else found.plain
    names = (story.STORY.answer, story.STORY.wrong)
    chances = f"{names[0]} {prompt.answer:.1%}", f"{names[1]} {prompt.wrong:.1%}"
    return Text(words, style="bold"), *chances


def _write(console: Console, speaker: Speaker, card: str, found: Findings, out: Path) -> None:
    """The page and the map, and where they are."""
    heads = only(found.nodes, ATTN_Z)
    title = "Effect of each attention head on the indirect object"
    out.mkdir(parents=True, exist_ok=True)
    image = out / "heads.png"
    image.write_bytes(png(head_map(heads, title=title)))
    content = Attribution(
        title="Which heads know who gets the milk?",
        model=card,
        pair=found.pair,
        effect=found.nodes,
        rankings={
            f"Heads and MLPs that carry the answer, mean of {story.HELD_OUT} pairs": found.ranking,
            "The residual stream of this pair, by layer and position": found.places,
        },
        maps=_maps(heads, found),
        conformance=speaker.graph.report,
        more=(_steering_section(found.steering),),
        top=TOP,
    )
    path = attribution_page(content).write(out / "report.html")
    console.rule("Written", align="left")
    console.print(Text(f"{path}\n{image}"))


def _maps(heads: PatchingEffect, found: Findings) -> list[tuple[Picture, str]]:
    labels = found.pair.labels
    many = f"mean over {story.HELD_OUT} held-out pairs"
    return [
        (
            Picture.of(lambda theme: head_map(heads, title="attn.z", theme=theme), "head by layer map"),
            f"Every attention head, {many}, summed over positions.",
        ),
        (
            Picture.of(
                lambda theme: position_map(found.positions, labels, title="resid.post", theme=theme),
                "position by layer map",
            ),
            "The residual stream after each layer, this pair: at which token the answer stands by then.",
        ),
    ]


def _steering_section(found: Steering) -> Section:
    names = (story.STORY.answer, story.STORY.wrong)
    rows = [
        (name, words, f"{prompt.answer:.1%}", f"{prompt.wrong:.1%}")
        for name, words, prompt in (
            ("as it is", found.plain_words, found.plain),
            ("steered", found.steered_words, found.steered),
        )
    ]
    text = (
        f"A vector is added at the last position of {found.at} while the model generates: the mean "
        f"difference between sentences of other kinds whose answer is {names[1]} and {names[0]}. "
        f"It changes the answer in {found.flipped:.0%} of {found.others} other sentences about the two."
    )
    return Section("Steering", (page.paragraph(text), page.table(("", "the model says", *names), rows)))


def _print(console: Console, table: Table) -> None:
    console.print(Padding(table, (1, 0, 1, 2)))
