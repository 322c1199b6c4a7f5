"""Means of activations over a data set, streamed: what `ablate` puts in place of a location."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.batches import stream_of
from hookgraph.algorithms.interventions.norms import norm, norm_maps
from hookgraph.algorithms.padding import check_aligned, check_finite, weights_at
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import chosen_places
from hookgraph.errors import HookGraphError, InputError, LocationError, nearest
from hookgraph.graph import storage
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.hooks.slicing import read
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "ablation statistics"
MADE_BY = {"mean": "mean_activations", "optimal": "optimal_constants"}
"""What makes the constants of a mode."""
_ALONG = (Dimension.BATCH, Dimension.POS)
Constants = Mapping[Location, Float[Tensor, "..."]]


@final
@dataclass(frozen=True, eq=False, repr=False)
class AblationStatistics:
    """What stands in for locations: means over a data set, and fitted constants.

    Args:
        means: by location, over its axes less the batch; the position axis has size 1 unless means are per
            position.
        counts: how many real tokens (or examples, of locations without positions) each mean is of.
        optimal: the constants that `optimal_constants` fitted.
        seed: of that fit.
        metadata: the model's name, revision and dtype.
    """

    means: Constants
    counts: Constants
    optimal: Constants = field(default_factory=dict[Location, Tensor])
    seed: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def of(self, location: Location, mode: str) -> Float[Tensor, "..."]:
        """The constant of a location: `mean` or `optimal`.

        Raises:
            HookGraphError: there is none.
        """
        found = self.means if mode == "mean" else self.optimal
        whole = location.whole
        if location not in found and whole in found:
            return _part_of(location, found[whole])
        if location not in found:
            near = nearest(str(location), map(str, found))
            raise HookGraphError(f"no {mode} of {location} is known: give it to {MADE_BY[mode]}; {near}")
        return found[location]

    def to_frame(self) -> "pandas.DataFrame":
        """One row per location: of how many values the mean is, its norm, and the same of a fitted constant.

        The norm is that of the whole vector at a position; means per position are averaged.
        """
        import pandas as pd

        rows = [
            {
                "location": str(x),
                "values": int(self.counts[x].max()),
                "norm of the mean": float(norm(mean, x.dims[1:])),
                **self._fitted(x),
            }
            for x, mean in self.means.items()
        ]
        return pd.DataFrame(rows, columns=None if rows else ["location", "values", "norm of the mean"])

    def _fitted(self, location: Location) -> dict[str, float]:
        """Of the constant: its norm, and how far it is from the mean; nothing where none is fitted at all."""
        if not self.optimal:
            return {}
        found = self.optimal.get(location)
        if found is None:
            return {"norm of the constant": math.nan, "apart": math.nan}
        dims, apart = location.dims[1:], found - self.means[location]
        return {"norm of the constant": float(norm(found, dims)), "apart": float(norm(apart, dims))}

    def plot(self, labels: Mapping[str, Sequence[str]] | None = None) -> "matplotlib.figure.Figure":
        """Norms of the means: layers on y, on x heads, or else positions where means are per position.

        Raises:
            HookGraphError: there is nothing to draw, or matplotlib is not installed.
        """
        return norm_maps(self.means, {x: x.dims[1:] for x in self.means}, labels)

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, float_format=lambda x: f"{x:.4g}")

    def __repr__(self) -> str:
        lines = [f"AblationStatistics of {len(self.means)} locations"]
        for place, mean in self.means.items():
            fitted = ", fitted" if place in self.optimal else ""
            lines.append(
                f"  {place}: {tuple(mean.shape)}, {float(self.counts[place].max()):g} values{fitted}"
            )
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        groups = {"means": self.means, "counts": self.counts, "optimal": self.optimal}
        tensors = {f"{name}/{k}": v for name, group in groups.items() for k, v in group.items()}
        order = {name: [str(k) for k in group] for name, group in groups.items()}
        storage.write(path, _KIND, tensors, {**order, "seed": self.seed, "metadata": dict(self.metadata)})

    @staticmethod
    def load(path: str | Path) -> "AblationStatistics":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, not saved statistics, or of locations that are not declared.
        """
        tensors, header = storage.read(path, _KIND)
        means, counts, optimal = (
            {storage.parse(path, text): tensors[f"{name}/{text}"] for text in header[name]}
            for name in ("means", "counts", "optimal")
        )
        return AblationStatistics(means, counts, optimal, header["seed"], header["metadata"])


