"""Rankings: nodes with their effects, the most important first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final, overload

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.errors import HookGraphError
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import pandas


@final
@dataclass(frozen=True, slots=True)
class Node:
    """A part of a location and its effect."""

    location: Location
    effect: float
    exact: float | None = None
    """The effect measured by patching this node alone, if it was."""


@final
@dataclass(frozen=True, slots=True, repr=False)
class Ranking(Sequence[Node]):
    """Nodes, the most important first. Prints as a table."""

    nodes: tuple[Node, ...]

    @overload
    def __getitem__(self, index: int) -> Node: ...
    @overload
    def __getitem__(self, index: slice) -> "Ranking": ...
    def __getitem__(self, index: int | slice) -> "Node | Ranking":
        return Ranking(self.nodes[index]) if isinstance(index, slice) else self.nodes[index]

    def __len__(self) -> int:
        return len(self.nodes)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per node: location, effect, and the exact effect where it was measured."""
        import pandas as pd

        rows = [{"location": str(n.location), "effect": n.effect, "exact": n.exact} for n in self.nodes]
        frame = pd.DataFrame(rows, columns=["location", "effect", "exact"])
        return frame if any(n.exact is not None for n in self.nodes) else frame.drop(columns="exact")

    @property
    def spread(self) -> float:
        """The largest |estimate - exact| among the nodes that were measured exactly.

        Raises:
            HookGraphError: none was.
        """
        gaps = [abs(n.effect - n.exact) for n in self.nodes if n.exact is not None]
        if not gaps:
            raise HookGraphError("no node of this ranking was measured exactly: use .check(top=...)")
        return max(gaps)

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of estimate and exact effect; NaN where either is constant.

        Raises:
            HookGraphError: fewer than two nodes were measured exactly.
        """
        pairs = [(n.effect, n.exact) for n in self.nodes if n.exact is not None]
        if len(pairs) < 2:
            raise HookGraphError("fewer than two nodes were measured exactly: use .check(top=...)")
        return float(torch.corrcoef(_ranks(torch.tensor(pairs, dtype=torch.float64).T))[0, 1])

    def __repr__(self) -> str:
        return self.to_frame().to_string(float_format=lambda x: f"{x:+.4f}")

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self) -> str:
        """The table as HTML."""
        return self.to_frame().to_html(float_format=lambda x: f"{x:+.4f}")


def _ranks(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The rank of each number within its row; equal numbers share the mean of their ranks."""
    less = (values[..., None] > values[..., None, :]).sum(-1)
    equal = (values[..., None] == values[..., None, :]).sum(-1)
    return less + (equal - 1) / 2
