"""How much memory a pass takes, measured on one, and how many rows fit into what is allowed."""

import weakref
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hookgraph.algorithms.effects.examples import batch_of, rows_of
from hookgraph.errors import HookGraphError
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric, ReadingMetric
from hookgraph.ontology.locations import Location


def rows_that_fit(
    graph: HookGraph,
    clean: Inputs,
    metric: Metric,
    places: Sequence[Location],
    max_memory: int,
    batch_size: int,
) -> int:
    """How many examples a pass that keeps the gradients of some places may have: at most `batch_size`.

    One pass over one example is run and measured; over all of them, where they cannot be divided.

    Raises:
        HookGraphError: one example takes more than `max_memory`.
    """
    inputs = graph.binding.prepare(clean)
    count = batch_of(inputs)
    if isinstance(metric, ReadingMetric) and not graph.registrations:
        inputs, metric, rows = rows_of(inputs, slice(0, 1), count), metric.rows(slice(0, 1)), 1
    else:
        rows = count
    with Footprint() as footprint:
        graph.run(inputs, save=[*places, *(x.grad for x in places)], metric=metric, logits=False)
    fitting = max_memory * rows // max(1, footprint.peak)
    if fitting < 1:
        raise HookGraphError(
            f"a pass over one example takes {footprint.peak / rows / 2**20:.1f} MiB, and max_memory is "
            f"{max_memory / 2**20:.1f} MiB: allow more, or take shorter inputs or fewer locations"
        )
    return min(batch_size, fitting)


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
