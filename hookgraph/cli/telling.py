"""What a command prints to, and how it fails."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import typer
from rich.console import Console
from rich.text import Text
from transformers.utils import logging

from hookgraph.errors import HookGraphError

if TYPE_CHECKING:
    import matplotlib.figure

Writing: TypeAlias = Callable[[Path], object]
"""Writes a file."""


@contextmanager
def told(debug: bool) -> Iterator[None]:
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


def terminal() -> Console:
    """Where results are printed: numbers are not coloured."""
    return Console(highlight=False)


def write(*files: tuple[Path | None, Writing]) -> None:
    """Write the files that are asked for, each into a folder that is made if need be, and tell where."""
    asked = [(path, writing) for path, writing in files if path is not None]
    for i, (path, writing) in enumerate(asked):
        path.parent.mkdir(parents=True, exist_ok=True)
        writing(path)
        terminal().print(Text(f"{path}" if i else f"\n{path}"))


def drawing(plot: "Callable[[], matplotlib.figure.Figure]") -> Writing:
    """A figure that is made and written where it is asked for."""
    return lambda path: plot().savefig(path)
