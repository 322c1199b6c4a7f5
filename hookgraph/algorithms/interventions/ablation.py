"""`ablate`: a graph without what locations tell it: zero, their mean, another example's value, a constant."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch

from hookgraph.algorithms.interventions.replacements import Constant, Drawn, Shuffled
from hookgraph.algorithms.interventions.samples import ActivationSamples
from hookgraph.algorithms.interventions.statistics import MADE_BY, AblationStatistics
from hookgraph.algorithms.sites import chosen_places
from hookgraph.errors import HookGraphError, nearest
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.hooks.editing import Hook
from hookgraph.hooks.positions import ByPosition
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

AblationMode: TypeAlias = Literal["zero", "mean", "resample", "optimal"]


def ablate(
    graph: HookGraph,
    at: Sequence[Location],
    mode: AblationMode = "mean",
    *,
    statistics: AblationStatistics | ActivationSamples | None = None,
    seed: int = 0,
) -> HookGraph:
    """A graph in which locations, or parts of them, say nothing of their own example.

    * `zero`: x -> 0.
    * `mean`: x -> its mean over a data set, from `mean_activations`.
    * `resample`: x[b] -> x[σ(b)] of the same pass, σ a permutation that moves every example, token by token
      where rows are padded: where row σ(b) has no such token, from the next row of the cycle; or, with what
      `sample_activations` drew from a data set, x -> some of that. Either is drawn from `seed` for the
      size of the batch: the same for every location and every pass.
    * `optimal`: x -> the constant with which the model does best, from `optimal_constants`.

    Args:
        graph: the hooked model.
        at: what is ablated.
        mode: see above.
        statistics: what `mean` and `optimal` put in place, and what `resample` draws from.
        seed: of `resample`.

    Raises:
        HookGraphError: an unknown mode, statistics of another kind or that lack a location; when it is run,
            a batch of one example to resample, or a position that a single row has.
        UnknownLocationError: the graph has no such location.
        ShapeMismatchError: when it is run, a longer input than means per position, or whole examples, were
            taken of.

    Source: Wang et al., arXiv:2211.00593 (mean); Chan et al., "Causal scrubbing" (2022) (resample);
    Li & Janson, arXiv:2409.09951 (optimal).
    """
    if mode not in get_args(AblationMode):
        raise HookGraphError(f"unknown ablation {mode!r}: {nearest(mode, get_args(AblationMode))}")
    for place in chosen_places(graph, at):
        graph = graph.hook(*placed(place, _replacement(place, mode, statistics, seed)))
    return graph


def placed(place: Location, hook: Hook) -> tuple[Location, Hook]:
    """Where a replacement is registered, and as what, so that it is told positions if it asks for them.

    A column of a pass is another position while decoding, and behind padding.
    """
    if (isinstance(hook, Constant) and hook.per_position) or (isinstance(hook, Drawn) and hook.by_token):
        return place.at(pos=slice(0, None)), ByPosition(hook.at)
    if isinstance(hook, Shuffled) and Dimension.POS in place.type.dims:
        return hook.location, ByPosition(hook.at)
    return place, hook


def _replacement(
    place: Location, mode: AblationMode, statistics: AblationStatistics | ActivationSamples | None, seed: int
) -> Hook:
    """What stands in for a location.

    Raises:
        HookGraphError: the mode needs other statistics.
    """
    if mode == "zero" and statistics is None:
        return torch.zeros_like
    if mode == "resample" and statistics is None:
        return Shuffled.of(place, seed)
    if mode == "resample" and isinstance(statistics, ActivationSamples):
        return statistics.hook(place, seed)
    if mode in ("mean", "optimal") and isinstance(statistics, AblationStatistics):
        return Constant(place, statistics.of(place, mode))
    if mode == "zero":
        raise HookGraphError("zero ablation takes no statistics: leave them out, or use mode='mean'")
    found = f", not {type(statistics).__name__}" if statistics is not None else ""
    made = "sample_activations" if mode == "resample" else MADE_BY[mode]
    raise HookGraphError(f"{mode} ablation needs statistics={made}(graph, data, at){found}")
