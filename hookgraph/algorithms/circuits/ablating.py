"""What stands in for nodes that are left out, and the model with some of its nodes only."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final, get_args

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hookgraph.algorithms.batches import PairBatch
from hookgraph.algorithms.copies import finite_metric
from hookgraph.algorithms.interventions.replacements import means_instead, moved
from hookgraph.algorithms.interventions.statistics import AblationStatistics, mean_activations
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import Instead
from hookgraph.errors import HookGraphError, InputError, nearest
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.examples import count_examples, rows_of
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.autoencoder import ERROR
from hookgraph.ontology.locations import Location

Ablation: TypeAlias = Literal["corrupt", "mean", "zero", "resample"]
"""What stands in for a node that is left out: its value in the corrupt input, its mean over the clean inputs,
zero, or its value in another example."""

Errors: TypeAlias = Literal["default", "keep", "remove"]
"""Errors of dictionaries: nodes like any other, all kept, or all left out."""

Masks: TypeAlias = Mapping[Location, Bool[Tensor, "..."]]
"""Which values of each location are kept, over its axes, of size 1 where all are one node."""


@final
@dataclass(frozen=True, eq=False)
class StandIn:
    """What stands in for a node.

    Args:
        ablation: which kind of value.
        statistics: the means, of mean ablation.
        seed: of the permutation of `resample`.
    """

    ablation: Ablation
    statistics: AblationStatistics | None
    seed: int

    @staticmethod
    def of(
        graph: HookGraph,
        every: Sequence[PairBatch],
        places: Sequence[Location],
        ablation: str,
        statistics: AblationStatistics | None,
        seed: int,
    ) -> "StandIn":
        """Take the means that are asked for, unless they are given.

        Raises:
            HookGraphError: an unknown ablation.
        """
        for known in get_args(Ablation):
            if known == ablation:
                means = statistics
                if known == "mean" and statistics is None:
                    means = means_of(graph, [b.clean for b in every], places)
                return StandIn(known, means if known == "mean" else None, seed)
        raise HookGraphError(f"ablation={ablation!r} is unknown: {nearest(ablation, get_args(Ablation))}")

    def inputs(self, graph: HookGraph, batch: PairBatch) -> Inputs | None:
        """The inputs whose values stand in; None where they are no input's.

        Raises:
            InputError: corrupt inputs are asked for, and the batch has none.
            HookGraphError: there is one example, and the value of another is asked for.
        """
        if self.ablation == "corrupt":
            if batch.corrupt is None:
                raise InputError(
                    "corrupt ablation takes values from the corrupt inputs, and a batch has none"
                )
            return batch.corrupt
        if self.ablation != "resample":
            return None
        clean = graph.binding.prepare(batch.clean)
        count = count_examples(clean) or 1
        return rows_of(clean, moved(count, self.seed), count)

    def values(self, graph: HookGraph, batch: PairBatch, places: Sequence[Location]) -> Instead:
        """What a value of a location is replaced by, for one batch."""
        means = means_instead(graph, batch.clean, self.statistics)
        if means is not None:
            return means
        inputs = self.inputs(graph, batch)
        if inputs is None:
            return lambda _, value: torch.zeros_like(value)
        run = graph.run(inputs, save=list(places))
        return lambda place, value: run[place].to(value)


def means_of(graph: HookGraph, data: Sequence[Inputs], places: Sequence[Location]) -> AblationStatistics:
    """Means over inputs, of each position; of all positions where some are padded on the left."""
    try:
        return mean_activations(graph, data, places, per_position=True, progress=False)
    except InputError:  # columns are other positions in each row, as it says
        return mean_activations(graph, data, places, progress=False)


@final
@dataclass(frozen=True, eq=False)
class Ablated:
    """Batches, and the model to be run on them with some nodes only.

    Args:
        graph: the hooked model, with the subgraphs whose nodes are meant.
        every: the batches.
        places: every location that is divided into what is kept and what is not.
        stand_in: what stands in.
        errors: what becomes of errors of dictionaries.
        shapes: of each place, for the first batch.
    """

    graph: HookGraph
    every: Sequence[PairBatch]
    places: Sequence[Location]
    stand_in: StandIn
    errors: Errors
    shapes: Mapping[Location, tuple[int, ...]]

    @staticmethod
    def of(
        graph: HookGraph,
        every: Sequence[PairBatch],
        places: Sequence[Location],
        stand_in: StandIn,
        errors: str,
    ) -> "Ablated":
        """Look at the places once.

        Raises:
            HookGraphError: it is unknown what becomes of errors.
            UnknownLocationError: the graph lacks a place.
        """
        for place in places:
            graph.check(place)
        for known in get_args(Errors):
            if known == errors:
                run = graph.run(every[0].clean, save=list(places))
                shapes = {place: tuple(run[place].shape) for place in places}
                return Ablated(graph, every, places, stand_in, known, shapes)
        raise HookGraphError(f"errors={errors!r} is unknown: {nearest(errors, get_args(Errors))}")

    def masks(self, nodes: Iterable[Location], *, rest: bool = False) -> Masks:
        """What is kept of each place: some nodes, or all others.

        Raises:
            InputError: a node is at a position or has a number that these inputs have not.
        """
        by_place: dict[Location, list[Location]] = {place: [] for place in self.places}
        for node in nodes:
            by_place[node.whole].append(node)
        found: dict[Location, Tensor] = {}
        for place, own in by_place.items():
            if place.type == ERROR and self.errors != "default":
                found[place] = torch.full((1,) * len(place.dims), self.errors == "keep")
            else:
                mask = _mask(place, own, self.shapes[place])
                found[place] = ~mask if rest else mask
        return found

    def measure(
        self, parts: Sequence[Masks | None], *, progress: bool | None = False, label: str = "circuits"
    ) -> list[Float[Tensor, " batch"]]:
        """The metric of the clean inputs with what each of some masks keeps; None keeps everything.

        Encoders run on what the stream is by then, ablations before them included.
        """
        values: list[list[Tensor]] = [[] for _ in parts]
        with Progress(label, len(parts) * len(self.every), shown=progress) as bar:
            for batch in self.every:
                other = self.stand_in.values(self.graph, batch, self.places)
                for found, masks in zip(values, parts, strict=True):
                    graph = self.graph
                    for place, mask in ({} if masks is None else masks).items():
                        graph = graph.hook(place, _Keep(place, mask, other))
                    found.append(finite_metric(graph.run(batch.clean, metric=batch.metric, logits=False)))
                    bar.advance()
        return [torch.cat(found) for found in values]


@final
@dataclass(frozen=True, eq=False)
class _Keep:
    """A hook: values that are kept, and what stands in for the others."""

    place: Location
    kept: Bool[Tensor, "..."]
    other: Instead

    def __call__(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return torch.where(self.kept.to(value.device), value, self.other(self.place, value))


def _mask(place: Location, own: Sequence[Location], sizes: tuple[int, ...]) -> Bool[Tensor, "..."]:
    """Which values of a location some of its nodes are."""
    named = {d for node in own for d, _ in node.index}
    mask = torch.zeros([n if d in named else 1 for d, n in zip(place.dims, sizes, strict=True)]).bool()
    for node in own:
        index = dict(node.index)
        try:
            mask[tuple(index.get(d, 0) for d in place.dims)] = True  # pyright: ignore[reportArgumentType] (numbers)
        except IndexError as error:
            raise InputError(f"{node} lies outside of these inputs, where {place} has {sizes}") from error
    return mask
