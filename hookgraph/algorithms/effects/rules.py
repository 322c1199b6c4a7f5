"""Attribution patching with repaired gradients: RelP and AtP*."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.effects.gradients import Estimate, Tensors, estimate
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import Contrast, contracted
from hookgraph.algorithms.streams import RESIDUALS, updates_of_all_stacks
from hookgraph.errors import HookGraphError, MetricError, UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import TRANSFORMER_STACKS, AttentionTypes
from hookgraph.ontology.weights import W_gate

_VECTORS = (Dimension.D_HEAD, Dimension.D_MODEL)
"""Axes along which AtP* takes one node."""
_LARGEST = 80.0
"""exp(80) is finite in single precision."""
_ATTENTIONS: Mapping[LocationType, AttentionTypes] = {
    kind: found
    for stack in TRANSFORMER_STACKS
    for found in (stack.attention, stack.cross_attention)
    for kind in (found.q, found.k)
}
"""Which attention, of which stack, queries and keys belong to."""
_MADE_INTO: Mapping[LocationType, LocationType] = {
    kind: found.pattern
    for stack in TRANSFORMER_STACKS
    for found in (stack.attention, stack.cross_attention)
    for kind in (
        found.q_pre, found.k_pre, found.q_in, found.k_in, found.q, found.k, found.scores, found.pattern
    )
    if kind is not None
}  # fmt: skip
"""What acts through a pattern alone, and through which."""


def relp(contrast: Contrast) -> Estimate:
    """delta · dm/dnode, the gradient taken under rules of layer-wise relevance propagation.

    Norm scales and attention patterns are constants; a nonlinearity f passes gradient f(x)/x, its secant;
    the product of a gated MLP gives half of the gradient to each factor. Where a model lacks one of these
    locations, its own gradient stands.

    Raises:
        MetricError: a place acts through an attention pattern alone.

    Source: Jafari et al., "RelP", arXiv:2508.21258.
    """
    graph, halved = contrast.graph, set[Location]()
    for place in contrast.places:
        pattern = _MADE_INTO.get(place.type)
        if pattern is not None and pattern[place.layer or 0] in graph.locations:
            raise MetricError(
                f"relp holds attention patterns constant, so nothing flows through {place}: use attrib, ig "
                "or atp_star there"
            )
    for location in contrast.graph.locations:
        if location.site is None and location.type.name.rpartition(".")[2] in ("ln_scale", "pattern"):
            graph = graph.stop_gradient(location)
    after_of = {stack.MLP_PRE: stack.MLP_POST for stack in TRANSFORMER_STACKS}
    for before in (x for x in contrast.graph.locations if x.type in after_of):
        after = after_of[before.type][before.layer or 0]
        if after in contrast.graph.locations:
            gated = _is_gated(graph, before)
            graph = _by_secant(graph, before, after, share=0.5 if gated else 1.0)
            halved |= {after} if gated else set()
    run = graph.run(
        contrast.inputs, save=[p.grad for p in contrast.places], metric=contrast.metric, logits=False
    )
    # The neurons' own gradient is that before it is shared between the factors.
    grads = {p: run[p.grad] * (2.0 if p.whole in halved else 1.0) for p in contrast.places}
    return estimate(contrast, grads)


def _is_gated(graph: HookGraph, inside: Location) -> bool:
    try:
        graph.weight(W_gate, inside.layer, inside.type.stack)
    except UnknownLocationError:
        return False
    return True


def _by_secant(graph: HookGraph, before: Location, after: Location, *, share: float) -> HookGraph:
    """The graph whose gradient at `before` is that at `after` times after / before."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def hook(value: Tensor) -> None:
            seen[name] = value.detach()

        return hook

    def divide(gradient: Tensor) -> Tensor:
        seen["gradient"] = gradient * share
        return seen["gradient"]

    def secant(gradient: Tensor) -> Tensor:
        at_zero = seen["before"] == 0
        slope = seen["after"] / torch.where(at_zero, torch.ones_like(gradient), seen["before"])
        return torch.where(at_zero, gradient, seen["gradient"] * slope)

    graph = graph.hook(before, keep("before")).hook(after, keep("after"))
    return graph.hook(after.grad, divide).hook(before.grad, secant)


