"""`steering_vector`: the mean difference of activations over pairs, and the hook that adds it."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.interventions.norms import norm_maps
from hookgraph.algorithms.padding import check_finite, real_tokens
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import chosen_places
from hookgraph.errors import HookGraphError, InputError, LocationError
from hookgraph.graph import storage
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "steering vector"


@final
@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector:
    """A direction at a location.

    `graph.hook(v.location, v.hook(4))` adds four times it; `v.add_to(graph, 4)` is the same.

    Args:
        vector: over the axes of the location less batch and positions.
        location: where it was read, and is added.
        pairs: how many pairs it is the mean of.
        metadata: the model's name, revision and dtype.
        typical: the mean norm of what was read, by which to choose a scale; NaN if not known.
    """

    vector: Float[Tensor, "..."]
    location: Location
    pairs: int
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    typical: float = math.nan

    @property
    def norm(self) -> float:
        """The length of the vector."""
        return float(self.vector.norm())

    def cosine(self, other: "SteeringVector") -> float:
        """The cosine of the angle to another one, such as that of another layer or other pairs.

        Raises:
            HookGraphError: it has another shape.
        """
        a, b = self.vector, other.vector.to(self.vector)
        if a.shape != b.shape:
            raise HookGraphError(
                f"{self.location} and {other.location} have vectors of shapes {tuple(a.shape)} and "
                f"{tuple(b.shape)}: there is no angle between them"
            )
        return float((a * b).sum() / (a.norm() * b.norm()))

    @property
    def coordinates(self) -> Attribution:
        """The vector by coordinate: `.coordinates.top(5)` are its largest ones."""
        return Attribution({self.location: self.vector}, {Dimension.BATCH: "mean", Dimension.POS: "mean"})

    def hook(self, scale: float | int = 1.0) -> Callable[[Tensor], Tensor]:
        """x -> x + scale · vector, at every position."""
        return _Add(self.vector, scale)

    def add_to(self, graph: HookGraph, scale: float | int = 1.0) -> HookGraph:
        """A graph that adds it."""
        return graph.hook(self.location, self.hook(scale))

    def __repr__(self) -> str:
        shape, typical = tuple(self.vector.shape), self.typical
        share = "" if math.isnan(typical) else f" ({self.norm / typical:.0%} of what is there)"
        pairs = f"{self.pairs} pair{'s' * (self.pairs != 1)}"
        return f"SteeringVector at {self.location}: {shape}, norm {self.norm:.4g}{share}, {pairs}"

    def to_frame(self) -> "pandas.DataFrame":
        """One row per coordinate."""
        return self.coordinates.to_frame().rename(columns={"effect": "value"})

    def plot(self) -> "matplotlib.figure.Figure":
        """The norm of each head, or of what has no heads every coordinate, the largest by number.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        if self.vector.ndim > 1:
            return norm_maps({self.location: self.vector}, {self.location: self.location.dims[2:]})
        figure, theme, values = plotting.new_figure(), plotting.LIGHT, self.vector.tolist()
        figure.set_size_inches(7.0, 2.6)
        axes = figure.subplots()
        axes.vlines(range(len(values)), 0, values, color=theme.positive[1], linewidth=0.8)
        for i in self.vector.abs().topk(min(5, len(values))).indices.tolist():
            axes.annotate(str(i), (i, values[i]), fontsize=7.5, color=theme.ink)
        axes.axhline(0.0, color=theme.muted, linewidth=0.5)
        axes.set(xlabel=self.location.dims[-1].replace("_", " "), ylabel="value")
        axes.set_title(repr(self), loc="left", fontsize=9)
        return figure

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{self.coordinates.top(10).to_html()}"

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file."""
        header = {"location": str(self.location), "pairs": self.pairs, "metadata": dict(self.metadata)}
        typical = torch.tensor(self.typical, dtype=torch.float64)
        storage.write(path, _KIND, {"vector": self.vector, "typical": typical}, header)

    @staticmethod
    def load(path: str | Path) -> "SteeringVector":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or not a saved steering vector.
        """
        tensors, header = storage.read(path, _KIND)
        place = storage.parse(path, header["location"])
        typical = float(tensors.get("typical", torch.tensor(math.nan)))
        return SteeringVector(tensors["vector"], place, header["pairs"], header["metadata"], typical)


