"""The command that attributes an answer."""

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hookgraph.algorithms.effects.patching import Method, patching_effect
from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.algorithms.ranking import Ranking
from hookgraph.binding import bind
from hookgraph.binding.loading import load_model, load_tokenizer
from hookgraph.cli.arguments import (
    Answer,
    Clean,
    Corrupt,
    Debug,
    Model,
    Wrong,
    answer_token,
    chosen_locations,
    one_of,
    place,
    token_text,
    token_texts,
)
from hookgraph.cli.pairs import unequal
from hookgraph.cli.telling import terminal, told
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.report import breakdown, tables
from hookgraph.report.attribution import Attribution, attribution_page
from hookgraph.report.figures import pictures
from hookgraph.report.prompts import Prompt, PromptPair


def attribute(
    model: Model,
    clean: Clean,
    corrupt: Corrupt,
    answer: Answer,
    wrong: Wrong,
    at: Annotated[str, typer.Option(help="Locations, or types of them.")] = "attn.z,mlp.out",
    method: Annotated[
        str, typer.Option(help=f"How effects are estimated: {', '.join(get_args(Method))}.")
    ] = ("attrib"),
    top: Annotated[int, typer.Option(min=1, help="How many nodes to list and to measure exactly.")] = 10,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page to this file.")] = None,
    debug: Debug = False,
) -> None:
    """What in a model makes it answer ANSWER after the clean prompt and WRONG after the corrupt one."""
    with told(debug):
        chosen = one_of("method", method, get_args(Method))
        tokenizer = load_tokenizer(place(model))
        right, other = answer_token(tokenizer, answer, clean), answer_token(tokenizer, wrong, clean)
        graph = bind(load_model(place(model)), tokenizer)
        places = chosen_locations(graph, at)
        pair = _pair(graph, tokenizer, clean, corrupt, (right, other))
        effect = patching_effect(graph, clean, corrupt, logit_diff(right, other), places, chosen)
        rankings = _rankings(effect, top)
        _tell_attribution(pair, effect, rankings)
        if report is not None:
            content = Attribution(
                f"Why {pair.answer} and not {pair.wrong}?",
                ", ".join(filter(None, (model, effect.metadata.get("class"), effect.metadata.get("dtype")))),
                pair,
                effect,
                rankings,
                pictures(effect, pair.labels),
                graph.report,
            )
            terminal().print(Text(f"\n{attribution_page(content).write(report)}"))


def _pair(
    graph: HookGraph, tokenizer: PreTrainedTokenizerBase, clean: str, corrupt: str, answers: tuple[int, int]
) -> PromptPair:
    """Both prompts with the model's answers.

    Raises:
        InputError: one has more tokens than the other.
    """
    first, second = token_texts(tokenizer, clean), token_texts(tokenizer, corrupt)
    if len(first) != len(second):
        raise unequal(first, second)
    return PromptPair(
        Prompt.read(clean, first, graph.run(clean).logits[0], *answers),
        Prompt.read(corrupt, second, graph.run(corrupt).logits[0], *answers),
        *(token_text(tokenizer, i) for i in answers),
    )


def _rankings(effect: PatchingEffect, top: int) -> dict[str, Ranking]:
    """The nodes that matter, and the places in the residual stream, each measured exactly as well."""
    parts = {"Nodes": breakdown.units(effect), "The residual stream, by position": breakdown.places(effect)}
    return {name: part.check(top) for name, part in parts.items() if part is not None}


def _tell_attribution(pair: PromptPair, effect: PatchingEffect, rankings: dict[str, Ranking]) -> None:
    console = terminal()
    console.print(tables.answers_table(pair))
    how = effect.convention
    console.print(f"\ntotal effect {breakdown.total(effect):+.3f} ({how.sign}), method {how.method}")
    for name, ranking in rankings.items():
        console.print(Text(f"\n{name}", style="bold"))
        console.print(tables.ranking_table(ranking, tokens=pair.labels))
