"""`path_patching`: what a sender does to receivers directly, along the residual stream alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.copies import finite_metric
from hookgraph.algorithms.effects.results import Convention, PatchingEffect
from hookgraph.algorithms.interventions.sweeps import axes_of, nodes_over, shaped
from hookgraph.algorithms.pairs import prepare_pair
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import chosen_places
from hookgraph.algorithms.streams import own_update, updates
from hookgraph.errors import HookGraphError
from hookgraph.graph.abstract import Inputs, Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.graph.run import Run
from hookgraph.hooks.slicing import read
from hookgraph.ontology.locations import Location


def path_patching(
    graph: HookGraph,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    senders: Sequence[Location],
    receivers: Sequence[Location],
    *,
    over: Sequence[str] = (),
    progress: bool | None = None,
) -> PatchingEffect:
    """What each sender's change does to the metric by way of the receivers, and of nothing else between.

    1. Run clean with the sender at its corrupt value, and every update of the stream behind it held at its
       clean value; note what the receivers are. So the change reaches them along the stream alone.
    2. Run clean with the receivers at those values, and everything else free.

    effect = m(2) - m(clean), for each sender apart. What a receiver does goes on along every path; the
    receivers are patched together.

    Args:
        graph: the hooked model.
        clean: what is run.
        corrupt: as many tokens with the same mask: where the senders' values come from.
        metric: logits -> one number per example.
        senders: locations or parts of locations, such as `graph.every(ATTN_Z)`; each is patched alone.
        receivers: locations or parts of locations, such as one head's `attn.q_in`, `mlp.in` or the logits.
        over: axes along which senders are told apart, such as `["head"]`.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Returns:
        Effects of the senders over (batch, *over). A sender that precedes no receiver has effect 0.

    Raises:
        HookGraphError: there is no sender or receiver, or no sender precedes any receiver.
        LocationError: no sender has an axis named in `over`.
        UnknownLocationError: the graph has no such location.
        ShapeMismatchError: clean and corrupt differ in shape or mask.
        MetricError: the metric of the clean run is not a finite number.

    Source: Wang et al., arXiv:2211.00593; Goldowsky-Dill et al., arXiv:2304.05969.
    """
    starts, ends = chosen_places(graph, senders), chosen_places(graph, receivers)
    if not any(s.root.precedes(e.root) for s in starts for e in ends):
        raise HookGraphError(f"no sender precedes a receiver: nothing leads from {starts[0]} to {ends[0]}")
    axes = axes_of(starts, over)
    first, second = prepare_pair(graph, clean, corrupt)
    if second is None:
        raise ValueError("there are corrupt inputs")
    wholes = list(dict.fromkeys([s.whole for s in starts]))
    held = updates(graph)
    base = graph.run(first, save=list(dict.fromkeys([*held, *wholes])), metric=metric, logits=False)
    measured = finite_metric(base)
    other = graph.run(second, save=wholes, metric=metric, logits=False)
    sizes = {x: dict(zip(x.dims, read(x, base[x.whole]).shape, strict=True)) for x in starts}
    nodes = {x: nodes_over(x, axes, sizes[x]) for x in starts}
    paths = _Paths(graph, first, metric, base, other, held, ends)
    effects: list[Tensor] = []
    with Progress("path patching", sum(map(len, nodes.values())), shown=progress) as bar:
        for node in (node for found in nodes.values() for node in found):
            effects.append(paths.effect(node) - measured)
            bar.advance()
    return PatchingEffect(
        shaped(torch.stack(effects), nodes, axes, sizes),
        Attribution({}),
        Attribution({}),
        finite_metric(other) - measured,
        Convention(f"path patching to {', '.join(map(str, ends))}"),
        metadata=graph.binding.metadata,
    )


@final
@dataclass(frozen=True, eq=False)
class _Paths:
    """The clean and the corrupt run, and what is to be seen."""

    graph: HookGraph
    inputs: Prepared
    metric: Metric
    clean: Run
    corrupt: Run
    held: Sequence[Location]
    receivers: Sequence[Location]

    def effect(self, sender: Location) -> Float[Tensor, " batch"]:
        """The metric with the receivers at what the sender makes them."""
        reached = [x for x in self.receivers if sender.root.precedes(x.root)]
        if not reached:
            return finite_metric(self.clean)
        seen: dict[Location, Tensor] = {}
        graph = self._held(sender, reached, seen)
        graph.run(self.inputs, save=[max(reached, key=lambda x: x.order)])
        patched = self.graph
        for receiver in reached:
            patched = patched.hook(receiver, _Set(seen[receiver]))
        run = patched.run(self.inputs, metric=self.metric, logits=False)
        if run.metric is None:
            raise ValueError("the run was measured")
        return run.metric

    def _held(self, sender: Location, reached: Sequence[Location], seen: dict[Location, Tensor]) -> HookGraph:
        """The graph in which the sender is corrupt, receivers are noted, and what lies between is held."""
        graph = self.graph.hook(sender, _Set(read(sender, self.corrupt[sender.whole])))
        for receiver in reached:
            graph = graph.hook(receiver, _Note(receiver, seen))
        own = own_update(sender, self.held)
        for update in self.held:
            if sender.root.precedes(update) and update != own:
                graph = graph.hook(update, _Set(self.clean[update]))
        return graph


@final
@dataclass(frozen=True, eq=False)
class _Set:
    """A hook: a location has this value."""

    value: Shaped[Tensor, "..."]

    def __call__(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return self.value


@final
@dataclass(frozen=True, eq=False)
class _Note:
    """A hook that notes a value, before anything holds it."""

    location: Location
    seen: dict[Location, Tensor]

    def __call__(self, value: Shaped[Tensor, "..."]) -> None:
        self.seen[self.location] = value.detach().clone()
