"""Commands that find circuits: of nodes with the edges between them, and of edges between components."""

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Annotated, Final, get_args

import typer
from rich.console import Console

from hookgraph.algorithms.circuits.ablating import Ablation, Errors
from hookgraph.algorithms.circuits.circuit import Circuit
from hookgraph.algorithms.circuits.curves import cmd, cpr
from hookgraph.algorithms.circuits.direct import EdgeMethod
from hookgraph.algorithms.circuits.discovery import discover_circuit
from hookgraph.algorithms.circuits.eap import EapMethod, edge_attribution
from hookgraph.algorithms.circuits.results import Edge, frame_of
from hookgraph.algorithms.circuits.scores import Selection
from hookgraph.algorithms.circuits.sizes import SizeCurve, size_curve
from hookgraph.binding import bind
from hookgraph.binding.loading import load_model, load_tokenizer
from hookgraph.cli.arguments import Debug, Model, chosen_locations, one_of, place
from hookgraph.cli.pairs import COUNT, Answer, Clean, Corrupt, Count, File, Wrong, batches_of, chosen_pairs
from hookgraph.cli.telling import drawing, terminal, told, write
from hookgraph.demo import load_dictionaries
from hookgraph.errors import LoadError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location
from hookgraph.report import tables
from hookgraph.subgraphs import Autoencoder, AutoencoderGraph, load_autoencoder

_PARTS: Final = "attn.z,mlp.out"
"""The nodes of a model without dictionaries."""
_DRAWN: Final = 60
"""So many edges are drawn."""
_JOINT: Final = ("d_head", "d_model")

Top = Annotated[int, typer.Option(min=1, help="How many nodes and edges to list.")]
Save = Annotated[Path | None, typer.Option(help="Write the circuit to this file.")]
Figure = Annotated[Path | None, typer.Option(help="Draw the circuit into this file.")]
CurveFile = Annotated[Path | None, typer.Option(help="Draw faithfulness over size into this file.")]


def circuit(
    model: Model,
    pairs: File = None,
    clean: Clean = "",
    corrupt: Corrupt = "",
    answer: Answer = "",
    wrong: Wrong = "",
    count: Count = COUNT,
    dictionary: Annotated[
        list[str] | None, typer.Option(help="A dictionary: its folder, or LOCATION=FOLDER; several times.")
    ] = None,
    at: Annotated[str, typer.Option(help="Locations, or types of them; by default every dictionary's.")] = "",
    faithful: Annotated[float, typer.Option(help="How faithful the circuit has to be.")] = 0.8,
    ablation: Annotated[
        str, typer.Option(help=f"What stands in for other nodes: {', '.join(get_args(Ablation))}.")
    ] = "corrupt",
    errors: Annotated[
        str, typer.Option(help=f"What becomes of errors: {', '.join(get_args(Errors))}.")
    ] = "default",
    method: Annotated[
        str, typer.Option(help=f"How effects are estimated: {', '.join(get_args(EdgeMethod))}.")
    ] = "ig",
    least: Annotated[float, typer.Option("--edge-threshold", help="What an edge exceeds.")] = 0.01,
    random: Annotated[int, typer.Option(min=0, help="How many random circuits of each size.")] = 3,
    top: Top = 10,
    save: Save = None,
    figure: Figure = None,
    curve: CurveFile = None,
    debug: Debug = False,
) -> None:
    """The fewest nodes that do what the model does on pairs of prompts, and the edges between them."""
    with told(debug):
        against = one_of("ablation", ablation, get_args(Ablation))
        left, how = one_of("errors", errors, get_args(Errors)), one_of("method", method, get_args(EdgeMethod))
        tokenizer = load_tokenizer(place(model))
        batches = batches_of(tokenizer, chosen_pairs(model, pairs, count, (clean, corrupt, answer, wrong)))
        bare = bind(load_model(place(model)), tokenizer)
        graph, ends = spliced(bare, dictionaries(model, dictionary or []), at)

        def discover(threshold: float, edge_threshold: float) -> Circuit:
            return discover_circuit(
                graph, batches, None, ends, method=how, joint=_JOINT, ablation=against,
                node_threshold=threshold, edge_threshold=edge_threshold,
            )  # fmt: skip

        every = discover(0.0, inf)
        sizes = size_curve(graph, every, batches, None, random=random, ablation=against, errors=left)
        terminal().print(tables.frame_table(sizes.to_frame(), "nodes"))
        size = sizes.smallest(faithful)
        found = discover(_below(every, size), least).within(every.largest(size).nodes)
        _tell_circuit(terminal(), found, every, sizes, top)
        write((save, found.save), (figure, drawing(lambda: found.plot(_DRAWN))), (curve, drawing(sizes.plot)))


