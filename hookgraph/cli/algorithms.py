"""Commands that run one algorithm each: contributions, path profiles, causal bases, counterfactuals."""

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.text import Text

from hookgraph.algorithms.bases.basis import causal_basis
from hookgraph.algorithms.bases.subspaces import Removal
from hookgraph.algorithms.flow.tracing import contributions as contributions_of
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.algorithms.profiles.profiling import path_profile
from hookgraph.algorithms.readouts.lenses import Lens, LogitLens, TunedLens
from hookgraph.algorithms.search.searching import Method
from hookgraph.algorithms.search.searching import counterfactuals as counterfactuals_of
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
    token_texts,
)
from hookgraph.cli.telling import drawing, terminal, told, write
from hookgraph.ontology.locations import Location
from hookgraph.report import tables


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
    with told(debug):
        tokenizer = load_tokenizer(place(model))
        found = contributions_of(bind(load_model(place(model)), tokenizer), text, norm)
        paths, console = found.leading_to(token, threshold), terminal()
        console.print(tables.frame_table(found.summary(), "stream"))
        console.print()
        console.print(tables.flows_table(paths, token_texts(tokenizer, text)))
        write((figure, drawing(lambda: found.plot(token, threshold))))


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
    with told(debug):
        tokenizer = load_tokenizer(place(model))
        metric = logit_diff(*(answer_token(tokenizer, word, clean) for word in (answer, wrong)))
        graph = bind(load_model(place(model)), tokenizer)
        axes = [name for name in over.split(",") if name]
        found = path_profile(graph, clean, corrupt, metric, chosen_locations(graph, at), steps, over=axes)
        terminal().print(tables.frame_table(found.to_frame(), "node"))
        write((figure, drawing(found.plot)))


def basis(
    model: Model,
    text: Annotated[
        list[str], typer.Option(help="What is run; may be given several times.", show_default=False)
    ],
    at: Annotated[str, typer.Option(help="The location, such as resid.post[1].", show_default=False)],
    k: Annotated[int, typer.Option("--directions", min=1, help="How many directions at most.")] = 4,
    ablation: Annotated[
        str, typer.Option(help=f"What stands in for a direction: {', '.join(get_args(Removal))}.")
    ] = "mean",
    lens: Annotated[str, typer.Option(help="Decode by a lens: `logit`, or the folder of a tuned lens.")] = "",
    save: Annotated[Path | None, typer.Option(help="Write the basis to this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the energies into this file.")] = None,
    debug: Debug = False,
) -> None:
    """The directions of a location without which what the model says changes most."""
    with told(debug):
        removal = one_of("ablation", ablation, get_args(Removal))
        decoder: Lens | None = None if not lens else LogitLens() if lens == "logit" else TunedLens.load(lens)
        graph = bind(load_model(place(model)), load_tokenizer(place(model)))
        found = causal_basis(graph, text, Location.parse(at), k, removal, decoder)
        terminal().print(tables.frame_table(found.to_frame(), "direction"))
        write((save, found.save), (figure, drawing(found.plot)))


def counterfactuals(
    model: Model,
    text: Annotated[str, typer.Option(help="The prompt that is edited.", show_default=False)],
    answer: Annotated[str, typer.Option(help="What follows it, one token.", show_default=False)],
    wrong: Annotated[str, typer.Option(help="What might have followed, one token.", show_default=False)],
    at: Annotated[str, typer.Option(help="The nodes that are to tell, such as attn.z[0]@head=1.")] = "embed",
    method: Annotated[
        str, typer.Option(help=f"How texts are found: {', '.join(get_args(Method))}.")
    ] = "discrete",
    edits: Annotated[int, typer.Option(help="How many tokens may differ.")] = 2,
    perplexity: Annotated[float, typer.Option(help="At most so many times the prompt's.")] = 1.5,
    tries: Annotated[int, typer.Option(help="How many texts are measured, at most.")] = 512,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Write what was found to this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw every text into this file.")] = None,
    debug: Debug = False,
) -> None:
    """Texts a few tokens away that the model answers otherwise, as the nodes tell."""
    with told(debug):
        chosen = one_of("method", method, get_args(Method))
        tokenizer = load_tokenizer(place(model))
        metric = logit_diff(*(answer_token(tokenizer, word, text) for word in (answer, wrong)))
        graph = bind(load_model(place(model)), tokenizer)
        found = counterfactuals_of(
            graph,
            text,
            metric,
            chosen_locations(graph, at),
            chosen,
            edits=edits,
            max_perplexity=perplexity,
            tries=tries,
            seed=seed,
        )
        terminal().print(tables.frame_table(found.to_frame(), "pair") if len(found) else Text(repr(found)))
        write((save, found.save), (figure, drawing(found.plot)))
