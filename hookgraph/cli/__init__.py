"""The command line: `hookgraph demo`, `locations`, `check`, `attribute` and the other algorithms."""

import typer

from hookgraph.cli.algorithms import basis, contributions, counterfactuals, profile
from hookgraph.cli.attribution import attribute
from hookgraph.cli.circuits import circuit, edges
from hookgraph.cli.models import check, demo, locations

app = typer.Typer(
    help="Read, edit and attribute any tensor inside a HuggingFace transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_COMMANDS = (
    demo, locations, check, attribute, circuit, edges, contributions, profile, basis, counterfactuals
)  # fmt: skip
for _command in _COMMANDS:
    app.command()(_command)


def main() -> None:
    """Run the command line."""
    app()
