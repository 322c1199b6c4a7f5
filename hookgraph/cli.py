"""The command line: `hookgraph demo`, `locations`, `check`, `attribute` and the other algorithms."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hookgraph.algorithms.effects.patching import Method, patching_effect
from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.flow.tracing import contributions as contributions_of
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.algorithms.profiles.profiling import path_profile
from hookgraph.algorithms.ranking import Ranking
from hookgraph.binding import Family, bind
from hookgraph.binding.binding import check as check_all
from hookgraph.binding.examples import example_inputs
from hookgraph.binding.loading import load_model, load_tokenizer
from hookgraph.demo import model_path
from hookgraph.demo.telling import tell
from hookgraph.errors import HookGraphError, InputError, LocationError, nearest
from hookgraph.graph.conformance import ConformanceReport
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location, declared
from hookgraph.report import breakdown, tables
from hookgraph.report.attribution import Attribution, attribution_page
from hookgraph.report.figures import pictures
from hookgraph.report.prompts import Prompt, PromptPair

app = typer.Typer(
    help="Read, edit and attribute any tensor inside a HuggingFace transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(help="A local folder, a name on the hub, or `demo`.", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Clean = Annotated[str, typer.Option(help="The prompt with the behaviour.", show_default=False)]
Corrupt = Annotated[str, typer.Option(help="As many tokens, without it.", show_default=False)]
Answer = Annotated[str, typer.Option(help="What follows the clean prompt, one token.", show_default=False)]
Wrong = Annotated[str, typer.Option(help="What follows the corrupt one, one token.", show_default=False)]


def main() -> None:
    """Run the command line."""
    app()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write the page and the map to.")] = Path(
        "hookgraph-demo"
    ),
    debug: Debug = False,
) -> None:
    """Attribute, check, steer and report on a small model that ships with hookgraph."""
    with _told(debug):
        tell(_console(), out)


@app.command()
def locations(
    model: Model,
    layers: Annotated[str, typer.Option(help="Which layers, such as 0-3 or 0,5.")] = "",
    debug: Debug = False,
) -> None:
    """What can be hooked in a model, with shapes, and why other locations are absent."""
    with _told(debug):
        wanted = _layers(layers)
        loaded = load_model(_place(model))
        graph = bind(loaded)
        chosen = [x for x in graph.locations if not wanted or x.layer in wanted]
        if not chosen:
            raise LocationError(f"--layers {layers}: this model has no such layer")
        run = graph.run(example_inputs(loaded), save=chosen)
        console = _console()
        console.print(tables.locations_table({k: tuple(v.shape) for k, v in run.items()}))
        if _only(graph.report, wanted).absent:
            console.print()
            console.print(tables.absent_table(_only(graph.report, wanted)))


@app.command()
def check(
    model: Model,
    json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Every layer of a large model, not one of each kind.")
    ] = False,
    family: Annotated[Path | None, typer.Option(help="A JSON file with a family record.")] = None,
    debug: Debug = False,
) -> None:
    """Prove every location of a model; ends with status 1 if an invariant fails."""
    with _told(debug):
        record = None if family is None else Family.read(family)
        graph = bind(load_model(_place(model)), check=not full, family=record, cached=False)
        report = check_all(graph) if full else graph.report
        if json:
            typer.echo(report.to_json())
        else:
            console = _console()
            console.print(tables.conformance_table(report))
            if report.failures:
                console.print()
                console.print(tables.failures_table(report))
            if report.absent:
                console.print()
                console.print(tables.absent_table(report))
            console.print(Text(f"\n{breakdown.verdict(report)}"))
        if not report.ok:
            raise typer.Exit(1)


@app.command()
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
    with _told(debug):
        chosen = _method(method)
        tokenizer = load_tokenizer(_place(model))
        right, other = answer_token(tokenizer, answer, clean), answer_token(tokenizer, wrong, clean)
        graph = bind(load_model(_place(model)), tokenizer)
        places = _locations(graph, at)
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
            _console().print(Text(f"\n{attribution_page(content).write(report)}"))


@app.command()
def contributions(
    model: Model,
    text: Annotated[str, typer.Option(help="What is run.", show_default=False)],
    token: Annotated[int, typer.Option(help="The position that the paths lead to.")] = -1,
    threshold: Annotated[float, typer.Option(help="What a share has to exceed.")] = 0.04,
    norm: Annotated[float, typer.Option(help="q of the norm that distances are measured by.")] = 1,
    figure: Annotated[Path | None, typer.Option(help="Draw the paths into this file.")] = None,
    debug: Debug = False,
) -> None:
    """Which tokens, through which layers, a position of a text is made of."""
    with _told(debug):
        tokenizer = load_tokenizer(_place(model))
        found = contributions_of(bind(load_model(_place(model)), tokenizer), text, norm)
        paths, console = found.leading_to(token, threshold), _console()
        console.print(tables.frame_table(found.summary(), "stream"))
        console.print()
        console.print(tables.flows_table(paths, _tokens(tokenizer, text)))
        if figure is not None:
            found.plot(token, threshold).savefig(figure)
            console.print(Text(f"\n{figure}"))


@app.command()
def profile(
    model: Model,
    clean: Clean,
    corrupt: Corrupt,
    answer: Answer,
    wrong: Wrong,
    at: Annotated[str, typer.Option(help="Nodes, such as attn.z[0]@head=1, or types.")] = "attn.z",
    over: Annotated[str, typer.Option(help="Axes along which each is divided into nodes.")] = "head",
    steps: Annotated[int, typer.Option(min=1, help="How many points.")] = 50,
    figure: Annotated[Path | None, typer.Option(help="Draw the profiles into this file.")] = None,
    debug: Debug = False,
) -> None:
    """How the metric and its slope move while each node moves from clean to corrupt."""
    with _told(debug):
        tokenizer = load_tokenizer(_place(model))
        metric = logit_diff(*(answer_token(tokenizer, word, clean) for word in (answer, wrong)))
        graph = bind(load_model(_place(model)), tokenizer)
        axes = [name for name in over.split(",") if name]
        found = path_profile(graph, clean, corrupt, metric, _locations(graph, at), steps, over=axes)
        _console().print(tables.frame_table(found.to_frame(), "node"))
        if figure is not None:
            found.plot().savefig(figure)
            _console().print(Text(f"\n{figure}"))


def answer_token(tokenizer: PreTrainedTokenizerBase, word: str, prompt: str) -> int:
    """The token id of an answer, as it follows a prompt: with a space before it, else without.

    Raises:
        InputError: it is no single token, with how the tokenizer splits it; or one it does not know.
    """
    bare = word.removeprefix(" ")
    forms = [bare, f" {bare}"] if prompt.endswith((" ", "\n")) else [f" {bare}", bare]
    split = {form: tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms}
    for ids in split.values():
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
    if any(tokenizer.unk_token_id in ids for ids in split.values()):
        raise InputError(f"the tokenizer does not know {bare!r}")
    pieces = "; ".join(f"{k!r} is {' | '.join(tokenizer.convert_ids_to_tokens(v))}" for k, v in split.items())
    raise InputError(f"an answer is one token, {bare!r} is several: {pieces}")


@contextmanager
def _told(debug: bool) -> Iterator[None]:
    """Errors of users end the command in one line; transformers keeps quiet meanwhile."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (HookGraphError, OSError) as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        Console(stderr=True).print(Text("error: ", style="bold red") + Text(message), soft_wrap=True)
        raise typer.Exit(1) from error
    finally:
        logging.set_verbosity(verbosity)


