"""What ablation puts in the place of a location: hooks, one kind each."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hookgraph.algorithms.interventions.statistics import AblationStatistics
from hookgraph.algorithms.sites import Instead
from hookgraph.errors import HookGraphError, ShapeMismatchError
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.hooks.positions import ByPosition, Placed, is_placed
from hookgraph.hooks.slicing import read, write
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location


def moved(count: int, seed: int) -> Int[Tensor, " batch"]:
    """A random permutation of `count` examples, all in one cycle, so that none stays (Sattolo's algorithm).

    Raises:
        HookGraphError: there are fewer than two.
    """
    if count < 2:
        raise HookGraphError(
            f"resampling takes another example's value, and the batch has {count}: pass two, or draw from a "
            "data set, with statistics=sample_activations(graph, data, at)"
        )
    generator = torch.Generator().manual_seed(seed)
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = int(torch.randint(i, (1,), generator=generator))
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order)


@final
@dataclass(frozen=True, slots=True)
class Shuffled:
    """x[b] -> x[σ(b)] of the same pass, σ drawn from `seed` for the size of the batch.

    Padding is nobody's value: where row σ(b) has no token at a position, the next row of the cycle gives one.

    Args:
        location: what is resampled; its positions, if it has some, are told apart.
        seed: of the draw.
    """

    location: Location
    seed: int

    @staticmethod
    def of(place: Location, seed: int) -> "Shuffled":
        """For a place: one position is a list of one, so that the value keeps the axis."""
        if Dimension.POS not in place.type.dims:
            return Shuffled(place, seed)
        told = dict(place.index)
        for dim in (Dimension.POS, Dimension.KEY_POS):
            if dim in place.dims:
                told.setdefault(dim, slice(0, None))
        pos = told[Dimension.POS]
        told[Dimension.POS] = (pos,) if isinstance(pos, int) else pos
        return Shuffled(place.whole.at(**{d.value: i for d, i in told.items()}), seed)

    def __call__(self, value: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "batch ..."]:
        """The value of other examples."""
        return value[moved(len(value), self.seed).to(value.device)]

    def at(
        self, value: Shaped[Tensor, "batch ..."], positions: Int[Tensor, "batch pos"]
    ) -> Shaped[Tensor, "batch ..."]:
        """The value of other examples that have a token there.

        Raises:
            HookGraphError: a position is that of a single row, or keys of rows of different lengths are
                exchanged.
        """
        held = positions >= 0
        if bool(held.all()):
            return self(value)
        if Dimension.KEY_POS in self.location.dims:
            raise HookGraphError(
                f"{self.location.whole}: rows of different lengths have other keys, and cannot be exchanged: "
                "pass rows of one length, or ablate attn.z"
            )
        order = moved(len(value), self.seed).to(value.device)
        source = order[:, None].expand(held.shape)
        columns = torch.arange(held.shape[1], device=value.device)
        for _ in range(len(value)):
            source = torch.where(held[source, columns], source, order[source])
        alone = held & (source == torch.arange(len(value), device=value.device)[:, None])
        if bool(alone.any()):
            raise HookGraphError(
                f"{self.location.whole}: position {int(positions[alone][0])} is that of one row only, and no "
                "other can stand in: pass rows of one length, or draw tokens from a data set, with "
                "statistics=sample_activations(graph, data, at)"
            )
        axis = self.location.dims.index(Dimension.POS)
        return value.movedim(axis, 1)[source, columns].movedim(1, axis)


@final
@dataclass(frozen=True, eq=False)
class Constant:
    """x -> a constant over the axes of the location less the batch; an axis of size 1 holds for all."""

    location: Location
    constant: Float[Tensor, "..."]

    @property
    def per_position(self) -> bool:
        """Whether it differs from position to position of the sequence."""
        axes = self.location.dims[1:]
        return axes[:1] == (Dimension.POS,) and not is_placed(self.location) and self.constant.shape[0] > 1

    def at(
        self, value: Float[Tensor, "batch pos ..."], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos ..."]:
        """The constant at some positions.

        Raises:
            ShapeMismatchError: there is none at one of them.
        """
        if positions.numel() and int(positions.max()) >= len(self.constant):
            raise ShapeMismatchError(
                f"{self.location} has position {int(positions.max())}, its constants end at "
                f"{len(self.constant) - 1}: use means over all positions, or inputs no longer than those "
                "that they were taken of"
            )
        return self.constant.to(value)[positions.clamp(min=0)].expand(value.shape).clone()

    def __call__(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The constant, as often as there are examples and positions.

        Raises:
            ShapeMismatchError: the value is longer than the constant.
        """
        found = self.constant.to(value)
        cut = tuple(
            slice(n) if k > 1 else slice(None) for n, k in zip(value.shape[1:], found.shape, strict=True)
        )
        try:
            return found[cut].expand(value.shape).clone()
        except RuntimeError as error:
            raise ShapeMismatchError(
                f"{self.location} has shape {tuple(value.shape)}, its constant {tuple(found.shape)}: "
                "use means over all positions, or inputs no longer than those that they were taken of"
            ) from error


def check_one_contrast(corrupt: Inputs | None, statistics: AblationStatistics | None) -> None:
    """Refuse two values for one node.

    Raises:
        HookGraphError: corrupt inputs and means are both given.
    """
    if corrupt is not None and statistics is not None:
        raise HookGraphError("corrupt inputs and statistics are both given: one of them stands in for a node")


def means_instead(graph: HookGraph, clean: Inputs, statistics: AblationStatistics | None) -> Instead | None:
    """Means in the place of the values of some inputs; none where none are given.

    Means per position are those of the positions of each row: columns of padding stay as they are.
    """
    if statistics is None:
        return None
    where = graph.binding.place(graph.binding.prepare(clean))

    parts = [x for x in statistics.means if x != x.whole and not is_placed(x)]

    def mean(place: Location, value: Tensor) -> Tensor:
        inside = [x for x in parts if x.whole == place]
        if place not in statistics.means and inside:  # of the whole nothing is asked but these parts
            for part in inside:
                value = write(part, value, mean(part, read(part, value)))
            return value
        constant = Constant(place, statistics.of(place, "mean"))
        if where is None or not constant.per_position:
            return constant(value)
        return Placed(place.at(pos=slice(0, None)), ByPosition(constant.at), where)(value)

    return mean


@final
@dataclass(frozen=True, eq=False)
class Drawn:
    """x -> what was sampled from a data set: for each example one, or for each token one.

    Which ones is drawn from `seed` for the size of the batch, so that all locations get the same.

    Args:
        location: what is replaced.
        samples: values, one after the other.
        per_position: whether a sample is a whole example.
        seed: of the draw.
        lengths: how many tokens each whole example has; None where they have all positions.
    """

    location: Location
    samples: Float[Tensor, "..."]
    per_position: bool
    seed: int
    lengths: Int[Tensor, " batch"] | None = None

    @property
    def by_token(self) -> bool:
        """Whether samples are sequences, of which a token goes where the row has the one of its number."""
        return self.per_position and Dimension.POS in self.location.dims and not is_placed(self.location)

    def __call__(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Samples in the place of the value.

        Raises:
            ShapeMismatchError: whole examples were sampled, and they have another length.
        """
        found = self.samples.to(value)[self._chosen(value)]
        if found.shape != value.shape:
            raise self._other(value)
        return found

    def at(
        self, value: Float[Tensor, "batch ..."], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch ..."]:
        """The tokens of whole examples at some positions, those of the next example where one is too short.

        Raises:
            ShapeMismatchError: no example has a token at one of them, or keys differ.
        """
        held, count = positions >= 0, len(self.samples)
        if Dimension.KEY_POS in self.location.dims:
            if not bool(held.all()):
                raise self._other(value)
            return self(value)
        axis = self.location.dims.index(Dimension.POS)
        samples = self.samples.to(value).movedim(axis, 1)
        lengths = self.lengths if self.lengths is not None else torch.full((count,), samples.shape[1])
        if positions.numel() and int(positions.max()) >= int(lengths.max()):
            raise ShapeMismatchError(
                f"{self.location} has position {int(positions.max())}, its samples end at "
                f"{int(lengths.max()) - 1}: run inputs no longer than the sampled examples, or sample single "
                "tokens, with per_position=False"
            )
        lengths = lengths.to(value.device)
        source = self._chosen(value).to(value.device)[:, None].expand(held.shape)
        while bool((short := positions >= lengths[source]).any()):
            source = torch.where(short, (source + 1) % count, source)
        return samples[source, positions.clamp(min=0)].movedim(1, axis)

    def _chosen(self, value: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
        lots = value.shape[:1] if self.per_position else value.shape[:2]
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(len(self.samples), lots, generator=generator)

    def _other(self, value: Float[Tensor, "..."]) -> ShapeMismatchError:
        return ShapeMismatchError(
            f"{self.location} has shape {tuple(value.shape)}, its samples {tuple(self.samples.shape)}: run "
            "inputs as long as the sampled examples, without padding, or sample single tokens, with "
            "per_position=False"
        )
