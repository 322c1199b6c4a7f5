"""Commands about a model: a demonstration, its locations, what was proven of them."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from hookgraph.binding import Family, bind
from hookgraph.binding.binding import check as check_all
from hookgraph.binding.loading import load_model
from hookgraph.binding.resolving.examples import example_inputs
from hookgraph.cli.arguments import Debug, Model, chosen_layers, place
from hookgraph.cli.telling import terminal, told
from hookgraph.demo.telling import tell
from hookgraph.errors import LocationError
from hookgraph.graph.conformance import ConformanceReport
from hookgraph.report import breakdown, tables


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write the page and the map to.")] = Path(
        "hookgraph-demo"
    ),
    everything: Annotated[
        bool, typer.Option("--all", help="Every algorithm, with a figure each; under two minutes.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Attribute, check, steer and report on a small model that ships with hookgraph."""
    with told(debug):
        tell(terminal(), out, everything=everything)


def locations(
    model: Model,
    layers: Annotated[str, typer.Option(help="Which layers, such as 0-3 or 0,5.")] = "",
    debug: Debug = False,
) -> None:
    """What can be hooked in a model, with shapes, and why other locations are absent."""
    with told(debug):
        wanted = chosen_layers(layers)
        loaded = load_model(place(model))
        graph = bind(loaded)
        chosen = [x for x in graph.locations if not wanted or x.layer in wanted]
        if not chosen:
            raise LocationError(f"--layers {layers}: this model has no such layer")
        run = graph.run(example_inputs(loaded), save=chosen)
        console = terminal()
        console.print(tables.locations_table({k: tuple(v.shape) for k, v in run.items()}))
        if _only(graph.report, wanted).absent:
            console.print()
            console.print(tables.absent_table(_only(graph.report, wanted)))


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
    with told(debug):
        record = None if family is None else Family.read(family)
        graph = bind(load_model(place(model)), check=not full, family=record, cached=False)
        report = check_all(graph) if full else graph.report
        if json:
            typer.echo(report.to_json())
        else:
            console = terminal()
            console.print(tables.conformance_table(report))
            console.print()
            console.print(tables.mechanisms_table(report))
            for some, table in (
                (report.failures, tables.failures_table),
                (report.gaps, tables.unchecked_table),
                (report.absent, tables.absent_table),
            ):
                if some:
                    console.print()
                    console.print(table(report))
            console.print(Text(f"\n{breakdown.verdict(report)}"))
        if not report.ok:
            raise typer.Exit(1)


def _only(report: ConformanceReport, layers: frozenset[int]) -> ConformanceReport:
    """A report of what is absent in some layers; in all of them if none is named."""
    return replace(report, absent={k: v for k, v in report.absent.items() if not layers or k.layer in layers})