def mean_activations(
    graph: HookGraph,
    data: Iterable[Inputs],
    at: Sequence[Location],
    *,
    per_position: bool = False,
    progress: bool | None = None,
) -> AblationStatistics:
    """The mean of each location over a data set: Σ values at real tokens / their number.

    Batches stream through; what is kept does not grow with them. Sums are in double precision. Padding, as
    the attention mask tells it, does not count.

    Args:
        graph: the hooked model.
        data: batches of inputs, each as the model takes them.
        at: locations or parts of locations.
        per_position: one mean per position, instead of one over all. Batches may differ in length.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        InputError: there is no data, or it is no stream of batches; or means per position are asked for of
            inputs padded on the left.
        MetricError: a value is not finite.
        LocationError: a location has key positions, of which no mean over inputs of other lengths exists.
        UnknownLocationError: the graph has no such location.

    Source: Wang et al., arXiv:2211.00593 (mean ablation).
    """
    places = chosen_places(graph, at)
    for place in places:
        if Dimension.KEY_POS in place.dims:
            raise LocationError(f"{place} has an axis per key: there is no mean of it; ablate attn.z instead")
    sums: dict[Location, Tensor] = {}
    counts: dict[Location, Tensor] = {}
    with Progress("statistics", None, shown=progress) as bar:
        for batch in stream_of(data):
            inputs = graph.binding.prepare(batch)
            run = graph.run(inputs, save=places)
            check_finite(run)
            for place in places:
                value = run[place].double()
                weight = weights_at(graph, place, value, inputs)
                weight = weight.expand(_counted(place, value))
                axes = [i for i, d in enumerate(place.dims) if d in _ALONG]
                if per_position and Dimension.POS in place.dims:
                    check_aligned(place, inputs)
                    axes = [0]
                _add(sums, place, (value * weight).sum(axes, keepdim=True)[0])
                _add(counts, place, weight.sum(axes, keepdim=True)[0])
            bar.advance()
    if not sums:
        raise InputError("there is no data to take means of: pass an iterable of batches")
    means = {x: sums[x] / counts[x].clamp(min=1) for x in places}
    return AblationStatistics(means, counts, metadata=graph.binding.metadata)


def _part_of(location: Location, constant: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The part of what stands in for a whole location; what stands in at every position does at any."""
    axes = location.type.dims[1:]
    index = {
        d.value: (0 if isinstance(i, int) else slice(None))
        if d is Dimension.POS and constant.shape[axes.index(d)] == 1
        else i
        for d, i in location.index
    }
    return read(location.whole.at(**index), constant[None])[0]


def _counted(place: Location, value: Tensor) -> list[int]:
    """The shape of the weights: 1 along what is neither batch nor position."""
    return [n if d in _ALONG else 1 for d, n in zip(place.dims, value.shape, strict=True)]


def _add(total: dict[Location, Tensor], place: Location, value: Tensor) -> None:
    """Add, padding the shorter of two lengths with zeros."""
    before = total.get(place)
    if before is None or before.shape == value.shape:
        total[place] = value if before is None else before + value
        return
    shape = [max(a, b) for a, b in zip(before.shape, value.shape, strict=True)]
    result = value.new_zeros(shape)
    for part in (before, value):
        result[tuple(slice(n) for n in part.shape)] += part
    total[place] = result


def with_optimal(found: AblationStatistics, constants: Constants, seed: int) -> AblationStatistics:
    """The same statistics with fitted constants."""
    return replace(found, optimal={**found.optimal, **constants}, seed=seed)
