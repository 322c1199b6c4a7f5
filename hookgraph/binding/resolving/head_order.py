"""In which order heads are counted that lie on two axes, groups and heads of a group: as projections do.

A product has these axes in either order; the features of the projection that returns the queries, and of the
one that is given z, are in one row.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from hookgraph.binding.data.views import Axes
from hookgraph.binding.resolving.projections import PRODUCTS, as_input, as_weighted_input
from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import ALIASES, Value

_ON_TWO_AXES = 5
"""Batch, groups, heads of a group, positions and features."""


def orders_of_heads(
    trace: Trace, within: Call, query: Value | None, out: Value | None, views: Sequence[Axes | None]
) -> frozenset[bool]:
    """Whether the second axis of heads counts before the first, as queries and z have it: two if they differ.

    Args:
        trace: the pass.
        within: the layer.
        query: what is multiplied with the keys: batch, two axes of heads, positions, features.
        out: z, as it is made.
        views: how z lies with the first axis before the second, and the other way round.
    """
    of_queries = None if query is None else _of_queries(query)
    of_out = None if out is None else _of_out(trace, within, out, views)
    return frozenset(x for x in (of_queries, of_out) if x is not None)


def are_shared_in_turn(letters: str, shared: str, keys: Shaped[Tensor, "..."]) -> bool:
    """Whether every so many heads, and not heads in a row, have the same keys or values.

    Args:
        letters: of the axes of the keys or values.
        shared: those of the batch and of the heads, in the order in which heads are counted.
        keys: the keys or values.
    """
    several = [x in letters and keys.shape[letters.index(x)] > 1 for x in shared[1:]]
    return several == [False, True]


def _of_queries(query: Value) -> bool | None:
    """By where the features of each head lie in what a projection returns, or in what came of that."""
    path: list[Value] = []
    here = query
    while here.op not in PRODUCTS and here.inputs:
        size = here.tensor.numel()
        source = next((v for v in here.inputs if not v.is_source and v.tensor.numel() == size), None)
        if source is None or not (here.op in ALIASES or source.tensor.shape == here.tensor.shape):
            break
        path += [here] if here.op in ALIASES else []
        here = source
    if here.tensor.ndim >= _ON_TWO_AXES or query.tensor.ndim != _ON_TWO_AXES:
        return None
    numbers = torch.arange(here.tensor.numel()).view(here.tensor.shape)
    for step in reversed(path):
        moved = None if step.replay is None else step.replay(numbers)
        if not isinstance(moved, Tensor):
            return None
        numbers = numbers if moved.is_floating_point() else moved  # a cast moves nothing
    return _order_of(numbers[0, :, :, 0, 0])


def _of_out(trace: Trace, within: Call, out: Value, views: Sequence[Axes | None]) -> bool | None:
    for turned, view in enumerate(views):
        if as_input(trace, out, view, within) or as_weighted_input(trace, out, view, within):
            return bool(turned)
    return None


def _order_of(first: Int[Tensor, "..."]) -> bool | None:
    """Whether the numbers of each head's first feature grow along columns first; None if neither way."""
    for turned, numbers in ((False, first), (True, first.mT)):
        if bool((numbers.flatten().diff() > 0).all()):
            return turned
    return None
