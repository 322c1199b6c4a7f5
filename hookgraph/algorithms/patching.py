"""`patching_effect`: how much each node matters for a metric."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.exact import exact_effects
from hookgraph.algorithms.pairs import prepare_pair
from hookgraph.algorithms.results import Convention, PatchingEffect
from hookgraph.errors import HookGraphError, nearest
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.ontology.locations import Location
from hookgraph.ontology.passes import PassType

Method: TypeAlias = Literal["attrib"]
_METHODS: tuple[Method, ...] = ("attrib",)


def patching_effect(
    graph: HookGraph,
    clean: Inputs,
    corrupt: Inputs | None,
    metric: Metric,
    at: Sequence[Location],
    method: Method = "attrib",
) -> PatchingEffect:
    """How m(clean) would change if a node were set to its corrupt value.

    `attrib` (attribution patching): effect = (corrupt - clean) · dm/dnode at the clean point, for all
    locations in one forward and backward pass of clean and one forward pass of corrupt. A first-order
    estimate: `.check(top=k)` measures the top nodes exactly.

    Args:
        graph: the hooked model.
        clean: what is run.
        corrupt: as many tokens with the same mask; None stands for zero in every node.
        metric: logits -> one number per example.
        at: locations or parts of locations, mixed freely.
        method: how effects are estimated.

    Returns:
        Effects over the axes of each location, (batch, pos, ...), to be reduced by name.

    Raises:
        UnknownLocationError: the graph has no such location.
        ShapeMismatchError: clean and corrupt differ in shape or mask.
        MetricError: the metric is not one number per example, or does not depend on a location.

    Source: Nanda, "Attribution patching" (2023); Syed et al., arXiv:2310.10348.
    """
    if method not in _METHODS:
        raise HookGraphError(f"unknown method {method!r}: {nearest(method, _METHODS)}")
    places = list(dict.fromkeys(at))
    if not places:
        raise HookGraphError("nothing to patch: `at` names no location")
    for place in places:
        if place.pass_type is PassType.BACKWARD:
            raise HookGraphError(f"{place} is a gradient: name the activation")
    first, second = prepare_pair(graph, clean, corrupt)
    run = graph.run(first, save=[*places, *(p.grad for p in places)], metric=metric)
    if second is None:
        deltas: Mapping[Location, Float[Tensor, "..."]] = {p: -run[p] for p in places}
        total = None
    else:
        other = graph.run(second, save=places, metric=metric)
        deltas = {p: other[p] - run[p] for p in places}
        total = None if other.metric is None or run.metric is None else other.metric - run.metric
    grads = {p: run[p.grad] for p in places}

    def remeasure(nodes: Sequence[Location]) -> Float[Tensor, "... batch"]:
        return exact_effects(graph, first, second, metric, nodes)

    return PatchingEffect(
        {p: deltas[p] * grads[p] for p in places},
        deltas,
        grads,
        total,
        Convention(method, ablation="zero" if second is None else "corrupt"),
        metadata=graph.binding.metadata,
        _remeasure=remeasure,
    )
