"""`path_patching`: what a sender does to receivers directly, along the residual stream alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.copies import finite_metric, finite_per_copy, per_copy, run_copies
from hookgraph.algorithms.effects.examples import Examples, by_examples, joined
from hookgraph.algorithms.effects.footprint import rows_at_once
from hookgraph.algorithms.effects.results import Convention, PatchingEffect
from hookgraph.algorithms.interventions.packing import Index, Note, SetCopies, SetEntries
from hookgraph.algorithms.interventions.sweeps import TOGETHER
from hookgraph.algorithms.memory import in_pieces
from hookgraph.algorithms.pairs import prepare_pair
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import axes_of, chosen_places
from hookgraph.algorithms.streams import own_update, updates_of_all_stacks
from hookgraph.errors import HookGraphError
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.graph.run import Run
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import LOGITS

Sender = tuple[Location, Index]
"""A place and the entries of it that send."""


def path_patching(
    graph: HookGraph,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    senders: Sequence[Location],
    receivers: Sequence[Location],
    *,
    over: Sequence[str] = (),
    batch_size: int = 256,
    max_memory: int | None = None,
    progress: bool | None = None,
) -> PatchingEffect:
    """What each sender's change does to the metric by way of the receivers, and of nothing else between.

    1. Run clean with the sender at its corrupt value, and every update of the stream behind it held at its
       clean value; note what the receivers are. So the change reaches them along the stream alone.
    2. Run clean with the receivers at those values, and everything else free.

    effect = m(2) - m(clean), for each sender apart. The receivers are patched together: what
    one does goes on along every path but those through later receivers, which stay at what was noted.
    Senders are packed into one batch; the first pass runs from the layer of the sender to the last
    receiver, the second from the layer of the first receiver on.

    Args:
        graph: the hooked model.
        clean: what is run.
        corrupt: as many tokens with the same mask: where the senders' values come from.
        metric: logits -> one number per example.
        senders: locations or parts of locations, such as `graph.every(ATTN_Z)`; each is patched alone.
        receivers: locations or parts of locations, such as one head's `attn.q_in`, `mlp.in` or the logits.
        over: axes along which senders are told apart, such as `["head"]`.
        batch_size: how many rows are run at once, at most. Where memory does not suffice, fewer are.
        max_memory: how many bytes the tensors of a pass may take; the memory of one is measured first.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Returns:
        Effects of the senders over (batch, *over). A sender that precedes no receiver has effect 0.

    Raises:
        HookGraphError: there is no sender or receiver, no sender precedes any receiver, or all that a
            receiver does goes through a later one, where it would be undone.
        LocationError: no sender has an axis named in `over`.
        UnknownLocationError: the graph has no such location.
        ShapeMismatchError: clean and corrupt differ in shape or mask.
        MetricError: the metric is not one finite number per example, in some run.

    Source: Wang et al., arXiv:2211.00593; Goldowsky-Dill et al., arXiv:2304.05969.
    """
    starts, ends = chosen_places(graph, senders), chosen_places(graph, receivers)
    if not any(s.root.precedes(e.root) for s in starts for e in ends):
        raise HookGraphError(f"no sender precedes a receiver: nothing leads from {starts[0]} to {ends[0]}")
    _check_apart(graph, ends)
    axes = axes_of(starts, over)

    def prepared(part: Examples) -> tuple[_Paths, dict[Location, list[Sender]]]:
        paths = _Paths.of(graph, part.clean, part.corrupt, part.metric, starts, ends)
        return paths, {x: _nodes(x, axes, paths.clean[x]) for x in starts}

    def largest(part: Examples) -> object:
        paths, nodes = prepared(part)
        return paths.effects(nodes[min(starts, key=lambda x: x.order)][:1], 1, progress=False)

    def measure(part: Examples) -> PatchingEffect:
        paths, nodes = prepared(part)
        effects = paths.effects([n for found in nodes.values() for n in found], rows, progress)
        values: dict[Location, Tensor] = {}
        for place, found in nodes.items():
            sizes = [n for d, n in zip(place.dims, paths.clean[place].shape, strict=True) if d in axes]
            values[place] = torch.stack([effects[x] for x in found], dim=1).reshape(-1, *sizes)
        joint = {d for place in starts for d in place.dims} - {*axes, Dimension.BATCH}
        return PatchingEffect(
            Attribution(values, dict.fromkeys(sorted(joint), TOGETHER)),
            Attribution({}),
            Attribution({}),
            finite_metric(paths.corrupt) - finite_metric(paths.clean),
            Convention(f"path patching to {', '.join(map(str, ends))}"),
            metadata=graph.binding.metadata,
            _remeasure="it is exact already, and a path is no node that is patched alone",
        )

    examples = Examples.of(graph, clean, corrupt, metric)
    rows = rows_at_once(batch_size, max_memory, examples, largest)
    return joined(by_examples(examples, rows, measure))


def _check_apart(graph: HookGraph, receivers: Sequence[Location]) -> None:
    """Refuse receivers of which one undoes all that another does.

    Raises:
        HookGraphError: one is the stream, or what follows it, behind another, or the update of its branch.
    """
    updates = updates_of_all_stacks(graph)
    for early, late in product(receivers, repeat=2):
        meets = late.type == LOGITS.type or late.root.type.stack == early.root.type.stack
        through = own_update(late, updates) is None or late.root == own_update(early, updates)
        if meets and through and early.root.precedes(late.root):
            raise HookGraphError(
                f"all that receiver {early} does goes through receiver {late}, which is held at what reaches "
                f"it directly: {early} would count for nothing. Patch the paths to each in calls of their own"
            )


def _nodes(place: Location, axes: Sequence[Dimension], value: Tensor) -> list[Sender]:
    """The parts of a place that send, one each, the last axis fastest."""
    along = [range(n) if d in axes else [None] for d, n in zip(place.dims[1:], value.shape[1:], strict=True)]
    return [(place, index) for index in product(*along)]


@final
@dataclass(frozen=True, eq=False)
class _Paths:
    """The clean and the corrupt run, and what leads where.

    Args:
        graph: the hooked model.
        metric: what is measured.
        clean: the clean run, with senders, updates and the boundaries at which replays begin.
        corrupt: the corrupt run, with the senders.
        held: every update of the stream.
        receivers: the receivers.
        entries: the boundary before each sender and receiver.
    """

    graph: HookGraph
    metric: Metric
    clean: Run
    corrupt: Run
    held: Sequence[Location]
    receivers: Sequence[Location]
    entries: dict[Location, Location | None]

    @staticmethod
    def of(
        graph: HookGraph,
        clean: Inputs,
        corrupt: Inputs | None,
        metric: Metric,
        senders: Sequence[Location],
        receivers: Sequence[Location],
    ) -> "_Paths":
        """Run both inputs."""
        first, second = prepare_pair(graph, clean, corrupt)
        if second is None:
            raise HookGraphError("path patching needs corrupt inputs: the senders' values come from them")
        held = updates_of_all_stacks(graph)
        entries = {x: graph.entry(x) for x in (*senders, *receivers)}
        boundaries = [x for x in entries.values() if x is not None]
        wanted = list(dict.fromkeys([*boundaries, *held, *senders]))
        base = graph.run(first, save=wanted, metric=metric, logits=False)
        other = graph.run(second, save=list(senders), metric=metric, logits=False)
        return _Paths(graph, metric, base, other, held, receivers, entries)

    def effects(
        self, nodes: Sequence[Sender], batch_size: int, progress: bool | None
    ) -> dict[Sender, Float[Tensor, " batch"]]:
        """What each sender does, by way of the receivers that it precedes."""
        measured = finite_metric(self.clean)
        found = {node: torch.zeros_like(measured) for node in nodes}
        alike: dict[object, list[Sender]] = {}
        for node in nodes:
            if reached := self._reached(node[0]):
                alike.setdefault((self.entries[node[0]], reached), []).append(node)
        with Progress("path patching", sum(map(len, alike.values())), shown=progress) as bar:
            for group in alike.values():
                size = max(1, batch_size // len(measured))
                for piece, effects in in_pieces(group, size, self._together):
                    found.update(zip(piece, effects, strict=True))
                    bar.advance(len(piece))
        return found

    def _reached(self, sender: Location) -> tuple[Location, ...]:
        return tuple(x for x in self.receivers if sender.root.precedes(x.root))

    def _together(self, nodes: Sequence[Sender]) -> Float[Tensor, "... batch"]:
        """The effects of senders of one layer that precede the same receivers: a copy of the batch each."""
        clean, copies = finite_metric(self.clean), len(nodes)
        reached = self._reached(nodes[0][0])
        seen: dict[Location, Tensor] = {}
        entry, held = self.entries[nodes[0][0]], self._held(nodes, reached, seen)
        if reached == (LOGITS,):  # what is read there is the answer
            return _measured(run_copies(held, self.clean, entry, copies, metric=self.metric), nodes) - clean
        run_copies(held, self.clean, entry, copies, save=reached)
        patched = per_copy(self.graph, len(clean))
        for receiver in reached:
            patched = patched.hook(receiver, SetCopies(range(copies), seen[receiver], len(clean)))
        first = min(reached, key=lambda x: x.order)
        run = run_copies(patched, self.clean, self.entries[first], copies, metric=self.metric)
        return _measured(run, nodes) - clean

    def _held(
        self, nodes: Sequence[Sender], reached: Sequence[Location], seen: dict[Location, Tensor]
    ) -> HookGraph:
        """The graph in which copy i has sender i corrupt, receivers are noted, and the rest is held."""
        batch = len(finite_metric(self.clean))
        graph = per_copy(self.graph, batch)
        for place in dict.fromkeys(place for place, _ in nodes):
            placed = [(i, index) for i, (other, index) in enumerate(nodes) if other == place]
            graph = graph.hook(place, SetEntries(placed, self.corrupt[place]))
        for receiver in reached:
            graph = graph.hook(receiver, Note(receiver, seen))
        own = [own_update(place, self.held) for place, _ in nodes]
        for update in self.held:
            after = [
                i for i, (place, _) in enumerate(nodes) if place.root.precedes(update) and update != own[i]
            ]
            if after:
                graph = graph.hook(update, SetCopies(after, self.clean[update], batch))
        return graph


def _measured(run: Run, nodes: Sequence[Sender]) -> Float[Tensor, "... batch"]:
    """The metric of each copy, one for each sender."""
    return finite_per_copy(run.measured.view(len(nodes), -1), [place for place, _ in nodes])
