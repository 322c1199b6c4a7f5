"""What a command prints to, and how it fails."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text
from transformers.utils import logging

from hookgraph.errors import HookGraphError


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
