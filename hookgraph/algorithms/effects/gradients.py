"""Effects from gradients: at the clean point, or averaged on the way from clean to corrupt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.copies import finite_metric, per_copy, run_copies
from hookgraph.algorithms.effects.quadrature import Quadrature, nodes_and_weights
from hookgraph.algorithms.effects.tails import same
from hookgraph.algorithms.memory import in_pieces
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import Contrast, contracted
from hookgraph.errors import HookGraphError, MetricError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import EMBED

Tensors = dict[Location, Float[Tensor, "..."]]

_MOST_STEPS = 64
"""Adaptive steps are doubled up to this number."""


@final
@dataclass(frozen=True, eq=False)
class Path:
    """How to integrate from clean to corrupt.

    Args:
        quadrature: the rule.
        steps: how many points.
        tolerance: double the steps, up to 64, until the residual of each example is at most this share of
            what the site changes; None takes `steps` as they are.
        batch_size: how many rows are run at once, at most.
    """

    quadrature: Quadrature
    steps: int
    tolerance: float | None
    batch_size: int


@final
@dataclass(frozen=True, eq=False)
class Estimate:
    """Effects, the gradients they were made of, and how far they are from adding up."""

    effects: Tensors
    grads: Tensors
    residuals: Tensors = field(default_factory=dict[Location, Tensor])
    incomplete: tuple[Location, ...] = ()
    """The places whose residual exceeds the tolerance."""
    reduced: Mapping[Dimension, str] = field(default_factory=dict[Dimension, str])
    """Axes that the effects do not have any more."""


def attribution(contrast: Contrast) -> Estimate:
    """delta · dm/dnode at the clean point, for all places at once."""
    grads = {place: contrast.base[place.grad] for place in contrast.places}
    return estimate(contrast, grads)


def integrated(contrast: Contrast, path: Path, progress: bool | None) -> Estimate:
    """delta · the mean of dm/dnode from clean to corrupt, moving one site at a time.

    With z(α) = (1 - α) clean + α corrupt at the site and everything else as in the clean run, the effects
    at a site add up to m(clean | site := corrupt) - m(clean), up to the residual.
    """
    grads: Tensors = {}
    residuals: Tensors = {}
    incomplete: list[Location] = []
    sites = contrast.sites()
    with Progress("integrated gradients", len(sites), shown=progress) as bar:
        for site in sites:
            change = _endpoint(contrast, site) - contrast.measured
            steps = path.steps
            while True:
                found = _mean_gradients(contrast, site, path, steps)
                residual = _total(contrast, site, found) - change
                if path.tolerance is None or steps >= _MOST_STEPS or _small(residual, change, path.tolerance):
                    break
                steps = min(2 * steps, _MOST_STEPS)
            grads.update(found)
            residuals.update(dict.fromkeys(site, residual))
            if path.tolerance is not None and not _small(residual, change, path.tolerance):
                incomplete += site
            bar.advance()
    found = estimate(contrast, {place: grads[place] for place in contrast.places})
    return Estimate(found.effects, found.grads, residuals, tuple(incomplete))


def integrated_over_inputs(contrast: Contrast, path: Path, progress: bool | None) -> Estimate:
    """delta · the mean of dm/dnode while the embeddings move from clean to corrupt: `steps` passes in all.

    Those of an encoder move together with those of the decoder. The residual at an embedding is what the
    effects of all of them add up to, less m(corrupt) - m(clean).

    Raises:
        HookGraphError: the graph has no embeddings, hooks them, or inputs differ that no embedding carries.
    """
    graph = contrast.graph
    embeddings = [x for x in graph.locations if x.type.name == EMBED.type.name]
    if not embeddings:
        raise HookGraphError(f"ig_inputs moves the embeddings: {graph.binding.why_absent(EMBED)}")
    clean = graph.run(contrast.inputs, save=embeddings)
    other = contrast.other
    corrupt = None if other is None else graph.run(other, save=embeddings)
    ends = {x: torch.zeros_like(clean[x]) if corrupt is None else corrupt[x] for x in embeddings}
    change = _at_end(contrast, graph, ends)
    nodes, weights = nodes_and_weights(path.quadrature, path.steps)
    batch = len(contrast.measured)
    wanted = list(dict.fromkeys([*contrast.places, *embeddings]))
    means: Tensors = {}
    with Progress("integrated gradients", path.steps, shown=progress) as bar:

        def work(piece: Sequence[int]) -> Run:
            edited = per_copy(graph, batch)
            for place, end in ends.items():
                edited = edited.hook(place, SetTo(_between(clean[place], end, nodes[list(piece)])))
            save = [place.grad for place in wanted]
            return run_copies(edited, contrast.base, None, len(piece), metric=contrast.metric, save=save)

        for piece, run in in_pieces(range(path.steps), max(1, path.batch_size // batch), work):
            _accumulate(means, wanted, run, weights[list(piece)])
            bar.advance(len(piece))
    parts = [((end - clean[x]) * means[x]).reshape(batch, -1).sum(1) for x, end in ends.items()]
    residual = torch.stack(parts).sum(0) - change
    found = estimate(contrast, {place: means[place] for place in contrast.places})
    return replace(found, residuals=dict.fromkeys(embeddings, residual))


def _at_end(contrast: Contrast, graph: HookGraph, ends: Tensors) -> Float[Tensor, " batch"]:
    """How much the metric changes if every embedding is at its end, with nothing else changed.

    Raises:
        HookGraphError: that is not what the corrupt inputs change.
    """
    edited = graph
    for place, end in ends.items():
        edited = edited.hook(place, SetTo(end))
    clean, other, total = contrast.measured, contrast.other, contrast.total
    end = finite_metric(edited.run(contrast.inputs, metric=contrast.metric, logits=False))
    if other is not None and total is not None and not same(end, clean + total):
        moved = ", ".join(map(str, ends))
        raise HookGraphError(
            f"ig_inputs moves {moved} from clean to corrupt, and that alone does not make the clean inputs "
            "the corrupt ones: they differ in something else that the model reads, such as a picture. Use ig"
        )
    return end - clean


def _mean_gradients(contrast: Contrast, site: Sequence[Location], path: Path, steps: int) -> Tensors:
    """Σ w_k dm/dz(α_k) at the places of one site."""
    nodes, weights = nodes_and_weights(path.quadrature, steps)
    entry, batch = contrast.entry(site), len(contrast.measured)

    def work(piece: Sequence[int]) -> Run:
        graph = per_copy(contrast.graph, batch)
        for place in site:
            moved = _between(contrast.clean[place], contrast.corrupt[place], nodes[list(piece)])
            graph = graph.hook(place, SetTo(moved))
        save = [place.grad for place in site]
        return run_copies(graph, contrast.base, entry, len(piece), metric=contrast.metric, save=save)

    means: Tensors = {}
    for piece, run in in_pieces(range(steps), max(1, path.batch_size // batch), work):
        _accumulate(means, site, run, weights[list(piece)])
    return means


def _accumulate(means: Tensors, places: Sequence[Location], run: Run, weights: Float[Tensor, "..."]) -> None:
    for place in places:
        found = run[place.grad].unflatten(0, (len(weights), -1))
        part = torch.tensordot(weights.to(found), found, dims=1)
        means[place] = means[place] + part if place in means else part


def _between(
    clean: Float[Tensor, "batch ..."], corrupt: Float[Tensor, "batch ..."], nodes: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """(1 - α) clean + α corrupt for each α, one after the other along the batch."""
    alpha = nodes.to(clean).view(-1, *([1] * clean.ndim))
    return torch.lerp(clean[None], corrupt[None], alpha).flatten(0, 1)


def _endpoint(contrast: Contrast, site: Sequence[Location]) -> Float[Tensor, " batch"]:
    """m(clean | site := corrupt)."""
    graph = contrast.graph
    for place in site:
        graph = graph.hook(place, SetTo(contrast.corrupt[place]))
    run = run_copies(graph, contrast.base, contrast.entry(site), 1, metric=contrast.metric)
    return finite_metric(run)


def _total(contrast: Contrast, site: Sequence[Location], grads: Tensors) -> Float[Tensor, " batch"]:
    """The sum of the effects at a site, per example."""
    parts = [(contrast.deltas[p] * grads[p]).reshape(len(grads[p]), -1).sum(1) for p in site]
    return torch.stack(parts).sum(0)


def _small(residual: Float[Tensor, " batch"], change: Float[Tensor, " batch"], tolerance: float) -> bool:
    return bool((residual.abs() <= tolerance * change.abs() + 1e-9 * change.abs().max()).all())


def estimate(contrast: Contrast, grads: Tensors) -> Estimate:
    """delta · gradient at every place.

    Raises:
        MetricError: one is not a finite number.
    """
    deltas = contrast.deltas
    effects = {p: contracted(p, deltas[p] * grads[p]) for p in contrast.places}
    for place, effect in effects.items():
        if not bool(effect.isfinite().all()):
            raise MetricError(
                f"the gradient of the metric at {place} is not a finite number: a log or a root of what may "
                "fall to 0, or an overflow in half precision, are usual reasons"
            )
    return Estimate(effects, grads)
