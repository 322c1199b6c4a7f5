"""`sample_activations`: values drawn from a data set, which `ablate` puts in place of a location."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.arguments import whole_number
from hookgraph.algorithms.interventions.replacements import Drawn
from hookgraph.algorithms.padding import check_finite, real_tokens, weights_at
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import chosen_places
from hookgraph.errors import HookGraphError, InputError, LocationError, nearest
from hookgraph.graph import storage
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

_KIND = "activation samples"


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
    """

    values: Mapping[Location, Float[Tensor, "..."]]
    per_position: bool
    seen: int
    seed: int
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def hook(self, location: Location, seed: int) -> Drawn:
        """The hook that puts samples in place of a location.

        Raises:
            HookGraphError: it was not sampled.
        """
        if location not in self.values:
            near = nearest(str(location), map(str, self.values))
            raise HookGraphError(f"{location} was not sampled: give it to sample_activations; {near}")
        return Drawn(location, self.values[location], self.per_position, seed)

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
        storage.write(path, _KIND, {str(k): v for k, v in self.values.items()}, header)

    @staticmethod
    def load(path: str | Path) -> "ActivationSamples":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or not saved samples.
        """
        tensors, header = storage.read(path, _KIND)
        values = {storage.parse(path, text): tensors[text] for text in header["order"]}
        told = (header[name] for name in ("per_position", "seen", "seed", "metadata"))
        return ActivationSamples(values, *told)


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
        per_position: draw whole examples, which keeps positions where they are and takes inputs of one
            length without padding. By default single tokens, from any position.
        seed: of the draw.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        InputError: there is no data, or whole examples are padded or differ in length.
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
    kept: dict[Location, Tensor] = {}
    lots, seen = torch.zeros(0, dtype=torch.float64), 0
    with Progress("sampling", None, shown=progress) as bar:
        for batch in data:
            rows = _rows(graph, batch, places, kept, per_position=per_position)
            new = torch.rand(len(rows[places[0]]), generator=generator, dtype=torch.float64)
            seen += len(new)
            order = torch.cat([lots, new]).sort(descending=True, stable=True)
            lots, chosen = order.values[:count], order.indices[:count]
            for place, found in rows.items():
                pool = torch.cat([kept[place], found]) if place in kept else found
                kept[place] = pool[chosen.to(pool.device)]
            bar.advance()
    if not kept:
        raise InputError("there is no data to draw from: pass an iterable of batches")
    return ActivationSamples(kept, per_position, seen, seed, graph.binding.metadata)


def _rows(
    graph: HookGraph,
    batch: Inputs,
    places: Sequence[Location],
    kept: Mapping[Location, Tensor],
    *,
    per_position: bool,
) -> dict[Location, Float[Tensor, "..."]]:
    """What can be drawn from a batch: its examples, or its real tokens.

    Raises:
        InputError: whole examples are padded, or differ in length from those before.
    """
    inputs = graph.binding.prepare(batch)
    run = graph.run(inputs, save=places)
    check_finite(run)
    if not per_position:
        return {x: v[real_tokens(inputs, v, x.root.type.stack)] for x, v in run.items()}
    for place, value in run.items():
        padded = not bool(weights_at(graph, place, value, inputs).all())
        if padded or (place in kept and kept[place].shape[1:] != value.shape[1:]):
            raise InputError(
                "whole examples are drawn from inputs of one length without padding: pass such, or draw "
                "single tokens, with per_position=False"
            )
    return dict(run)
