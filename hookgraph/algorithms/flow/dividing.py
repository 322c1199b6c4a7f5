"""The stream of a layer, divided into what it was made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import TypeAlias, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hookgraph.algorithms.flow.streaming import proximity
from hookgraph.algorithms.flow.writing import Row, Written, at_least_single, interior, rounding
from hookgraph.algorithms.proximity import Number
from hookgraph.algorithms.streams import RESIDUALS, UPDATES
from hookgraph.errors import HookGraphError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import ATTN_OUT, MLP_OUT

_Parts: TypeAlias = Mapping[Location, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Shares:
    """What each part contributes to one whole: the numbers of a position sum to 1.

    Args:
        whole: the stream that is divided: `resid.mid` or `resid.post`.
        before: the stream that it was made from.
        residual: the share of that stream.
        updates: the share of each update: (batch, pos), or told apart by (key_pos, head) or d_mlp.
        biases: the share of the bias of a projection, of each update that is told apart.
        gap: ‖whole - Σ parts‖ / ‖whole‖, the largest of all examples: zero up to rounding.
    """

    whole: Location
    before: Location
    residual: Float[Tensor, "batch pos"]
    updates: Mapping[Location, Float[Tensor, "batch pos ..."]]
    biases: Mapping[Location, Float[Tensor, "batch pos"]] = field(default_factory=dict[Location, Tensor])
    gap: float = 0.0

    @property
    def heads(self) -> Float[Tensor, "batch pos key_pos head"] | None:
        """The share of each key's value through each head; None where attention is one part, or none."""
        found = self._of(ATTN_OUT)
        return found if found is not None and found.ndim == 4 else None

    @property
    def attention(self) -> Float[Tensor, "batch pos"] | None:
        """The share of attention, its bias left out; None where this whole is made without."""
        found = self._of(ATTN_OUT)
        return None if found is None else _summed(found)

    @property
    def neurons(self) -> Float[Tensor, "batch pos d_mlp"] | None:
        """The share of each neuron; None where the MLP is one part, or none."""
        found = self._of(MLP_OUT)
        return found if found is not None and found.ndim == 3 else None

    @property
    def mlp(self) -> Float[Tensor, "batch pos"] | None:
        """The share of the MLP; None where this whole is made without."""
        found = self._of(MLP_OUT)
        return None if found is None else _summed(found)

    def _of(self, kind: LocationType) -> Tensor | None:
        return next((v for k, v in self.updates.items() if k.type == kind), None)

    def threshold(self, threshold: Number) -> "Shares":
        """The shares of at most `threshold` dropped, the others scaled to a sum of 1 again.

        The residual gets 1 where none is left.
        """
        updates = {k: _over(v, threshold) for k, v in self.updates.items()}
        biases = {k: _over(v, threshold) for k, v in self.biases.items()}
        residual = _over(self.residual, threshold)
        return _normalised(self.whole, self.before, residual, updates, biases, self.gap)


@final
@dataclass(frozen=True, slots=True)
class Stage:
    """One sum of a layer: the stream before it, what is added, and the stream after it."""

    before: Location
    added: tuple[Location, ...]
    whole: Location


def stages(graph: HookGraph, layer: int) -> Iterator[Stage]:
    """The sums of a layer, in causal order: one for each stream between its updates that is a location."""
    before: Location | None = None
    added: list[Location] = []
    for location in graph.locations:
        if location.site is not None or location.layer != layer:
            continue
        if location.type in UPDATES:
            added.append(location)
        elif location.type in RESIDUALS:
            if before is not None and added:
                yield Stage(before, tuple(added), location)
            before, added = location, []


