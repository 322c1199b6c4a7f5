"""`activation_patching`: patch every layer, position, head, neuron or latent in turn, and measure."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.copies import finite_metric
from hookgraph.algorithms.effects.enumeration import counted, moving
from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.examples import Examples, by_examples, joined
from hookgraph.algorithms.effects.footprint import rows_at_once
from hookgraph.algorithms.effects.results import Convention, PatchingEffect
from hookgraph.algorithms.pairs import prepare_pair
from hookgraph.algorithms.parts import part_of
from hookgraph.algorithms.sites import axes_of, chosen_places
from hookgraph.errors import HookGraphError, nearest
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.graph.run import Run
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

Direction: TypeAlias = Literal["noising", "denoising"]

TOGETHER = "patched together"
"""What was done to an axis along which the coordinates are one node."""


def activation_patching(
    graph: HookGraph,
    clean: Inputs,
    corrupt: Inputs | None,
    metric: Metric,
    at: Sequence[Location],
    *,
    over: Sequence[str] = ("pos",),
    direction: Direction = "noising",
    batch_size: int = 256,
    max_memory: int | None = None,
    progress: bool | None = None,
) -> PatchingEffect:
    """What patching each node alone changes, exactly: for a map of layers and positions, or of heads.

    `noising` runs clean and sets a node to its corrupt value, which shows what the behaviour needs:
    effect = m(clean | node := corrupt) - m(clean). `denoising` runs corrupt and sets it to its clean value,
    which shows what suffices: effect = m(corrupt | node := clean) - m(corrupt).

    A node is one index along each axis in `over`, with everything along the other axes but the batch:

    * `graph.every(RESID_POST)`, over `["pos"]`: the layer x position map.
    * `graph.every(ATTN_Z)`, over `["head"]`: the layer x head map.
    * `[MLP_POST[2]]`, over `["d_mlp"]`: neurons; `[sae.latents]`, over `["latent"]`: latents.

    Args:
        graph: the hooked model.
        clean: the inputs with the behaviour.
        corrupt: as many tokens with the same mask; None, for noising, sets nodes to zero.
        metric: logits -> one number per example.
        at: locations or parts of locations, mixed freely; each is divided along the axes that it has.
        over: the axes along which nodes are told apart.
        direction: see above; recorded as the result's `convention.sign`.
        batch_size: how many rows are run at once, at most. Where memory does not suffice, fewer are.
        max_memory: how many bytes the tensors of a pass may take; the memory of one is measured first.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Returns:
        Effects over (batch, *over), 0 without a pass of its own where both runs agree. In `total_effect`
        what patching everything changes.

    Raises:
        HookGraphError: an unknown direction, or denoising without corrupt inputs.
        LocationError: no location has an axis named in `over`.
        UnknownLocationError: the graph has no such location.
        ShapeMismatchError: clean and corrupt differ in shape or mask.
        MetricError: the metric is not one finite number per example, in some run.

    Source: Vig et al., arXiv:2004.12265; Meng et al., arXiv:2202.05262; Heimersheim & Nanda,
    arXiv:2404.15255 (noising and denoising).
    """
    if direction not in get_args(Direction):
        raise HookGraphError(f"unknown direction {direction!r}: {nearest(direction, get_args(Direction))}")
    places = chosen_places(graph, at)
    axes = axes_of(places, over)
    denoising = direction == "denoising"
    if denoising and corrupt is None:
        raise HookGraphError("denoising runs the corrupt inputs: give them, or use direction='noising'")
    start, other = (corrupt, clean) if denoising and corrupt is not None else (clean, corrupt)

    def seen(part: Examples) -> tuple[Run, Run | None]:
        first, second = prepare_pair(graph, part.clean, part.corrupt)
        reach = partial(graph.run, save=places, metric=part.metric, logits=False)
        return reach(first), None if second is None else reach(second)

    def all_of(place: Location, run: Run) -> list[Location]:
        return nodes_over(place, axes, dict(zip(place.dims, run[place].shape, strict=True)))

    def largest(part: Examples) -> object:
        run, end = seen(part)
        first = min(places, key=lambda place: place.order)
        found = all_of(first, run)
        kept = {"columns": counted(found, places), "batch_size": 1, "progress": False}
        nodes = [found[0], found[-1]]
        return run, end, exact_effects(graph, part.clean, part.corrupt, part.metric, nodes, **kept)

    def measure(part: Examples) -> PatchingEffect:
        run, end = seen(part)
        moving = {x: _moving(x, axes, run[x], None if end is None else end[x]) for x in places}
        nodes: dict[Location, list[Location]] = {}
        for x in places:
            moves = moving[x].flatten().tolist()
            nodes[x] = [node for node, moved in zip(all_of(x, run), moves, strict=True) if moved]
        every = [node for found in nodes.values() for node in found]
        kept = {"columns": counted(every, places), "batch_size": rows, "progress": progress}
        effects = exact_effects(graph, part.clean, part.corrupt, part.metric, every, **kept)
        sign = "clean - corrupt" if denoising else "corrupt - clean"
        stands_in = "zero" if corrupt is None else "clean" if denoising else "corrupt"
        return PatchingEffect(
            _shaped(effects, nodes, moving, axes),
            Attribution({}),
            Attribution({}),
            None if end is None else finite_metric(end) - finite_metric(run),
            Convention("activation patching", sign, stands_in),
            metadata=graph.binding.metadata,
            _remeasure="it is exact already: every node was patched alone",
        )

    examples = Examples.of(graph, start, other, metric)
    rows = rows_at_once(batch_size, max_memory, examples, largest)
    return joined(by_examples(examples, rows, measure))


def _moving(
    place: Location,
    axes: Sequence[Dimension],
    before: Shaped[Tensor, "..."],
    after: Shaped[Tensor, "..."] | None,
) -> Bool[Tensor, "..."]:
    """Which nodes patching changes in any example; without a second run, those that are not zero already."""
    after = torch.zeros_like(before) if after is None else after
    moved = moving(after - before, before, after)
    joint = [i for i, d in enumerate(place.dims[1:]) if d not in axes]
    return moved.amax(joint) if joint else moved


def nodes_over(place: Location, axes: Sequence[Dimension], sizes: dict[Dimension, int]) -> list[Location]:
    """The parts of a place that are one node each, the last axis fastest."""
    told = [d for d in place.dims if d in axes]
    return [
        part_of(place, dict(zip(told, index, strict=True)), sizes)
        for index in product(*(range(sizes[d]) for d in told))
    ]


def _shaped(
    effects: Float[Tensor, "... batch"],
    nodes: Mapping[Location, Sequence[Location]],
    moving: Mapping[Location, Bool[Tensor, "..."]],
    axes: Sequence[Dimension],
) -> Attribution:
    """Effects of nodes, one after the other, by place: over the batch and the axes that tell nodes apart."""
    values: dict[Location, Tensor] = {}
    done = 0
    for place, found in nodes.items():
        values[place] = effects.new_zeros(effects.shape[1], *moving[place].shape)
        values[place][:, moving[place]] = effects[done : done + len(found)].T
        done += len(found)
    joint = {d for place in nodes for d in place.dims} - {*axes, Dimension.BATCH}
    return Attribution(values, dict.fromkeys(sorted(joint), TOGETHER))
