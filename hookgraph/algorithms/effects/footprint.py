"""How much memory a pass takes, measured on one, and how many rows fit into what is allowed."""

import weakref
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hookgraph.algorithms.effects.examples import Examples
from hookgraph.errors import HookGraphError


def rows_at_once(
    batch_size: int, max_memory: int | None, examples: Examples, work: Callable[[Examples], object]
) -> int:
    """How many rows are run at once: `batch_size`, or fewer where these would take more than `max_memory`.

    Raises:
        HookGraphError: one example takes more than `max_memory`.
    """
    return batch_size if max_memory is None else min(batch_size, rows_that_fit(examples, work, max_memory))


def rows_that_fit(examples: Examples, work: Callable[[Examples], object], max_memory: int) -> int:
    """How many examples may be run at once.

    `work` is done for one of them and measured; for all, where they cannot be divided.

    Raises:
        HookGraphError: one example takes more than `max_memory`.
    """
    first = examples.some(range(1)) if examples.divisible else examples
    with Footprint() as footprint:
        work(first)
    fitting = max_memory * len(first) // max(1, footprint.peak)
    if fitting < 1:
        raise HookGraphError(
            f"a pass over one example takes {footprint.peak / len(first) / 2**20:.1f} MiB, and max_memory is "
            f"{max_memory / 2**20:.1f} MiB: allow more, or take shorter inputs or fewer locations"
        )
    return fitting


@final
class Footprint(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        """The most that lived at one time."""
        self._living = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and look at what it made."""
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._count(tensor, given)
        return result

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._known:
            return
        self._known.add(key)
        self._living += size
        self.peak = max(self.peak, self._living)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._living -= size