@final
@dataclass(frozen=True, eq=False)
class _Add:
    vector: Float[Tensor, "..."]
    scale: float | int

    def __call__(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return value + self.scale * self.vector.to(value)


def steering_vector(
    graph: HookGraph,
    pairs: Iterable[tuple[Inputs, Inputs]],
    at: Location,
    *,
    pos: int | None = -1,
    progress: bool | None = None,
) -> SteeringVector:
    """mean over pairs of x(positive) - x(negative) at a location.

    Pairs stream through in batches. The two inputs of a pair may differ in length, and padding, as the
    attention mask tells it, is never read.

    Args:
        graph: the hooked model.
        pairs: batches of (positive, negative) inputs, each with as many examples.
        at: a location with positions, such as `RESID_POST[6]`, or its part, such as some heads.
        pos: the position read, counted among the real tokens of an example; None for their mean.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        InputError: there are no pairs, one is something else, or a batch has more positive than negative
            examples.
        LocationError: `at` is no location.
        HookGraphError: the location has no positions, or an example is too short.
        MetricError: a value is not finite.
        UnknownLocationError: the graph has no such location.

    Source: Turner et al., arXiv:2308.10248; Rimsky et al., arXiv:2312.06681.
    """
    if not isinstance(at, Location):  # pyright: ignore[reportUnnecessaryIsInstance] (users)
        raise LocationError(f"at={at!r}: a steering vector is read at one location, such as RESID_POST[6]")
    place = chosen_places(graph, [at])[0]
    if place.dims[:2] != (Dimension.BATCH, Dimension.POS) or Dimension.POS in dict(place.index):
        raise HookGraphError(f"{place} has no whole axis of positions to read: leave `pos` out of it")
    total: Tensor | None = None
    size, count = 0.0, 0
    with Progress("steering vector", None, shown=progress) as bar:
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:  # pyright: ignore[reportUnnecessaryIsInstance] (users)
                raise InputError(
                    "a batch of pairs is (positive, negative): pass a list of such, [(positive, negative)] "
                    "if there is one"
                )
            first, second = (_read(graph, place, x, pos) for x in pair)
            if len(first) != len(second):
                raise InputError(f"a batch has {len(first)} positive and {len(second)} negative examples")
            difference = first.sum(0) - second.sum(0)
            total = difference if total is None else total + difference
            size += sum(float(x.flatten(1).norm(dim=1).sum()) for x in (first, second)) / 2
            count += len(first)
            bar.advance()
    if total is None:
        raise InputError("there are no pairs: pass an iterable of (positive, negative) batches")
    return SteeringVector(total / count, place, count, graph.binding.metadata, size / count)


def _read(graph: HookGraph, place: Location, inputs: Inputs, pos: int | None) -> Float[Tensor, "batch ..."]:
    """One value per example, in double precision."""
    prepared = graph.binding.prepare(inputs)
    run = graph.run(prepared, save=[place])
    check_finite(run)
    value = run[place].double()
    mask = real_tokens(prepared, value, place.root.type.stack)
    if pos is None:
        weight = mask.to(value).view(*mask.shape, *([1] * (value.ndim - 2)))
        return (value * weight).sum(1) / weight.sum(1)
    lengths = mask.sum(1)
    if not bool(((lengths > pos) & (lengths >= -pos)).all()):
        raise HookGraphError(f"pos={pos} is out of range, an example has {int(lengths.min())} tokens")
    rank = mask.long().cumsum(1) - 1
    wanted = (pos if pos >= 0 else lengths + pos) * torch.ones_like(lengths)
    chosen = (mask & (rank == wanted[:, None])).long().argmax(1)
    return value[torch.arange(len(value), device=value.device), chosen]
