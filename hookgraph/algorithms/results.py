"""`PatchingEffect`: how much each node matters, with named axes and the conventions it rests on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, final, overload

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.errors import HookGraphError, LocationError, nearest
from hookgraph.graph import storage
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "patching effect"

Effects = Mapping[Location, Float[Tensor, "..."]]
Remeasure = Callable[[Sequence[Location]], Float[Tensor, "... batch"]]
"""Exact effects of nodes, each a part of a location."""


@final
@dataclass(frozen=True, slots=True)
class Convention:
    """What was computed, so that numbers of different origin are not compared by mistake."""

    method: str
    sign: str = "corrupt - clean"
    ablation: str = "corrupt"
    quadrature: str = ""
    steps: int = 0
    splice_gradient: str = "identity"


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
        return self.to_frame().to_html(float_format=lambda x: f"{x:+.4f}")


@final
@dataclass(frozen=True, eq=False, repr=False)
class PatchingEffect:
    """How much each node matters for a metric.

    Args:
        effects: by location, over its axes less those that were reduced.
        deltas: corrupt - clean, by location.
        grads: the gradients that were used, by location; empty for exact patching.
        total_effect: m(corrupt) - m(clean) per example; None without a corrupt input.
        residuals: per location and example, Σ effects - [m(clean | site := corrupt) - m(clean)].
        convention: what was computed, and how.
        reduced: what was done to an axis that is gone: `sum` or `mean`.
        metadata: the model's name, revision and dtype.
    """

    effects: Effects
    deltas: Effects
    grads: Effects
    total_effect: Float[Tensor, " batch"] | None
    convention: Convention
    residuals: Effects = field(default_factory=dict[Location, Tensor])
    reduced: Mapping[Dimension, str] = field(default_factory=dict[Dimension, str])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    _remeasure: Remeasure | None = None

    def dims(self, location: Location) -> tuple[Dimension, ...]:
        """The axes that the effects at a location still have."""
        return tuple(d for d in location.dims if d not in self.reduced)

    def sum(self, *dims: str) -> "PatchingEffect":
        """Effects summed over axes, by name: `.sum("pos", "d_head")`."""
        return self._reduce("sum", dims)

    def mean(self, *dims: str) -> "PatchingEffect":
        """Effects averaged over axes, by name: `.mean("batch")`."""
        return self._reduce("mean", dims)

    def _reduce(self, how: str, dims: Sequence[str]) -> "PatchingEffect":
        known = {d for location in self.effects for d in self.dims(location)}
        for dim in dims:
            if dim not in known:
                raise LocationError(f"these effects have no axis {dim!r}: {nearest(dim, known)}")
        chosen = [Dimension(d) for d in dims]
        effects: dict[Location, Tensor] = {}
        for location, effect in self.effects.items():
            axes = [i for i, d in enumerate(self.dims(location)) if d in chosen]
            reduce = torch.sum if how == "sum" else torch.mean
            effects[location] = reduce(effect, dim=axes) if axes else effect
        reduced = {**self.reduced, **dict.fromkeys(chosen, how)}
        return replace(self, effects=effects, reduced=reduced)

    def nodes(self) -> Iterator[Node]:
        """Every node: each location, indexed along the axes that the effects still have."""
        for location, effect in self.effects.items():
            dims = self.dims(location)
            for place in torch.cartesian_prod(*map(torch.arange, effect.shape)).view(-1, effect.ndim):
                index = dict(zip(dims, place.tolist(), strict=True))
                yield Node(_part(location, index), float(effect[tuple(place)]))

    def top(self, k: int = 10) -> Ranking:
        """The k nodes with the largest |effect|. Reduce axes first to say what a node is."""
        ranked: list[tuple[float, Location, tuple[int, ...]]] = []
        for location, effect in self.effects.items():
            flat = effect.flatten()
            for place in flat.abs().topk(min(k, flat.numel())).indices.tolist():
                index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), effect.shape))
                ranked.append((float(flat[place]), location, index))
        ranked.sort(key=lambda item: -abs(item[0]))
        return Ranking(
            tuple(
                Node(_part(loc, dict(zip(self.dims(loc), index, strict=True))), effect)
                for effect, loc, index in ranked[:k]
            )
        )

    def check(self, top: int = 10) -> Ranking:
        """The top nodes, each measured exactly as well: patched alone into the clean run.

        Raises:
            HookGraphError: the result was loaded from a file, or an axis other than the batch was averaged.
        """
        if self._remeasure is None:
            raise HookGraphError("a loaded result cannot be checked: it does not hold the model")
        averaged = [d.value for d, how in self.reduced.items() if how == "mean" and d != Dimension.BATCH]
        if averaged:
            raise HookGraphError(
                f"a mean over {', '.join(averaged)} is no node that can be patched: use .sum"
            )
        ranking = self.top(top)
        measured = self._remeasure([_without_batch(n.location) for n in ranking])
        how = self.reduced.get(Dimension.BATCH)
        nodes: list[Node] = []
        for node, per_example in zip(ranking, measured, strict=True):
            example = dict(node.location.index).get(Dimension.BATCH)
            if isinstance(example, int):
                exact = per_example[example]
            else:
                exact = per_example.mean() if how == "mean" else per_example.sum()
            nodes.append(replace(node, exact=float(exact)))
        return Ranking(tuple(nodes))

    def to_frame(self) -> "pandas.DataFrame":
        """One row per node: location, its indices, and the effect."""
        import pandas as pd

        rows = [
            {
                "location": str(n.location.whole),
                **{d.value: i for d, i in n.location.index},
                "effect": n.effect,
            }
            for n in self.nodes()
        ]
        return pd.DataFrame(rows)

    def plot(self, labels: Mapping[str, Sequence[str]] | None = None) -> "matplotlib.figure.Figure":
        """A map per kind of location: layers on y, the one axis that is left on x, colours centred at 0.

        `effect.mean("batch").sum("pos", "d_head").plot()` is the head x layer map; after
        `.sum("d_model")` instead, `labels={"pos": tokens}` names the positions.

        Raises:
            HookGraphError: more than one axis is left, labels are missing, or matplotlib is.
        """
        axes = {location: self.dims(location) for location in self.effects}
        return plotting.draw(plotting.layer_maps(self.effects, axes, labels), figure=plotting.new_figure())

    def __repr__(self) -> str:
        total = "" if self.total_effect is None else f", total effect {float(self.total_effect.mean()):+.4f}"
        return f"{self.convention.method} over {len(self.effects)} locations{total}\n{self.top(8)!r}"

    def _repr_html_(self) -> str:
        return self.top(20)._repr_html_()

    def save(self, path: str | Path) -> None:
        """Write effects, deltas, gradients, residuals and conventions to a safetensors file."""
        groups = {
            "effects": self.effects,
            "deltas": self.deltas,
            "grads": self.grads,
            "residuals": self.residuals,
        }
        tensors = {f"{name}/{place}": v for name, group in groups.items() for place, v in group.items()}
        if self.total_effect is not None:
            tensors["total_effect"] = self.total_effect
        header = {
            "order": {name: [str(x) for x in group] for name, group in groups.items()},
            "convention": asdict(self.convention),
            "reduced": dict(self.reduced),
            "metadata": dict(self.metadata),
        }
        storage.write(path, _KIND, tensors, header)

    @staticmethod
    def load(path: str | Path) -> "PatchingEffect":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or not a saved effect.
        """
        tensors, header = storage.read(path, _KIND)
        groups = {
            name: {Location.parse(text): tensors[f"{name}/{text}"] for text in texts}
            for name, texts in header["order"].items()
        }
        return PatchingEffect(
            groups["effects"],
            groups["deltas"],
            groups["grads"],
            tensors.get("total_effect"),
            Convention(**header["convention"]),
            groups["residuals"],
            {Dimension(d): how for d, how in header["reduced"].items()},
            header["metadata"],
        )


def _ranks(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The rank of each number within its row; equal numbers share the mean of their ranks."""
    less = (values[..., None] > values[..., None, :]).sum(-1)
    equal = (values[..., None] == values[..., None, :]).sum(-1)
    return less + (equal - 1) / 2


def _part(location: Location, index: Mapping[Dimension, int]) -> Location:
    """A node as a part of its location, in the location's own coordinates.

    An effect over a location that was indexed by a list or a slice counts from 0 within that choice.
    """
    chosen = dict(location.index)
    absolute: dict[str, int] = {}
    for dim, i in index.items():
        part = chosen.get(dim)
        if isinstance(part, tuple):
            absolute[dim.value] = part[i]
        elif isinstance(part, slice):
            absolute[dim.value] = (part.start or 0) + i * (part.step or 1)
        else:
            absolute[dim.value] = i
    return location.at(**absolute)


def _without_batch(location: Location) -> Location:
    return replace(location, index=tuple(p for p in location.index if p[0] != Dimension.BATCH))