def edges(
    model: Model,
    pairs: File = None,
    clean: Clean = "",
    corrupt: Corrupt = "",
    answer: Answer = "",
    wrong: Wrong = "",
    count: Count = COUNT,
    method: Annotated[
        str, typer.Option(help=f"How edges are scored: {', '.join(get_args(EapMethod))}.")
    ] = "eap-ig-inputs",
    steps: Annotated[int, typer.Option(min=1, help="How many points integrals have.")] = 5,
    size: Annotated[int, typer.Option("--edges", min=1, help="How many edges a circuit has at most.")] = 100,
    select: Annotated[
        str, typer.Option(help=f"How its edges are chosen: {', '.join(get_args(Selection))}.")
    ] = "top",
    curves: Annotated[bool, typer.Option(help="Run circuits of ten sizes: CPR and CMD.")] = True,
    top: Top = 10,
    save: Save = None,
    figure: Figure = None,
    curve: CurveFile = None,
    debug: Debug = False,
) -> None:
    """Which head or MLP acts on which by how much, and the circuit of the edges that matter most."""
    with told(debug):
        how = one_of("method", method, get_args(EapMethod))
        selection = one_of("way to select", select, get_args(Selection))
        tokenizer = load_tokenizer(place(model))
        batches = batches_of(tokenizer, chosen_pairs(model, pairs, count, (clean, corrupt, answer, wrong)))
        graph = bind(load_model(place(model)), tokenizer)
        scores = edge_attribution(graph, batches, None, how, steps=steps)
        found = scores.circuit(size, selection)
        console = terminal()
        console.print(f"{len(scores)} edges\n")
        _tell_edges(console, scores.top(top))
        counts = f"{found.edges.count} edges that lead to the logits, between {len(found.nodes)} nodes"
        console.print(f"\nCircuit ({selection}) of {counts}")
        write((save, found.save), (figure, drawing(lambda: found.plot(_DRAWN))))
        if curves or curve is not None:
            performance, distance = (f(graph, scores, batches, None) for f in (cpr, cmd))
            frame = performance.to_frame().set_index("edges").rename(columns={"faithfulness": "by score"})
            frame["by |score|"] = distance.faithfulness.tolist()
            console.print(f"\nCPR {performance.area:.3f}, CMD {distance.area:.3f}\n")
            console.print(tables.frame_table(frame, "share of edges"))
            write((curve, drawing(distance.plot)))


def dictionaries(model: str, names: Sequence[str]) -> dict[Location, Autoencoder]:
    """Dictionaries by the location that each reads; the embedded model has its own.

    Raises:
        LoadError: one cannot be loaded, does not say what it reads, or is a transcoder.
    """
    if model == "demo" and not names:
        return dict(load_dictionaries())
    found: dict[Location, Autoencoder] = {}
    for name in names:
        where, _, folder = name.rpartition("=")
        coder = load_autoencoder(folder)
        site = Location.parse(where) if where else coder.origin.reads
        if site is None:
            raise LoadError(f"{folder} does not say what it reads: write LOCATION={folder}")
        if coder.origin.writes not in (None, coder.origin.reads):
            raise LoadError(f"{folder} is a transcoder: circuits take nodes of autoencoders")
        found[site] = coder
    return found


def spliced(
    graph: HookGraph, coders: dict[Location, Autoencoder], at: str
) -> tuple[HookGraph, list[Location | AutoencoderGraph]]:
    """The graph with dictionaries, and the ends that locations name: their dictionary, or they themselves."""
    chosen = chosen_locations(graph, at) if at else list(coders) or chosen_locations(graph, _PARTS)
    ends = [AutoencoderGraph(coders[x], x) if x in coders else x for x in chosen]
    return graph.inject(*(x for x in ends if isinstance(x, AutoencoderGraph))), ends


def _below(every: Circuit, size: int) -> float:
    """What the effects of so many nodes exceed; where others have as large a one, theirs do too."""
    effects = [abs(node.effect) for node in every.top(len(every.nodes))]
    return next((effect for effect in effects[size:] if effect < effects[size - 1]), 0.0)


def _tell_circuit(console: Console, found: Circuit, every: Circuit, sizes: SizeCurve, top: int) -> None:
    row = sizes.to_frame().loc[len(found.nodes)]
    at_random = f", of random nodes {row['random']:.3f}" if "random" in row else ""
    console.print(
        f"\nCircuit of {len(found.nodes)} of {len(every.nodes)} nodes that have an effect, "
        f"{found.edges.count} edges, {found.edges.examples} pairs, {sizes.ablation} ablation\n"
        f"faithfulness {row['faithfulness']:.3f}{at_random}; completeness {row['completeness']:.3f}\n"
    )
    console.print(tables.ranking_table(found.top(top)))
    console.print()
    _tell_edges(console, found.edges.top(top))


def _tell_edges(console: Console, found: list[Edge]) -> None:
    console.print(tables.frame_table(frame_of(found).set_index("source"), "source"))
