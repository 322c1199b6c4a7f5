"""`patching_effect`: how much each node matters for a metric."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, get_args

from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.arguments import positive_number, whole_number
from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.effects import rules
from hookgraph.algorithms.effects.enumeration import counted, has_positions, measured_exactly
from hookgraph.algorithms.effects.exact import effects_of, exact_effects
from hookgraph.algorithms.effects.examples import Examples, by_examples, joined
from hookgraph.algorithms.effects.footprint import rows_that_fit
from hookgraph.algorithms.effects.gradients import (
    Estimate,
    Path,
    attribution,
    integrated,
    integrated_over_inputs,
)
from hookgraph.algorithms.effects.quadrature import Quadrature, least_steps
from hookgraph.algorithms.effects.results import Convention, PatchingEffect
from hookgraph.algorithms.interventions.replacements import check_one_contrast, means_instead
from hookgraph.algorithms.interventions.statistics import AblationStatistics
from hookgraph.algorithms.pairs import check_apart
from hookgraph.algorithms.sites import Contrast, chosen_places, joint_axes
from hookgraph.errors import HookGraphError, MetricError, nearest
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.ontology.autoencoder import ERROR
from hookgraph.ontology.locations import Location

Method: TypeAlias = Literal["attrib", "ig", "ig_inputs", "exact", "atp_star", "relp"]

_INTEGRALS = ("ig", "ig_inputs")
_SEEN: Mapping[str, Callable[..., Contrast]] = {
    "attrib": Contrast.with_gradients,
    "ig": Contrast.with_entries,
    "exact": Contrast.for_patches,
}
"""What the clean run keeps for a method; for the others, the values alone."""


def patching_effect(
    graph: HookGraph,
    clean: Inputs,
    corrupt: Inputs | None,
    metric: Metric,
    at: Sequence[Location],
    method: Method = "attrib",
    *,
    steps: int = 10,
    quadrature: Quadrature = "gauss-legendre",
    tolerance: float | None = None,
    joint: Sequence[str] = (),
    statistics: AblationStatistics | None = None,
    batch_size: int = 256,
    max_memory: int | None = None,
    progress: bool | None = None,
) -> PatchingEffect:
    """How m(clean) would change if a node were set to its corrupt value.

    With delta = corrupt - clean at a node, the effect is by

    * `attrib`, attribution patching: delta · dm/dnode at the clean point, for all locations in one forward
      and backward pass of clean and one forward pass of corrupt.
    * `ig`, integrated gradients: delta · the mean of dm/dnode on the way from clean to corrupt, one site
      at a time; latents and error of a dictionary move together. The effects at a site add up to what
      patching the whole site changes, up to `.residuals`.
    * `ig_inputs`: the same with the embeddings moving, which takes `steps` passes for all locations.
    * `exact`: the change itself, each node patched alone. Where delta is 0 the effect is.
    * `atp_star`: `attrib` with the change of attention patterns computed exactly for queries and keys, and
      averaged absolute effects over passes with one layer's gradient dropped. Not signed.
    * `relp`: `attrib` with norm scales and patterns constant, nonlinearities by their secant, and products
      of gated MLPs shared in halves.

    Args:
        graph: the hooked model.
        clean: what is run.
        corrupt: as many tokens with the same mask; None stands for zero in every node, or for its mean.
        metric: logits -> one number per example.
        at: locations or parts of locations, latents and errors too, mixed freely.
        method: see above.
        steps: points of the path integral.
        quadrature: the rule of the path integral.
        tolerance: for `ig` and `ig_inputs`: double the steps, up to 64, until each residual is at most this
            share of what its site, or all embeddings together, change. `.incomplete` names the locations
            where 64 do not suffice; `.convention.steps` is the most that were taken.
        joint: axes whose coordinates are one node, such as `d_head`: their effects are added up, or, by
            `exact`, patched together. An error's coordinates always are.
        statistics: means from `mean_activations`, to stand in where `corrupt` is None.
        batch_size: how many rows are run at once, at most. Where memory does not suffice, fewer are.
        max_memory: how many bytes a pass may take, at most: the method's largest is measured over one
            example, and as many rows are run at once as fit, up to `batch_size`.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Returns:
        Effects over the axes of each location, (batch, pos, ...), to be reduced by name.

    Raises:
        HookGraphError: an unknown method, a tolerance for one without steps, means beside corrupt inputs, or
            means for `ig_inputs`; a batch with hooks that has to be divided; inputs that `ig_inputs` cannot
            move.
        LocationError: no axis is called like a joint one.
        UnknownLocationError: the graph has no such location.
        ShapeMismatchError: clean and corrupt differ in shape or mask.
        MetricError: the metric is not one finite number per example, or does not depend on a location.

    Source: Nanda, "Attribution patching" (2023); Syed et al., arXiv:2310.10348; Marks et al.,
    arXiv:2403.19647 (ig); Kramár et al., arXiv:2403.00745 (atp_star); Jafari et al., arXiv:2508.21258
    (relp).
    """
    if method not in get_args(Method):
        raise HookGraphError(f"unknown method {method!r}: {nearest(method, get_args(Method))}")
    check_one_contrast(corrupt, statistics)
    if statistics is not None and method == "ig_inputs":
        raise HookGraphError(
            "ig_inputs moves the embeddings to those of corrupt inputs: means of nodes are none"
        )
    places, joint = chosen_places(graph, at), joint_axes(joint)
    _check_gradients(graph, places, method)
    _check_positions(graph, clean, places)
    path = _path(method, quadrature, steps, tolerance, batch_size)
    ablation = "mean" if statistics is not None else "zero" if corrupt is None else "corrupt"

    def contrast(part: Examples) -> Contrast:
        seen = _SEEN.get(method, Contrast.of)
        instead = means_instead(graph, part.clean, statistics)
        return seen(graph, part.clean, part.corrupt, part.metric, places, instead=instead)

    def measure(part: Examples) -> PatchingEffect:
        seen = contrast(part)
        if method != "exact":
            check_apart(graph, seen.inputs, seen.base)
        estimate = _estimate(method, seen, path, joint, progress)
        return _result(seen, estimate, _convention(graph, method, path, estimate, ablation))

    examples = Examples.of(graph, clean, corrupt, metric)
    if max_memory is not None:
        rows = rows_that_fit(examples, lambda part: _largest_pass(method, contrast(part), path), max_memory)
        path = replace(path, batch_size=min(path.batch_size, rows))
    found = joined(by_examples(examples, path.batch_size, measure))
    reduced = [dim for dim in joint if any(dim in found.dims(x) for x in found.effects)]
    found = found.sum(*reduced) if reduced else found

    def remeasure(nodes: Sequence[Location]) -> Float[Tensor, "... batch"]:
        return exact_effects(
            graph, clean, corrupt, metric, nodes, statistics=statistics,
            columns=counted(nodes, places), batch_size=path.batch_size, progress=progress,
        )  # fmt: skip

    return replace(found, _remeasure=remeasure)


def _estimate(
    method: Method, contrast: Contrast, path: Path, joint: Sequence[str], progress: bool | None
) -> Estimate:
    match method:
        case "attrib":
            return attribution(contrast)
        case "ig":
            return integrated(contrast, path, progress)
        case "ig_inputs":
            return integrated_over_inputs(contrast, path, progress)
        case "exact":
            return measured_exactly(contrast, joint, path.batch_size, progress)
        case "atp_star":
            return rules.atp_star(contrast, progress)
        case "relp":
            return rules.relp(contrast)


def _largest_pass(method: Method, contrast: Contrast, path: Path) -> None:
    """Take the passes of a method that need the most memory: over one copy of the examples each."""
    first = min(contrast.places, key=lambda place: place.order)
    rough = replace(path, steps=least_steps(path.quadrature), tolerance=None, batch_size=1)
    if method == "exact":
        effects_of(contrast, [first], batch_size=1, progress=False)
        return
    if method == "ig":
        contrast = replace(contrast, places=[first])
    _estimate(method, contrast, rough, (), progress=False)


def _path(
    method: Method, quadrature: Quadrature, steps: int, tolerance: float | None, batch_size: int
) -> Path:
    """How to integrate, also for methods that do not: what is given to all of them is looked at.

    Raises:
        HookGraphError: a tolerance for a method without steps, or numbers that cannot be.
    """
    if tolerance is not None and method not in _INTEGRALS:
        raise HookGraphError(
            f"tolerance={tolerance}: {method} takes no steps that could be adapted to it: leave it out, or "
            f"use {' or '.join(_INTEGRALS)}"
        )
    share = None if tolerance is None else positive_number("tolerance", tolerance)
    return Path(quadrature, whole_number("steps", steps), share, whole_number("batch_size", batch_size))


def _check_positions(graph: HookGraph, clean: Inputs, places: Sequence[Location]) -> None:
    """Refuse places whose positions would be counted in two ways.

    Raises:
        HookGraphError: a location stands beside some of its positions, in a batch in which positions of the
            columns are not those of the tokens.
    """
    parts = {place.whole for place in places if has_positions(place)}
    both = parts & {place.whole for place in places if not has_positions(place)}
    if both and graph.binding.place(graph.binding.prepare(clean)) is not None:
        raise HookGraphError(
            f"{both.pop()} and some of its positions: in a batch with padding the first count "
            "columns, the others tokens: ask for them one after the other"
        )


def _check_gradients(graph: HookGraph, places: Sequence[Location], method: Method) -> None:
    """Refuse to follow gradients that a dictionary does not pass on.

    Raises:
        MetricError: a place has no other.
    """
    constant = {
        (s.name, x) for s in graph.subgraphs if s.splice_gradient == "reconstruction" for x in s.sites
    }
    for place in places:
        if method != "exact" and place.type == ERROR and (place.subgraph, place.site) in constant:
            raise MetricError(
                f"{place} is a constant where splice_gradient='reconstruction': inject the dictionary with "
                "'identity', or leave its error out"
            )


def _convention(
    graph: HookGraph, method: Method, path: Path, estimate: Estimate, ablation: str
) -> Convention:
    gradients = sorted({s.splice_gradient for s in graph.subgraphs} - {""})
    return Convention(
        method,
        ablation=ablation,
        quadrature=path.quadrature if method in _INTEGRALS else "",
        steps=estimate.steps,
        splice_gradient=", ".join(gradients) or "identity",
        tolerance=path.tolerance,
    )


def _result(contrast: Contrast, estimate: Estimate, convention: Convention) -> PatchingEffect:
    return PatchingEffect(
        Attribution(estimate.effects, estimate.reduced),
        Attribution(contrast.deltas),
        Attribution(estimate.grads),
        contrast.total,
        convention,
        estimate.residuals,
        estimate.incomplete,
        contrast.graph.binding.metadata,
    )
