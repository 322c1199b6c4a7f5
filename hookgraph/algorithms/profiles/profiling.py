"""`path_profile`: the metric and its slope at points on the way of a node from clean to corrupt."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.copies import per_copy, run_copies
from hookgraph.algorithms.effects.quadrature import Quadrature, nodes_and_weights
from hookgraph.algorithms.interventions.sweeps import nodes_over
from hookgraph.algorithms.memory import in_pieces
from hookgraph.algorithms.profiles.results import PathProfile
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import Contrast, axes_of, chosen_places
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.hooks.slicing import read, write
from hookgraph.ontology.locations import Location

_Point = tuple[Location, int]
"""A node, and the number of a point on its way."""


def path_profile(
    graph: HookGraph,
    clean: Inputs,
    corrupt: Inputs | None,
    metric: Metric,
    at: Sequence[Location] | Location,
    steps: int = 50,
    *,
    over: Sequence[str] = (),
    quadrature: Quadrature = "gauss-legendre",
    batch_size: int = 256,
    progress: bool | None = None,
) -> PathProfile:
    """m(α) and dm/dα with one node set to (1 - α) clean + α corrupt, all else as in the clean run.

    Points of all nodes of one location, such as the heads of a layer, share batches, which execute only
    the layers from there on. Σ_k w_k dm/dα(α_k) is the integrated gradient, which equals the effect of
    patching the node, m(1) - m(0), up to the rule's error: `.residuals`.

    Args:
        graph: the hooked model.
        clean: what is run.
        corrupt: as many tokens with the same mask; None stands for zero in every node.
        metric: logits -> one number per example.
        at: the nodes, parts of locations or whole ones; latents too.
        steps: how many points.
        over: axes along which each of `at` is divided into nodes, such as `head`.
        quadrature: where the points are, and their weights.
        batch_size: how many rows are run at once, at most. Where memory does not suffice, fewer are.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        UnknownLocationError: the graph has no such location.
        LocationError: no location has an axis named in `over`.
        ShapeMismatchError: clean and corrupt differ in shape or mask.
        MetricError: the metric is not one finite number per example, or does not depend on a node.

    Source: integrated gradients, Sundararajan et al., arXiv:1703.01365; the profile compares them with
    what patching measures.
    """
    places = chosen_places(graph, [at] if isinstance(at, Location) else at)
    axes = axes_of(places, over)
    wholes = list(dict.fromkeys(place.whole for place in places))
    contrast = Contrast.with_entries(graph, clean, corrupt, metric, wholes)
    nodes: list[Location] = []
    for place in places:
        sizes = dict(zip(place.dims, read(place, contrast.clean[place.whole]).shape, strict=True))
        nodes += nodes_over(place, axes, sizes)
    alphas, weights = nodes_and_weights(quadrature, steps)
    points = torch.cat([alphas, alphas.new_ones(1)])  # the end, too: what patching the node gives
    work = [(node, k) for node in nodes for k in range(len(points))]
    found: dict[_Point, tuple[Tensor, Tensor]] = {}
    with Progress("path profile", len(work), shown=progress) as bar:
        for whole, group in groupby(work, key=lambda point: point[0].whole):
            rows = max(1, batch_size // len(contrast.measured))
            step = _Step(contrast, whole, points)
            for piece, (values, slopes) in in_pieces(list(group), rows, step):
                found.update(zip(piece, zip(values, slopes, strict=True), strict=True))
                bar.advance(len(piece))
    values, slopes = (
        torch.stack([torch.stack([found[node, k][i] for k in range(len(points))]) for node in nodes])
        for i in (0, 1)
    )
    return PathProfile(
        nodes=tuple(nodes),
        alphas=alphas,
        weights=weights,
        values=values[:, :-1],
        slopes=slopes[:, :-1],
        start=contrast.measured,
        end=values[:, -1],
        total_effect=contrast.total,
        quadrature=quadrature,
        ablation="zero" if corrupt is None else "corrupt",
        metadata=graph.binding.metadata,
    )


class _Step:
    """The metric and its slope at some points of nodes of one location: a copy of the batch for each."""

    def __init__(self, contrast: Contrast, whole: Location, points: Float[Tensor, "..."]) -> None:
        self.contrast, self.whole, self.points = contrast, whole, points

    def __call__(self, piece: Sequence[_Point]) -> tuple[Tensor, Tensor]:
        """(point, batch) of both."""
        contrast, whole, batch = self.contrast, self.whole, len(self.contrast.measured)
        graph = per_copy(contrast.graph, batch).hook(whole, self._moved(piece))
        entry = contrast.entries[whole]
        run = run_copies(graph, contrast.base, entry, len(piece), metric=contrast.metric, save=[whole.grad])
        delta = contrast.deltas[whole]
        gradients = run[whole.grad].split(batch)
        slopes = [
            (read(node, gradient) * read(node, delta)).flatten(1).sum(1)
            for (node, _), gradient in zip(piece, gradients, strict=True)
        ]
        return run.measured.view(-1, batch), torch.stack(slopes)

    def _moved(self, piece: Sequence[_Point]) -> Callable[[Tensor], Tensor]:
        clean, corrupt = (x[self.whole] for x in (self.contrast.clean, self.contrast.corrupt))
        batch = len(self.contrast.measured)

        def move(value: Tensor) -> Tensor:
            result = value.clone()
            for i, (node, k) in enumerate(piece):
                here = slice(i * batch, (i + 1) * batch)
                moved = torch.lerp(read(node, clean), read(node, corrupt), float(self.points[k]))
                result[here] = write(node, result[here], moved)
            return result

        return move
