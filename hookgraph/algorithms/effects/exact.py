"""Exact patching: set one node to its corrupt value in the clean run, and measure.

Nodes are rows of one batch that sweeps through the layers: a row joins where its node is, so that only
what lies after a node is executed for it, and rows of all layers share the passes they have in common.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import TypeAlias, final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hookgraph.algorithms.copies import finite_per_copy, per_copy, run_copies, tile
from hookgraph.algorithms.effects.examples import Examples, by_examples
from hookgraph.algorithms.effects.footprint import rows_at_once
from hookgraph.algorithms.effects.tails import by_start, late, length_of, positions_of, same, shifted, tail
from hookgraph.algorithms.interventions.replacements import check_one_contrast, means_instead
from hookgraph.algorithms.interventions.statistics import AblationStatistics
from hookgraph.algorithms.memory import if_it_fits, in_pieces
from hookgraph.algorithms.pairs import prepare_pair
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import Contrast
from hookgraph.errors import HookGraphError, LocationError, MetricError
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.graph.run import Run
from hookgraph.hooks.positions import Place, Placed, is_placed, read_at
from hookgraph.hooks.slicing import read, write
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

Gains: TypeAlias = Float[Tensor, "... batch"]
"""By node and example."""


def exact_effects(
    graph: HookGraph,
    clean: Inputs,
    corrupt: Inputs | None,
    metric: Metric,
    nodes: Sequence[Location],
    *,
    statistics: AblationStatistics | None = None,
    columns: Collection[Location] = (),
    batch_size: int = 256,
    max_memory: int | None = None,
    progress: bool | None = None,
) -> Float[Tensor, "... batch"]:
    """m(clean with the node set to its corrupt value) - m(clean), for each node and example.

    Args:
        graph: the hooked model.
        clean: what is run.
        corrupt: where the nodes' values come from; None sets them to zero, or to their means.
        metric: logits -> one number per example.
        nodes: parts of locations, such as one head at one position.
        statistics: means of the whole locations, from `mean_activations`, where `corrupt` is None.
        columns: those of the nodes whose positions count columns of the batch, padding included; those of
            the others count the tokens of each row, as everywhere.
        batch_size: how many rows are run at once, at most. Where memory does not suffice, fewer are.
        max_memory: how many bytes the tensors of a pass may take; the memory of one is measured first.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        UnknownLocationError: the graph has no such location.
        ShapeMismatchError: clean and corrupt differ in shape or mask.
        MetricError: the metric of the clean run is not a finite number, or has to be divided and cannot be.
    """
    wholes = list(dict.fromkeys(node.whole for node in nodes))
    check_one_contrast(corrupt, statistics)

    def measure(part: Examples, nodes: Sequence[Location], batch_size: int) -> Gains:
        found = None if statistics is not None else _late_effects(part, nodes, batch_size, progress)
        if found is not None:
            return found
        contrast = Contrast.of(
            graph, part.clean, part.corrupt, part.metric, wholes,
            replays=True, retains=any(map(is_placed, nodes)), totals=False,
            instead=means_instead(graph, part.clean, statistics),
        )  # fmt: skip
        return effects_of(contrast, nodes, batch_size, progress, columns)

    examples = Examples.of(graph, clean, corrupt, metric)
    first = sorted(nodes, key=lambda node: node.order)[:1]
    rows = rows_at_once(batch_size, max_memory, examples, lambda part: measure(part, first, 1))
    return torch.cat(by_examples(examples, rows, lambda part: measure(part, nodes, rows)), -1)


def _late_effects(
    part: Examples, nodes: Sequence[Location], batch_size: int, progress: bool | None
) -> Gains | None:
    """The effects of nodes none of which begins early: what lies before all of them is not kept, but for what
    the model remembers of it.

    None where that is not possible, or comes out differently.
    """
    pair = prepare_pair(part.graph, part.clean, part.corrupt)
    length = positions_of(pair[0])
    starts = by_start(nodes, length)
    copies = batch_size // len(part) - 1  # and one that is not patched
    if len(starts) != 1 or starts[0][0] == 0 or copies < 1:
        return None
    start, apart = starts[0][0], list(dict.fromkeys(nodes))
    places = list(dict.fromkeys(x.whole for x in apart))
    contrast = if_it_fits(lambda: late(part.graph, pair, part.metric, places, start))
    if contrast is None:
        return None
    _check_nodes(contrast, apart)
    with Progress("exact patching", len(apart), shown=progress) as bar:
        found = _gathered(contrast, apart, copies, partial(_tail_gains, contrast, start, length), bar)
    return None if found is None else torch.stack([found[node] for node in nodes])


def effects_of(
    contrast: Contrast,
    nodes: Sequence[Location],
    batch_size: int,
    progress: bool | None,
    columns: Collection[Location] = (),
) -> Gains:
    """The exact effects of parts of a contrast's places, all of which are whole locations.

    Raises:
        HookGraphError: a node is a part of the batch.
        MetricError: the metric has not one number for each row of the nodes.
        LocationError: the index of one is out of range.
    """
    _check_nodes(contrast, nodes)
    apart = list(dict.fromkeys(nodes))
    place = contrast.graph.binding.place(contrast.inputs)
    by_row = None if place is None else _ByRow(place, frozenset(filter(is_placed, apart)) - {*columns})
    found: dict[Location, Tensor] = {}
    batch, length = len(contrast.measured), length_of(contrast)
    with Progress("exact patching", len(apart), shown=progress) as bar:
        for start, group in by_start(apart, length):
            work = _Work(contrast, start, length, max(1, batch_size // batch), by_row)
            found.update(_gathered(contrast, group, work.copies, work, bar) or {})
    empty = contrast.measured.new_zeros(0, batch)
    return torch.stack([found[node] for node in nodes]) if nodes else empty


def _gathered(
    contrast: Contrast,
    nodes: Sequence[Location],
    copies: int,
    work: Callable[[Sequence[Location]], Gains | None],
    bar: Progress,
) -> dict[Location, Float[Tensor, " batch"]] | None:
    """The effects of nodes, found so many at a time in causal order; None as soon as `work` has none."""
    found: dict[Location, Tensor] = {}
    ordered = sorted(nodes, key=lambda node: _order(contrast.entries[node.whole]))
    for piece, effects in in_pieces(ordered, copies, work):
        if effects is None:
            return None
        found.update(zip(piece, finite_per_copy(effects, piece), strict=True))
        bar.advance(len(piece))
    return found


@final
class _Work:
    """The gains of nodes that begin at one position: from there on where that is possible, or altogether.

    Args:
        contrast: the clean and corrupt run.
        start: the first position of the nodes.
        length: how many positions there are.
        copies: of the batch, that may be run at once.
        by_row: the nodes whose positions count the tokens of each row.
    """

    def __init__(
        self, contrast: Contrast, start: int, length: int, copies: int, by_row: "_ByRow | None"
    ) -> None:
        self._contrast, self._start, self._length, self._by_row = contrast, start, length, by_row
        self._tail = tail(contrast, start) if copies > 1 else None  # one copy of a tail stays as it is
        self.copies = copies - (self._tail is not None)
        """How many nodes may be patched at once."""

    def __call__(self, piece: Sequence[Location]) -> Gains:
        if self._tail is not None:
            gains = _tail_gains(self._tail, self._start, self._length, piece)
            if gains is not None:
                return gains
            self._tail = None
        return _sweep(self._contrast, piece, piece, self._by_row)


def _check_nodes(contrast: Contrast, nodes: Sequence[Location]) -> None:
    """Whether nodes can be patched in copies of the batch, and the metric has a number for each row of the
    values: it has not where codebooks are rows of logits.

    Raises:
        HookGraphError: a node is a part of the batch.
        MetricError: the metric has more numbers, or fewer.
    """
    for node in nodes:
        if any(dim == Dimension.BATCH for dim, _ in node.index):
            raise HookGraphError(
                f"{node}: a node is patched in every example, leave `batch` out of its index"
            )
    for place, value in contrast.clean.items():
        if len(value) != len(contrast.measured):
            raise MetricError(
                f"the metric has {len(contrast.measured)} numbers, {place} has {len(value)} rows: "
                "patched copies of the batch are told apart by these, so there has to be one number per row"
            )


def _tail_gains(part: Contrast, start: int, length: int, piece: Sequence[Location]) -> Gains | None:
    """The effects of some nodes in a tail; None if it does not give what the whole pass gives, or not even
    two copies of it fit in memory.

    A copy in which nothing is patched runs with them: its metric has to be that of the clean run.
    """
    placed = [None, *(shifted(node, start, length) for node in piece)]
    swept = partial(_sweep, part, [piece[0], *piece], placed)
    gains = swept() if len(piece) > 1 else if_it_fits(swept)
    if gains is None:
        return None
    plain, patched = gains[0], gains[1:]
    return patched - plain if same(part.measured + plain, part.measured) else None


def _order(entry: Location | None) -> tuple[object, ...]:
    return () if entry is None else entry.order


def _sweep(
    contrast: Contrast,
    nodes: Sequence[Location],
    patches: Sequence[Location | None],
    by_row: "_ByRow | None" = None,
) -> Gains:
    """The effects of patches, in causal order of their nodes: a copy of the batch each, which joins where its
    node is; one of None stays as it is.
    """
    piece = [(contrast.entries[node.whole], patch) for node, patch in zip(nodes, patches, strict=True)]
    base, metric, clean = contrast.base, contrast.metric, contrast.measured
    graph = per_copy(contrast.graph, len(clean))
    effects: list[Tensor] = []
    whole = [node for entry, node in piece if entry is None]
    if whole:
        patched = _patched(graph, whole, contrast.corrupt, offset=0, batch=len(clean), by_row=by_row)
        effects.append(_gains(run_copies(patched, base, None, len(whole), metric=metric), clean))
    stations = list(dict.fromkeys(entry for entry, _ in piece if entry is not None))
    rows: Tensor | None = None
    for station, until in zip_longest(stations, stations[1:]):
        joining = [node for entry, node in piece if entry == station]
        new, offset = tile(base[station], len(joining)), 0 if rows is None else len(rows)
        patched = _patched(graph, joining, contrast.corrupt, offset=offset, batch=len(clean), by_row=by_row)
        rows = new if rows is None else torch.cat([rows, new])
        copies = len(rows) // len(clean)
        if until is not None:
            rows = run_copies(patched, base, station, copies, value=rows, save=[until])[until]
        else:
            run = run_copies(patched, base, station, copies, metric=metric, value=rows)
            effects.append(_gains(run, clean))
    return torch.cat(effects)


def _gains(run: Run, clean: Float[Tensor, " batch"]) -> Gains:
    return run.measured.view(-1, len(clean)) - clean


def _patched(
    graph: HookGraph,
    nodes: Sequence[Location | None],
    values: Mapping[Location, Tensor],
    *,
    offset: int,
    batch: int,
    by_row: "_ByRow | None" = None,
) -> HookGraph:
    """The graph in which node i has its corrupt value in the i-th copy of the batch after row `offset`."""
    by_location: dict[Location, list[tuple[int, Location]]] = {}
    for i, node in enumerate(nodes):
        if node is not None:
            by_location.setdefault(node.whole, []).append((offset + i * batch, node))
    for whole, placed in by_location.items():
        graph = graph.hook(whole, _Patch(placed, values[whole], batch, by_row))
    return graph


@final
@dataclass(frozen=True, slots=True)
class _ByRow:
    """The nodes whose positions count the tokens of each row, and where these are."""

    place: Place
    nodes: frozenset[Location]


@final
@dataclass(frozen=True, eq=False)
class _Patch:
    """A hook: each node gets its corrupt value in its own copy of the batch."""

    placed: Sequence[tuple[int, Location]]
    """The first row of the copy, and the node."""
    corrupt: Shaped[Tensor, "batch ..."]
    batch: int
    by_row: _ByRow | None = None

    def __call__(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        result = value.clone()
        if self.corrupt.dtype != value.dtype:  # GPT-J's keys pass through the cache in another precision
            return replace(self, corrupt=self.corrupt.to(value.dtype))(value)
        kinds: dict[tuple[Dimension, ...] | None, list[tuple[int, Location]]] = {}
        for row, node in self.placed:
            points = all(isinstance(i, int) for _, i in node.index) and not self._counts_tokens(node)
            kinds.setdefault(tuple(d for d, _ in node.index) if points else None, []).append((row, node))
        for dims, placed in kinds.items():
            if dims is None:
                self._by_part(result, placed)
            else:
                self._by_points(result, dims, placed)
        return result

    def _by_points(
        self, result: Shaped[Tensor, "..."], dims: Sequence[Dimension], placed: Sequence[tuple[int, Location]]
    ) -> None:
        """Nodes that are single entries along some axes: all of them in one assignment."""
        axes = placed[0][1].type.dims
        here: list[Int[Tensor, "..."] | slice] = [slice(None)] * len(axes)
        device = result.device
        rows = torch.tensor([row for row, _ in placed], device=device)
        examples = torch.arange(self.batch, device=device)
        for dim in dims:
            axis = axes.index(dim)
            chosen = [dict(node.index)[dim] for _, node in placed]
            here[axis] = _within(chosen, result.shape[axis], placed[0][1], dim).to(device)[:, None]
        there = [examples[None], *here[1:]]
        here[0] = rows[:, None] + examples[None]
        result[tuple(here)] = self.corrupt[tuple(there)]

    def _by_part(self, result: Shaped[Tensor, "..."], placed: Sequence[tuple[int, Location]]) -> None:
        """Nodes that are slices or lists, or count the tokens of each row, one by one."""
        for row, node in placed:
            rows = slice(row, row + self.batch)
            if self.by_row is not None and self._counts_tokens(node):
                place = self.by_row.place
                new = read_at(node, self.corrupt, place)
                result[rows] = Placed(node, lambda _, new=new: new, place)(result[rows].clone())
            else:
                result[rows] = write(node, result[rows], read(node, self.corrupt))

    def _counts_tokens(self, node: Location) -> bool:
        return self.by_row is not None and node in self.by_row.nodes


def _within(chosen: Sequence[object], size: int, node: Location, dim: Dimension) -> Int[Tensor, "..."]:
    """The numbers themselves if they are indices of an axis of this size.

    Raises:
        LocationError: one is out of range.
    """
    found = torch.tensor(chosen)
    if int(found.min()) < -size or int(found.max()) >= size:
        outside = next(i for i in found.tolist() if not -size <= i < size)
        raise LocationError(f"{node.whole}: {dim}={outside} is out of range, {dim} has size {size}")
    return found
