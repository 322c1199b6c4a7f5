"""Hooks for a batch that holds several copies of another, each copy with a change of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

from jaxtyping import Shaped
from torch import Tensor

from hookgraph.ontology.locations import Location

Index: TypeAlias = tuple[int | None, ...]
"""One entry, or all (None), along each axis of a value but the batch."""


@final
@dataclass(frozen=True, eq=False)
class SetEntries:
    """A hook: in its own copies of the batch, an entry has the value that it has in `source`.

    Args:
        placed: the number of a copy, and which entries of it are set.
        source: a value for each example.
    """

    placed: Sequence[tuple[int, Index]]
    source: Shaped[Tensor, "batch ..."]

    def __call__(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The value with these entries."""
        result, batch = value.clone(), len(self.source)
        for copy, index in self.placed:
            rows = slice(copy * batch, (copy + 1) * batch)
            entries = [slice(None) if i is None else i for i in index]
            result[(rows, *entries)] = self.source[(slice(None), *entries)]
        return result


@final
@dataclass(frozen=True, eq=False)
class SetCopies:
    """A hook: some copies of the batch have another value.

    Args:
        copies: their numbers.
        source: a value for each row of the packed batch, or for each example.
        batch: how many examples a copy has.
    """

    copies: Sequence[int]
    source: Shaped[Tensor, "..."]
    batch: int

    def __call__(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The value with these copies."""
        result = value.clone()
        for copy in self.copies:
            rows = slice(copy * self.batch, (copy + 1) * self.batch)
            result[rows] = self.source if len(self.source) == self.batch else self.source[rows]
        return result


@final
@dataclass(frozen=True, eq=False)
class Note:
    """A hook that notes a value as it is when the hook is called, before any later hook."""

    location: Location
    seen: dict[Location, Tensor]

    def __call__(self, value: Shaped[Tensor, "..."]) -> None:
        """Note it."""
        self.seen[self.location] = value.detach().clone()
