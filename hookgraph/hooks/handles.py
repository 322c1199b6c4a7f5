"""Handles of whatever is installed on a model: each removed exactly once, also on error."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Handle(Protocol):
    """Something installed that can be taken away, such as PyTorch's `RemovableHandle`."""

    def remove(self) -> None:
        """Take it away."""


@contextmanager
def installed(*installers: Callable[[], Handle]) -> Generator[None]:
    """Install in order; on leaving remove in reverse order, each exactly once.

    If an installer raises, what was installed before it is removed; if a removal raises, the
    others are still carried out and the error is raised after them.
    """
    handles: list[Handle] = []
    try:
        for install in installers:
            handles.append(install())
        yield
    finally:
        _remove(handles)


def _remove(handles: list[Handle]) -> None:
    """Remove from the last to the first. There can be hundreds: an `ExitStack` takes as long as they do."""
    try:
        while handles:
            handles.pop().remove()
    finally:
        if handles:
            _remove(handles)
