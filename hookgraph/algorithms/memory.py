"""Work in pieces that fit in memory: where one does not, it is halved."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from hookgraph.errors import MemoryLimitError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_pieces(
    items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], Result]
) -> Iterator[tuple[Sequence[Item], Result]]:
    """`work` on consecutive pieces of at most `size` items, with the items of each.

    A piece that does not fit in memory is halved, and so are all after it. What was yielded before is
    not repeated.

    Raises:
        MemoryLimitError: a single item does not fit.
    """
    done = 0
    while done < len(items):
        piece = items[done : done + size]
        try:
            result = work(piece)
        except (RuntimeError, MemoryError, MemoryLimitError) as error:
            # Work in pieces itself, it may fit with fewer items around it.
            if not is_out_of_memory(error) or (len(piece) == 1 and isinstance(error, MemoryLimitError)):
                raise
            if len(piece) == 1:
                raise MemoryLimitError(
                    "out of memory with the smallest batch that can be run: use fewer examples at once, "
                    f"shorter inputs or fewer locations ({error})"
                ) from error
            size = (len(piece) + 1) // 2
            release()
            continue
        yield piece, result
        done += len(piece)


def if_it_fits(work: Callable[[], Result]) -> Result | None:
    """What some work gives; None where it does not fit in memory."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted, on an accelerator or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, MemoryLimitError)):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


def release() -> None:
    """Give cached blocks back, so that smaller pieces may be allocated in their place."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