def atp_star(contrast: Contrast, progress: bool | None) -> Estimate:
    """Mean over layers of |delta · dm/dnode|, each time with one layer's updates cut out of the gradient.

    The layers are those of all stacks.

    A node is a vector: its effect is summed over d_head and d_model before the absolute value is taken. What
    is one node by its type, such as an error, keeps the axis with size 1, as by every other method.
    A layer's own inside is not averaged over the pass that cuts this layer off. For queries and keys the
    change of the pattern is computed exactly and only what follows it is linear:

    * query at q: Σ_t g_t (softmax(scores')_t - p_t), with scores' those of the corrupt query;
    * key at t: Σ_q p_t (e^δ - 1)(g_t - Σ_j p_j g_j) / (1 + p_t (e^δ - 1)), δ the change of that score,

    where p is the clean row of the pattern and g the metric's gradient with respect to it.

    Raises:
        HookGraphError: a query or key is attributed in a layer without scores and pattern.

    Source: Kramár et al., "AtP*", arXiv:2403.00745.
    """
    changes = {p: _pattern_change(contrast, p) for p in contrast.places if p.type in _ATTENTIONS}
    patterns = dict.fromkeys(_pattern(p) for p in changes)
    plain = [p for p in contrast.places if p not in changes]
    wanted = [x.grad for x in (*patterns, *plain)]
    updates = _updates(contrast.graph)
    vectors = {d for p in contrast.places for d in p.dims if d in _VECTORS and d not in p.type.joint}
    reduced = {dim: "sum" for dim in _VECTORS if dim in vectors}
    sums: Tensors = {}
    counts: dict[Location, int] = {}
    with Progress("AtP*", len(updates), shown=progress) as bar:
        for layer, cut in updates.items():
            graph = contrast.graph
            for location in cut:
                graph = graph.hook(location.grad, torch.zeros_like)
            run = graph.run(contrast.inputs, save=wanted, metric=contrast.metric, logits=False)
            for place in contrast.places:
                if layer == _layer(place.root) and len(updates) > 1 and not _in_stream(place.root):
                    continue
                effect = _effect(contrast, place, changes, run, reduced)
                sums[place] = sums.get(place, torch.zeros_like(effect)) + effect.abs()
                counts[place] = counts.get(place, 0) + 1
            bar.advance()
    return Estimate({p: sums[p] / counts[p] for p in contrast.places}, {}, reduced=reduced)


Change = Callable[[Float[Tensor, "batch head pos key_pos"]], Float[Tensor, "..."]]
"""The gradient of the pattern -> the effect of each query or key, through the pattern."""


def _effect(
    contrast: Contrast,
    place: Location,
    changes: Mapping[Location, Change],
    run: Mapping[Location, Tensor],
    reduced: Mapping[Dimension, str],
) -> Float[Tensor, "..."]:
    """The signed effect of each node at a place."""
    if place in changes:
        return changes[place](run[_pattern(place).grad])
    effect = (contrast.corrupt[place] - contrast.clean[place]) * run[place.grad]
    axes = [i for i, d in enumerate(place.dims) if d in reduced]
    return contracted(place, effect).sum(axes) if axes else contracted(place, effect)


def _pattern_change(contrast: Contrast, place: Location) -> Change:
    """How the pattern changes with each query, or key, of a layer."""
    graph, kind = contrast.graph, _ATTENTIONS[place.type]
    scores, pattern = kind.scores[place.layer or 0], _pattern(place)
    if place.index:
        raise HookGraphError(f"{place}: atp_star takes queries and keys of a whole layer: {place.whole}")
    try:
        clean = graph.run(contrast.inputs, save=[scores, pattern])
    except UnknownLocationError as error:
        raise HookGraphError(f"atp_star at {place} needs scores and pattern: {error}") from error
    corrupt = contrast.corrupt[place]
    # One pass for all: a score depends on one query and one key.
    moved = graph.hook(place, SetTo(corrupt)).run(contrast.inputs, save=[scores])[scores]
    # Many models compute the softmax in single precision, whatever their own.
    p, before, moved = (x.to(corrupt.dtype) for x in (clean[pattern], clean[scores], moved))
    if place.type == kind.q:
        shift = moved.softmax(-1)[..., : p.shape[-1]] - p
        return lambda g: (g * shift).sum(-1).mT
    delta = (moved - before)[..., : p.shape[-1]].nan_to_num(nan=0.0)
    grown = p * delta.clamp(max=_LARGEST).expm1()
    heads = corrupt.shape[2]

    def by_key(g: Tensor) -> Tensor:
        mean = (p * g).sum(-1, keepdim=True)
        through = ((g - mean) * grown / (1 + grown)).sum(2)
        return through.unflatten(1, (heads, -1)).sum(2).mT

    return by_key


def _pattern(place: Location) -> Location:
    """The pattern that a query or key makes."""
    return _ATTENTIONS[place.type].pattern[place.layer or 0]


_Layer = tuple[str, int | None]
"""A layer of a stack."""


def _layer(location: Location) -> _Layer:
    return location.type.stack, location.layer


def _updates(graph: HookGraph) -> dict[_Layer, list[Location]]:
    """What each layer adds to its stream."""
    found: dict[_Layer, list[Location]] = {}
    for location in updates_of_all_stacks(graph):
        found.setdefault(_layer(location), []).append(location)
    return found


def _in_stream(location: Location) -> bool:
    """Whether a location is the stream itself, rather than the inside of an update."""
    return location.type.name in {kind.name for kind in RESIDUALS}