def divided(
    graph: HookGraph,
    run: Run,
    stage: Stage,
    real: Bool[Tensor, "batch pos"],
    norm: Number,
    *,
    heads: bool,
    neurons: bool,
) -> Shares:
    """The shares of the parts of one sum, from a run that saved them. At padding the residual has all.

    Raises:
        HookGraphError: the parts do not add up to the whole, or an update cannot be divided.
    """
    inside = {x: interior(graph, x, heads=heads, neurons=neurons) for x in stage.added}
    places = [row.nonzero().flatten() for row in real.to(run[stage.whole].device)]
    rows = [_example(graph, run, stage, inside, norm, Row(i, kept)) for i, kept in enumerate(places)]
    sizes = [float((row.total - row.whole).norm() / row.whole.norm()) for row in rows]
    if not all(map(isfinite, sizes)):
        raise HookGraphError(
            f"{stage.whole} is not finite: a hook, or an overflow in half precision, are usual reasons"
        )
    gap = max(sizes, default=0.0)
    if not gap <= rounding(run[stage.whole].dtype):
        raise HookGraphError(
            f"{stage.whole} is not {stage.before} + {' + '.join(map(str, stage.added))} (off by {gap:.1e} of "
            "its size): something else writes to the stream, such as a hook, a dictionary that is edited, or "
            "a norm of the whole stream, and shares of a whole that is no sum mean nothing"
        )
    return _normalised(
        stage.whole,
        stage.before,
        _stacked([row.residual for row in rows], places, real),
        {x: _stacked([row.updates[x] for row in rows], places, real) for x in stage.added},
        {x: _stacked([row.biases[x] for row in rows], places, real) for x in stage.added if inside[x]},
        gap,
    )


@final
@dataclass(frozen=True, eq=False)
class _Example:
    """Proximities in one example, and what its parts add up to."""

    whole: Float[Tensor, "pos d_model"]
    total: Float[Tensor, "pos d_model"]
    residual: Float[Tensor, " pos"]
    updates: Mapping[Location, Float[Tensor, "pos ..."]]
    biases: Mapping[Location, Float[Tensor, " pos"]]


def _example(
    graph: HookGraph,
    run: Run,
    stage: Stage,
    inside: Mapping[Location, tuple[Location, ...]],
    norm: Number,
    row: Row,
) -> _Example:
    whole, before = (at_least_single(row.of(run[x])) for x in (stage.whole, stage.before))
    total = before
    updates: dict[Location, Tensor] = {}
    biases: dict[Location, Tensor] = {}
    for update in stage.added:
        if inside[update]:
            written = Written.of(graph, run, update, inside[update], row)
            updates[update], biases[update] = written.proximities(whole, norm)
            total = total + written.total()
        else:
            value = at_least_single(row.of(run[update]))
            updates[update] = proximity(value, whole, norm)
            total = total + value
    return _Example(whole, total, proximity(before, whole, norm), updates, biases)


def _stacked(
    rows: list[Tensor], places: list[Tensor], real: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos ..."]:
    """Numbers at the real tokens of each example, as one tensor with 0 at padding."""
    by_key = rows[0].ndim == 3
    others = (real.shape[1], *rows[0].shape[2:]) if by_key else rows[0].shape[1:]
    found = rows[0].new_zeros(*real.shape, *others)
    for whole, row, kept in zip(found, rows, places, strict=True):
        whole[(kept[:, None], kept) if by_key else kept] = row
    return found


def _normalised(
    whole: Location, before: Location, residual: Tensor, updates: _Parts, biases: _Parts, gap: float
) -> Shares:
    """Numbers of parts, divided by their sum; the residual gets 1 where it is 0."""
    every = [residual, *(_summed(x) for x in (*updates.values(), *biases.values()))]
    total = torch.stack(every).sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)

    def share(x: Tensor) -> Tensor:
        return x / total.reshape(*total.shape, *[1] * (x.ndim - 2))

    return Shares(
        whole,
        before,
        share(residual).masked_fill(nothing, 1),
        {k: share(v) for k, v in updates.items()},
        {k: share(v) for k, v in biases.items()},
        gap,
    )


def _over(part: Tensor, threshold: Number) -> Tensor:
    return part.where(part > threshold, torch.zeros_like(part))


def _summed(part: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos"]:
    return part.flatten(2).sum(2) if part.ndim > 2 else part
