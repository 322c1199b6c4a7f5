"""A progress bar for long work, which says nothing unless asked, or unless the work turns out long."""

import sys
from types import TracebackType
from typing import Any, final

from tqdm.auto import tqdm


@final
class Progress:
    """A bar on the standard error stream: `with Progress("patching", 120) as bar: bar.advance(3)`.

    Args:
        what: what is being done.
        total: of how many pieces.
        shown: True always, False never, None on a terminal once it has taken two seconds.
    """

    def __init__(self, what: str, total: int | None, *, shown: bool | None = None) -> None:
        hidden = not shown if shown is not None else not sys.stderr.isatty()
        delay = 2.0 if shown is None else 0.0
        self._bar: Any = tqdm(desc=what, total=total, disable=hidden, delay=delay, leave=False)

    def advance(self, count: int = 1) -> None:
        """So many pieces more are done."""
        self._bar.update(count)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
