"""What hooks must know of the pass they are in, such as how many examples it has."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, final

from torch import nn

from hookgraph.binding.running.checkpointing import is_checkpointed
from hookgraph.binding.running.sharing import SharedPast
from hookgraph.binding.tracing.trace import tensors_in
from hookgraph.errors import InputError
from hookgraph.graph.examples import count_examples
from hookgraph.graph.pictures import refuse_uneven


@final
class PassState:
    """What hooks must know of the pass they are in. `enter` is the pre-hook of the whole model."""

    def __init__(self, *, packed: bool = False, batch: int = 0, looks: bool = False) -> None:
        self.number = 0
        self._batch, self._last = 0, batch
        self._packed = packed
        self.counts = False
        """Whether some module is called several times in a pass."""
        self.watches = False
        """Whether the operations of some module are watched."""
        self.aside = False
        """Whether a hook computes something, which is none of the model's own operations."""
        self.past: SharedPast | None = None
        """What gives copies of a batch their past, if they have one between them."""
        self.looks = looks
        """Whether it matters that a backward pass runs parts of the model again."""
        self.recomputed = False
        """Whether some hook is in such a part."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A new pass begins.

        Raises:
            InputError: a stack is looked at that is given other numbers of patches by each example.
        """
        self.number += 1
        first = next(tensors_in((args, kwargs)), None)
        self._batch = 0 if first is None else first.shape[0]
        if self._packed:
            self.begin({**dict(zip(signature(module.forward).parameters, args, strict=False)), **kwargs})

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """What comes belongs to these inputs, also before a pass: `generate` looks at pictures first.

        Raises:
            InputError: as in `enter`.
        """
        self._batch = count_examples(inputs) or self._batch
        if self._packed:
            refuse_uneven(inputs, self._batch)

    def leave(self, *_: Any) -> None:
        """A pass is over, and what runs before the next one is no part of it."""
        self._batch, self._last = 0, self._batch

    @property
    def batch(self) -> int:
        """How many examples the pass has.

        Raises:
            InputError: there is no pass: a stack was run by itself.
        """
        found = self._batch or (self._last if self.looks and is_checkpointed() else 0)
        if not found:
            raise InputError(
                "a stack was run outside of a pass of the whole model, as generate() does with pictures: how "
                "many examples there are is not known; use graph.generate(inputs, ...) or graph.run(inputs)"
            )
        return found

    @property
    def last_batch(self) -> int:
        """How many examples the last pass had that a backward pass may run again; 0 if there is none."""
        return self._batch or self._last
