"""A contrast from some position on: where no later position changes an earlier one, only those run again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.algorithms.copies import finite_metric
from hookgraph.algorithms.sites import Contrast
from hookgraph.graph.abstract import Prepared
from hookgraph.graph.examples import count_examples
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric, ReadingMetric, Reads, Tiled, take, tokens_read
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

_ENOUGH = 16
"""So many nodes are worth a tail of their own."""

_SHORT = 32
"""For so many tokens a pass takes as long as for twice as many: it waits for the weights."""


def by_start(nodes: Sequence[Location], length: int) -> list[tuple[int, list[Location]]]:
    """Nodes by the position from which on they change something, in groups of a useful size.

    Args:
        nodes: parts of locations.
        length: how many positions there are.
    """
    starting: dict[int, list[Location]] = {}
    for node in nodes:
        starting.setdefault(first_position(node, length), []).append(node)
    groups: list[tuple[int, list[Location]]] = []
    for start in sorted(starting):
        if not groups or len(groups[-1][1]) >= _ENOUGH:
            groups.append((start, []))
        groups[-1][1].extend(starting[start])
    return groups


def first_position(node: Location, length: int) -> int:
    """The first position that a node is a part of; 0 where that is not a matter of counting."""
    part = dict(node.index).get(Dimension.POS)
    if isinstance(part, slice):
        positions = range(length)[part]
    else:
        positions = [part] if isinstance(part, int) else list(part or ())
    if len(positions) == 0 or not all(-length <= x < length for x in positions):
        return 0
    return min(x % length for x in positions)


def tail(contrast: Contrast, start: int) -> Contrast | None:
    """The contrast with what lies before position `start` left out, but for what the model remembers of it.

    None where that is not possible. Whether later positions leave earlier ones alone is to be seen from the
    metric of a copy that is not patched.
    """
    metric = contrast.metric
    if start == 0 or not isinstance(metric, ReadingMetric) or not all(map(_along_positions, contrast.clean)):
        return None
    reads = _later(metric.reads, start, length_of(contrast))
    rest = None if reads is None else contrast.graph.remember(contrast.retained or contrast.inputs, start)
    if reads is None or rest is None:
        return None
    base, wanted = contrast.base, [*filter(None, contrast.entries.values()), *contrast.clean]
    saved = {x: _from(x, base[x], start) for x in wanted}
    return replace(
        contrast,
        metric=Later(metric, reads),
        inputs=rest,
        base=replace(base, saved=saved, inputs=rest),
        clean={x: saved[x] for x in contrast.clean},
        corrupt={x: _from(x, contrast.corrupt[x], start) for x in contrast.clean},
    )


def late(
    graph: HookGraph,
    pair: tuple[Prepared, Prepared | None],
    metric: Metric,
    places: Sequence[Location],
    start: int,
) -> Contrast | None:
    """The tail of a contrast of which nothing before position `start` is looked at: nothing of that is kept
    but what the model remembers. Short inputs, clean and corrupt, are run in one pass.

    None where that is not possible, or not known to be right, as in `tail`.
    """
    first, second = pair
    if not isinstance(metric, ReadingMetric) or not all(map(_along_positions, places)):
        return None
    reads, count = _later(metric.reads, start, positions_of(first)), count_examples(first) or 1
    both = _side_by_side(first, second, count)
    retained = None if reads is None else graph.retaining(both or first, rows=count)
    if reads is None or retained is None:
        return None
    entries = {x: graph.entry(x) for x in places}
    parts = {x: x.at(pos=slice(start, None)) for x in (*filter(None, entries.values()), *places)}
    measured = metric if both is None else Tiled(metric, count, 2)
    base = graph.run(retained, save=list(parts.values()), metric=measured, logits=False)
    corrupt = base if second is None or both else graph.run(second, save=list(parts.values()), logits=False)
    rest = graph.remember(retained, start)
    if rest is None:
        return None
    clean = {x: base[part][:count] for x, part in parts.items()}
    other = {
        x: corrupt[parts[x]][-count:] if second is not None else torch.zeros_like(clean[x]) for x in places
    }
    base = replace(base, saved=clean, metric=base.measured[:count], inputs=rest)
    finite_metric(base)
    seen = {x: clean[x] for x in places}
    return Contrast(graph, Later(metric, reads), places, rest, None, base, seen, other, None, entries)


def positions_of(inputs: Prepared) -> int:
    """How many positions inputs have that are nothing but tokens, and what belongs to each; else 0."""
    found = {x.shape[1:] for x in inputs.values() if isinstance(x, Tensor)}
    shape = found.pop() if len(found) == 1 else ()
    return shape[0] if len(shape) == 1 else 0


def _side_by_side(first: Prepared, second: Prepared | None, count: int) -> Prepared | None:
    """Clean and corrupt inputs as one batch, if a pass over both takes hardly longer than over either."""
    if second is None or first.keys() != second.keys():
        return None
    found: dict[str, object] = {}
    for name, value in first.items():
        other = second[name]
        if isinstance(value, bool | None) and value == other:
            found[name] = value
        elif not isinstance(value, Tensor) or not isinstance(other, Tensor) or value.numel() > _SHORT:
            return None
        elif len(value) == count:
            found[name] = torch.cat([value, other])
        elif torch.equal(value, other):  # one row for all
            found[name] = value
        else:
            return None
    return found


def shifted(node: Location, start: int, length: int) -> Location:
    """A node as a part of the tail."""
    part = dict(node.index).get(Dimension.POS)
    if part is None:
        return node
    if isinstance(part, int):
        return node.at(pos=part % length - start)
    positions = range(length)[part] if isinstance(part, slice) else part
    return node.at(pos=[x % length - start for x in positions])


def length_of(contrast: Contrast) -> int:
    """How many positions the places have; 0 where they have none, or not as many."""
    found = {
        value.shape[x.dims.index(Dimension.POS)] if Dimension.POS in x.dims else 0
        for x, value in contrast.clean.items()
        if x == x.whole
    }
    return found.pop() if len(found) == 1 else 0


@final
@dataclass(frozen=True, eq=False)
class Later:
    """A metric whose positions are counted within a tail."""

    metric: ReadingMetric
    reads: Reads

    @property
    def tokens(self) -> Int[Tensor, "..."] | None:
        """The tokens whose logits the metric reads."""
        return tokens_read(self.metric)

    def of(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        """The metric, from the logits at its positions."""
        return self.metric.of(logits)

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        """The metric, from the logits of the tail."""
        return self.metric.of(take(logits, self.reads))

    def rows(self, chosen: slice) -> "Later":
        """The same for some examples."""
        reads = self.reads[chosen] if isinstance(self.reads, Tensor) else self.reads
        return Later(self.metric.rows(chosen), reads)


def _later(reads: Reads | None, start: int, length: int) -> Reads | None:
    """Positions counted from `start`; None if one lies before it."""
    if reads is None or length == 0:
        return None
    if isinstance(reads, int):
        return reads % length - start if reads % length >= start else None
    found = reads % length - start
    return None if bool((found < 0).any()) else found


def _along_positions(place: Location) -> bool:
    """Whether a place is a whole location with positions, and without keys: of these a window has fewer."""
    return place == place.whole and Dimension.POS in place.dims and Dimension.KEY_POS not in place.dims


def _from(place: Location, value: Float[Tensor, "..."], start: int) -> Float[Tensor, "..."]:
    axis = place.dims.index(Dimension.POS)
    return value.narrow(axis, start, value.shape[axis] - start)


def same(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> bool:
    """Equal up to rounding."""
    return bool(((a - b).abs() <= torch.finfo(a.dtype).eps ** 0.5 * b.abs().max()).all())
