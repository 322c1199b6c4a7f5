"""Every node of some places, measured exactly."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from hookgraph.algorithms.effects.exact import effects_of
from hookgraph.algorithms.effects.gradients import Estimate
from hookgraph.algorithms.parts import part_of
from hookgraph.algorithms.sites import Contrast
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

_SAME = 1e-12
"""What changes by no more than this share of itself is the same: rounding."""


def measured_exactly(
    contrast: Contrast, joint: Sequence[str], batch_size: int, progress: bool | None
) -> Estimate:
    """The effect of every coordinate where clean and corrupt differ, each patched alone.

    Along joint axes the coordinates are patched together, and the effects have size 1.
    """
    deltas = contrast.deltas
    wanted: dict[Location, list[tuple[list[int], Location]]] = {}
    shapes: dict[Location, list[int]] = {}
    for place in contrast.places:
        moving = _moving(place, contrast, joint)
        shapes[place] = [len(deltas[place]), *moving.shape]
        axes = [(d, d in place.type.joint or d in joint) for d in place.dims[1:]]
        wanted[place] = []
        sizes = dict(zip(place.dims, deltas[place].shape, strict=True))
        for index in moving.nonzero().tolist():
            point = {d: i for (d, together), i in zip(axes, index, strict=True) if not together}
            wanted[place].append((index, part_of(place, point, sizes)))
    nodes = [node for found in wanted.values() for _, node in found]
    whole = [p for p in contrast.places if not has_positions(p)]
    columns = {node for place in whole for _, node in wanted[place]}
    measured = iter(effects_of(contrast, nodes, batch_size, progress, columns))
    effects = {place: contrast.measured.new_zeros(shape) for place, shape in shapes.items()}
    for place, found in wanted.items():
        for index, _ in found:
            effects[place][(slice(None), *index)] = next(measured)
    return Estimate(effects, {})


def has_positions(place: Location) -> bool:
    """Whether a place is some positions only, which count the tokens of each row."""
    return any(dim is Dimension.POS for dim, _ in place.index)


def counted(nodes: Sequence[Location], places: Sequence[Location]) -> set[Location]:
    """The nodes of results at whole places: their positions count columns of the batch."""
    parts = {place.whole for place in places if has_positions(place)}
    return {node for node in nodes if node.whole not in parts}


def moving(
    delta: Shaped[Tensor, "batch ..."],
    before: Shaped[Tensor, "batch ..."],
    after: Shaped[Tensor, "batch ..."],
) -> Bool[Tensor, "..."]:
    """Which entries differ in any example, by more than rounding."""
    size = torch.maximum(before.abs(), after.abs())
    return (delta.abs() > _SAME * size).any(0)


def _moving(place: Location, contrast: Contrast, joint: Sequence[str]) -> Bool[Tensor, "..."]:
    """Which nodes differ in any example: over the axes of the place but the batch."""
    moved = moving(contrast.deltas[place], contrast.clean[place], contrast.corrupt[place])
    together = [i for i, d in enumerate(place.dims[1:]) if d in place.type.joint or d in joint]
    return moved.amax(together, keepdim=True) if together else moved
