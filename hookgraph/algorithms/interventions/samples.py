"""`sample_activations`: values drawn from a data set, which `ablate` puts in place of a location."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.algorithms.arguments import whole_number
from hookgraph.algorithms.batches import stream_of
from hookgraph.algorithms.interventions.norms import norm, norm_maps, without_padding
from hookgraph.algorithms.interventions.replacements import Drawn
from hookgraph.algorithms.padding import check_finite, real_tokens, weights_at
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import chosen_places
from hookgraph.errors import HookGraphError, InputError, LocationError, nearest
from hookgraph.graph import storage
from hookgraph.graph.abstract import Inputs, Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "activation samples"
_LENGTHS = "lengths/"


@final
@dataclass(frozen=True, eq=False, repr=False)
class ActivationSamples:
    """Values of locations, drawn from a data set: the i-th of every location are of the same pass.

    Args:
        values: by location: samples, over the axes less batch, and less positions if they are of tokens.
        per_position: whether a sample is a whole example, or a single token.
        seen: of how many examples or tokens they were drawn.
        seed: of the draw.
        metadata: the model's name, revision and dtype.
        lengths: of whole examples, by location: how many tokens each has; the rest of its positions is 0.
    """

    values: Mapping[Location, Float[Tensor, "..."]]
    per_position: bool
    seen: int
    seed: int
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    lengths: Mapping[Location, Int[Tensor, " batch"]] = field(default_factory=dict[Location, Tensor])

    def hook(self, location: Location, seed: int) -> Drawn:
        """The hook that puts samples in place of a location.

        Raises:
            HookGraphError: it was not sampled.
        """
        if location not in self.values:
            near = nearest(str(location), map(str, self.values))
            raise HookGraphError(f"{location} was not sampled: give it to sample_activations; {near}")
        lengths = self.lengths.get(location)
        return Drawn(location, self.values[location], self.per_position, seed, lengths)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per location: how many samples, their norm, and the norm of their mean.

        The norm is that of the whole vector at a position; positions of whole examples are averaged. The
        closer the mean is to it, the less there is in which examples differ.
        """
        import pandas as pd

        rows: list[dict[str, object]] = []
        for place, value in self._told().items():
            dims = self._dims(place)
            mean = norm(value.nanmean(0), dims[1:])
            sizes = {"norm": float(norm(value, dims)), "norm of the mean": float(mean)}
            rows.append({"location": str(place), "samples": len(value), **sizes})
        return pd.DataFrame(rows)

    def plot(self, labels: Mapping[str, Sequence[str]] | None = None) -> "matplotlib.figure.Figure":
        """Norms of the samples: layers on y, on x heads, or else positions of whole examples.

        Raises:
            HookGraphError: there is nothing to draw, or matplotlib is not installed.
        """
        return norm_maps(self._told(), {x: self._dims(x) for x in self.values}, labels)

    def _dims(self, location: Location) -> tuple[Dimension, ...]:
        """The axes of the samples of a location."""
        return tuple(d for d in location.dims if self.per_position or d is not Dimension.POS)

    def _told(self) -> dict[Location, Float[Tensor, "..."]]:
        """The samples, with NaN behind the last token of each."""
        return {
            x: without_padding(v, self.lengths[x], x.dims.index(Dimension.POS)) if x in self.lengths else v
            for x, v in self.values.items()
        }

    def _repr_html_(self) -> str:
        told = f"<p>{escape(repr(self).splitlines()[0])}</p>"
        return told + self.to_frame().to_html(index=False, float_format=lambda x: f"{x:.4g}")

    def __repr__(self) -> str:
        kind = "examples" if self.per_position else "tokens"
        lines = [f"ActivationSamples of {len(self.values)} locations, drawn of {self.seen} {kind}"]
        return "\n".join([*lines, *(f"  {k}: {tuple(v.shape)}" for k, v in self.values.items())])

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        header = {
            "order": [str(x) for x in self.values],
            "per_position": self.per_position,
            "seen": self.seen,
            "seed": self.seed,
            "metadata": dict(self.metadata),
        }
        tensors = {str(k): v for k, v in self.values.items()}
        tensors |= {f"{_LENGTHS}{k}": v for k, v in self.lengths.items()}
        storage.write(path, _KIND, tensors, header)

    @staticmethod
    def load(path: str | Path) -> "ActivationSamples":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or not saved samples.
        """
        tensors, header = storage.read(path, _KIND)
        values = {storage.parse(path, text): tensors[text] for text in header["order"]}
        told = {name: header[name] for name in ("per_position", "seen", "seed", "metadata")}
        lengths = {x: tensors[name] for x in values if (name := f"{_LENGTHS}{x}") in tensors}
        return ActivationSamples(values, **told, lengths=lengths)


def sample_activations(
    graph: HookGraph,
    data: Iterable[Inputs],
    at: Sequence[Location],
    *,
    count: int = 256,
    per_position: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> ActivationSamples:
    """`count` values of each location, drawn without replacement from a data set, each as likely as another.

    Batches stream through; what is kept does not grow with them. Padding, as the attention mask tells it,
    is not drawn.

    Args:
        graph: the hooked model.
        data: batches of inputs, each as the model takes them.
        at: locations or parts of locations; the same examples or tokens are drawn for all of them.
        count: how many; all of them where there are fewer.
        per_position: draw whole examples, which keeps positions where they are: the third token of one
            stands in for the third of another, on whichever side they are padded. By default single tokens,
            from any position.
        seed: of the draw.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        InputError: there is no data, or it is no stream of batches; or whole examples of a location with key
            positions are padded or differ in length.
        HookGraphError: `count` is no positive number.
        LocationError: tokens are drawn, and a location has no positions, or key positions.
        MetricError: a value is not finite.
        UnknownLocationError: the graph has no such location.

    Source: Chan et al., "Causal scrubbing" (2022).
    """
    count = whole_number("count", count)
    places = chosen_places(graph, at)
    for place in places if not per_position else ():
        if place.dims[:2] != (Dimension.BATCH, Dimension.POS) or dict(place.index).get(Dimension.POS):
            raise LocationError(f"{place} has no token each: draw whole examples, with per_position=True")
    generator = torch.Generator().manual_seed(seed)
    kept: dict[Location, _Rows] = {}
    lots, seen = torch.zeros(0, dtype=torch.float64), 0
    with Progress("sampling", None, shown=progress) as bar:
        for batch in stream_of(data):
            rows = _drawable(graph, batch, places, per_position=per_position)
            new = torch.rand(len(rows[places[0]].values), generator=generator, dtype=torch.float64)
            seen += len(new)
            order = torch.cat([lots, new]).sort(descending=True, stable=True)
            lots, chosen = order.values[:count], order.indices[:count]
            for place, found in rows.items():
                pool = kept[place].and_more(found, place) if place in kept else found
                kept[place] = pool.some(chosen)
            bar.advance()
    if not kept:
        raise InputError("there is no data to draw from: pass an iterable of batches")
    values = {x: rows.values for x, rows in kept.items()}
    lengths = {x: rows.lengths for x, rows in kept.items() if rows.lengths is not None}
    return ActivationSamples(values, per_position, seen, seed, graph.binding.metadata, lengths)


@final
@dataclass(frozen=True, eq=False, slots=True)
class _Rows:
    """What can be drawn: examples, each from its first token on, or tokens."""

    values: Float[Tensor, "..."]
    lengths: Int[Tensor, " batch"] | None = None
    """How many tokens each example has, where it has positions."""

    def some(self, chosen: Int[Tensor, "..."]) -> "_Rows":
        here = chosen.to(self.values.device)
        return _Rows(self.values[here], None if self.lengths is None else self.lengths[here])

    def and_more(self, other: "_Rows", place: Location) -> "_Rows":
        """Both, the shorter ones filled with zeros.

        Raises:
            InputError: they differ in length, and have keys.
        """
        parts = [self.values, other.values]
        if self.lengths is None or other.lengths is None:
            if parts[0].shape[1:] != parts[1].shape[1:]:
                raise _uneven(place)
            return _Rows(torch.cat(parts))
        axis = place.dims.index(Dimension.POS)
        most = max(v.shape[axis] for v in parts)
        after = [0, 0] * (len(place.dims) - 1 - axis)
        parts = [torch.nn.functional.pad(v, [*after, 0, most - v.shape[axis]]) for v in parts]
        return _Rows(torch.cat(parts), torch.cat([self.lengths, other.lengths]))


def _drawable(
    graph: HookGraph, batch: Inputs, places: Sequence[Location], *, per_position: bool
) -> dict[Location, _Rows]:
    """What can be drawn from a batch: its examples, or its real tokens.

    Raises:
        InputError: whole examples of a location with keys are padded.
    """
    inputs = graph.binding.prepare(batch)
    run = graph.run(inputs, save=places)
    check_finite(run)
    if not per_position:
        return {x: _Rows(v[real_tokens(inputs, v, x.root.type.stack)]) for x, v in run.items()}
    return {x: _examples(graph, x, v, inputs) for x, v in run.items()}


def _examples(graph: HookGraph, place: Location, value: Float[Tensor, "..."], inputs: Prepared) -> _Rows:
    """Whole examples, each from its first token on, on whichever side it is padded."""
    if Dimension.KEY_POS in place.dims or not Drawn(place, value, per_position=True, seed=0).by_token:
        if not bool(weights_at(graph, place, value, inputs).all()):
            raise _uneven(place)
        return _Rows(value)
    axis = place.dims.index(Dimension.POS)
    value = value.movedim(axis, 1)
    real = real_tokens(inputs, value, place.root.type.stack)
    columns = (~real).long().sort(dim=1, stable=True).indices
    rows = torch.arange(len(value), device=value.device)[:, None]
    found = value[rows, columns]
    found = found * real[rows, columns].view(*real.shape, *([1] * (value.ndim - 2)))
    return _Rows(found.movedim(1, axis), real.sum(1))


def _uneven(place: Location) -> InputError:
    return InputError(
        f"whole examples of {place} are drawn from inputs of one length without padding: pass such, or draw "
        "single tokens, with per_position=False"
    )
