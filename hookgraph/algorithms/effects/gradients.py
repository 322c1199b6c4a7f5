"""Effects from gradients: at the clean point, or averaged on the way from clean to corrupt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.copies import USUAL_REASONS, finite_metric, per_copy, run_copies
from hookgraph.algorithms.effects.lines import Line, line
from hookgraph.algorithms.effects.quadrature import Quadrature, check_rule, nodes_and_weights
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

    Raises:
        HookGraphError: an unknown rule, or a number of steps that it cannot have.
    """

    quadrature: Quadrature
    steps: int
    tolerance: float | None
    batch_size: int

    def __post_init__(self) -> None:
        check_rule(self.quadrature, self.steps)


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
    steps: int = 0
    """The most points that an integral took."""


@final
@dataclass(frozen=True, eq=False)
class _Integral:
    """Mean gradients, what is missing from their adding up, and the steps that they took."""

    grads: Tensors
    residual: Float[Tensor, " batch"]
    steps: int
    within: bool
    """Whether the residual is within the tolerance."""


def attribution(contrast: Contrast) -> Estimate:
    """delta · dm/dnode at the clean point, for all places at once."""
    grads = {place: contrast.base[place.grad] for place in contrast.places}
    return estimate(contrast, grads)


def integrated(contrast: Contrast, path: Path, progress: bool | None) -> Estimate:
    """delta · the mean of dm/dnode from clean to corrupt, moving one site at a time.

    With z(α) = (1 - α) clean + α corrupt at the site and everything else as in the clean run, the effects
    at a site add up to m(clean | site := corrupt) - m(clean), up to the residual.
    """
    sites = contrast.sites()
    integrals: dict[Location, _Integral] = {}
    with Progress("integrated gradients", len(sites), shown=progress) as bar:
        for site in sites:
            deltas = {place: contrast.deltas[place] for place in site}
            way = line(contrast, site)
            change = _endpoint(contrast, site, way) - contrast.measured
            found = _adapted(path, partial(_mean_gradients, contrast, site, way, path), deltas, change)
            integrals.update(dict.fromkeys(site, found))
            bar.advance()
    found = estimate(contrast, {place: integrals[place].grads[place] for place in contrast.places})
    return replace(
        found,
        residuals={place: x.residual for place, x in integrals.items()},
        incomplete=tuple(place for place, x in integrals.items() if not x.within),
        steps=max(x.steps for x in integrals.values()),
    )


def integrated_over_inputs(contrast: Contrast, path: Path, progress: bool | None) -> Estimate:
    """delta · the mean of dm/dnode while the embeddings move from clean to corrupt: `steps` rows in all.

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
    batch = len(contrast.measured)
    save = [place.grad for place in dict.fromkeys([*contrast.places, *embeddings])]
    with Progress("integrated gradients", None if path.tolerance else path.steps, shown=progress) as bar:

        def means(steps: int) -> Tensors:
            nodes, weights = nodes_and_weights(path.quadrature, steps)

            def work(piece: Sequence[int]) -> Run:
                edited = per_copy(graph, batch)
                for place, end in ends.items():
                    edited = edited.hook(place, SetTo(_between(clean[place], end, nodes[list(piece)])))
                return run_copies(edited, contrast.base, None, len(piece), metric=contrast.metric, save=save)

            found: Tensors = {}
            for piece, run in in_pieces(range(steps), max(1, path.batch_size // batch), work):
                _accumulate(found, run, weights[list(piece)])
                bar.advance(len(piece))
            return found

        whole = _adapted(path, means, {x: end - clean[x] for x, end in ends.items()}, change)
    found = estimate(contrast, {place: whole.grads[place] for place in contrast.places})
    return replace(
        found,
        residuals=dict.fromkeys(embeddings, whole.residual),
        incomplete=() if whole.within else tuple(embeddings),
        steps=whole.steps,
    )


def _adapted(
    path: Path, means: Callable[[int], Tensors], deltas: Tensors, change: Float[Tensor, " batch"]
) -> _Integral:
    """Mean gradients with as many steps as the tolerance takes.

    Args:
        path: how to integrate.
        means: the gradients averaged over so many steps.
        deltas: what moves, which changes the metric by Σ delta · mean gradient, up to the residual.
        change: by how much it does.
    """
    steps = path.steps
    while True:
        found = means(steps)
        parts = [(delta * found[x]).reshape(len(change), -1).sum(1) for x, delta in deltas.items()]
        residual = torch.stack(parts).sum(0) - change
        within = path.tolerance is None or _small(residual, change, path.tolerance)
        if within or steps >= _MOST_STEPS:
            return _Integral(found, residual, steps, within)
        steps = min(2 * steps, _MOST_STEPS)


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


def _mean_gradients(
    contrast: Contrast, site: Sequence[Location], way: Line, path: Path, steps: int
) -> Tensors:
    """Σ w_k dm/dz(α_k) at the places of one site."""
    nodes, weights = nodes_and_weights(path.quadrature, steps)
    entry, batch = contrast.entry(site), len(contrast.measured)

    def work(piece: Sequence[int]) -> Run:
        graph = per_copy(contrast.graph, batch)
        for place, start in way.start.items():
            graph = graph.hook(place, SetTo(_between(start, way.end[place], nodes[list(piece)])))
        save = [place.grad for place in way.start]
        return run_copies(graph, contrast.base, entry, len(piece), metric=contrast.metric, save=save)

    means: Tensors = {}
    for piece, run in in_pieces(range(steps), max(1, path.batch_size // batch), work):
        _accumulate(means, run, weights[list(piece)])
    return way.back(means)


def _accumulate(means: Tensors, run: Run, weights: Float[Tensor, "..."]) -> None:
    for gradient, value in run.items():
        place, found = gradient.activation, value.unflatten(0, (len(weights), -1))
        part = torch.tensordot(weights.to(found), found, dims=1)
        means[place] = means[place] + part if place in means else part


def _between(
    clean: Float[Tensor, "batch ..."], corrupt: Float[Tensor, "batch ..."], nodes: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """(1 - α) clean + α corrupt for each α, one after the other along the batch."""
    alpha = nodes.to(clean).view(-1, *([1] * clean.ndim))
    return torch.lerp(clean[None], corrupt[None], alpha).flatten(0, 1)


def _endpoint(contrast: Contrast, site: Sequence[Location], way: Line) -> Float[Tensor, " batch"]:
    """m(clean | site := corrupt)."""
    graph = contrast.graph
    for place, end in way.end.items():
        graph = graph.hook(place, SetTo(end))
    run = run_copies(graph, contrast.base, contrast.entry(site), 1, metric=contrast.metric)
    return finite_metric(run)


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
                f"the gradient of the metric at {place} is not a finite number: {USUAL_REASONS}"
            )
    return Estimate(effects, grads)
