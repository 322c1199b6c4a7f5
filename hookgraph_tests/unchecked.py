"""Call the library as a user's process does: without the runtime type checks of the test run."""

from collections.abc import Generator
from contextlib import contextmanager

from jaxtyping import config


@contextmanager
def unchecked() -> Generator[None]:
    """Within this context wrongly typed arguments reach the code, whose own message is tested."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)