def _console() -> Console:
    return Console(highlight=False)


def _place(model: str) -> str:
    """Where the model is: the embedded one has a word of its own."""
    return str(model_path()) if model == "demo" else model


def _layers(text: str) -> frozenset[int]:
    """The layers that "0-3,5" names; none for an empty text.

    Raises:
        LocationError: it is not written like that.
    """
    if not re.fullmatch(r"(\d+(-\d+)?(,\d+(-\d+)?)*)?", text):
        raise LocationError(f"--layers {text!r}: write 0-3, or 0,5, or 0-3,5")
    spans = [[int(n) for n in part.split("-")] for part in text.split(",") if part]
    for span in spans:
        if span[0] > span[-1]:
            raise LocationError(
                f"--layers {text!r}: {span[0]}-{span[-1]} counts down, write {span[-1]}-{span[0]}"
            )
    return frozenset(layer for span in spans for layer in range(span[0], span[-1] + 1))


def _only(report: ConformanceReport, layers: frozenset[int]) -> ConformanceReport:
    """A report of what is absent in some layers; in all of them if none is named."""
    return replace(report, absent={k: v for k, v in report.absent.items() if not layers or k.layer in layers})


def _method(name: str) -> Method:
    for method in get_args(Method):
        if method == name:
            return method
    raise HookGraphError(f"unknown method {name!r}: {nearest(name, get_args(Method))}")


def _locations(graph: HookGraph, text: str) -> list[Location]:
    """The locations that a list such as "attn.z,mlp.out[3]@pos=-1" names; a type stands for every layer.

    Raises:
        LocationError: a name is unknown, or the model lacks the location; near names are given.
    """
    types = {x.qualified_name: x for x in declared()}
    found: list[Location] = []
    for name in re.split(r",(?=\s*[A-Za-z])", text):
        kind = types.get(name.strip())
        found += graph.every(kind) if kind is not None else [graph.check(Location.parse(name))]
    return found


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The tokens of a prompt, as they are read."""
    return [_word(tokenizer, i) for i in tokenizer(text)["input_ids"]]


def _word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token])).strip() or str(tokenizer.convert_ids_to_tokens(token))


def _pair(
    graph: HookGraph, tokenizer: PreTrainedTokenizerBase, clean: str, corrupt: str, answers: tuple[int, int]
) -> PromptPair:
    """Both prompts with the model's answers.

    Raises:
        InputError: one has more tokens than the other.
    """
    first, second = _tokens(tokenizer, clean), _tokens(tokenizer, corrupt)
    if len(first) != len(second):
        raise InputError(
            f"the clean prompt has {len(first)} tokens, the corrupt one {len(second)}; positions are "
            f"compared one by one: {' | '.join(first)} and {' | '.join(second)}"
        )
    return PromptPair(
        Prompt.read(clean, first, graph.run(clean).logits[0], *answers),
        Prompt.read(corrupt, second, graph.run(corrupt).logits[0], *answers),
        *(_word(tokenizer, i) for i in answers),
    )


def _rankings(effect: PatchingEffect, top: int) -> dict[str, Ranking]:
    """The nodes that matter, and the places in the residual stream, each measured exactly as well."""
    parts = {"Nodes": breakdown.units(effect), "The residual stream, by position": breakdown.places(effect)}
    return {name: part.check(top) for name, part in parts.items() if part is not None}


def _tell_attribution(pair: PromptPair, effect: PatchingEffect, rankings: dict[str, Ranking]) -> None:
    console = _console()
    console.print(tables.answers_table(pair))
    how = effect.convention
    console.print(f"\ntotal effect {breakdown.total(effect):+.3f} ({how.sign}), method {how.method}")
    for name, ranking in rankings.items():
        console.print(Text(f"\n{name}", style="bold"))
        console.print(tables.ranking_table(ranking, tokens=pair.labels))
