"""Exact patching: set one node to its corrupt value in the clean run, and measure.

Nodes are packed into one batch, and only the blocks after the first patched location are executed.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.pairs import prepare_pair
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.graph.run import Run
from hookgraph.hooks.slicing import read, write
from hookgraph.ontology.locations import Location


def exact_effects(
    graph: HookGraph,
    clean: Inputs,
    corrupt: Inputs | None,
    metric: Metric,
    nodes: Sequence[Location],
    *,
    batch_size: int = 256,
) -> Float[Tensor, "... batch"]:
    """m(clean with the node set to its corrupt value) - m(clean), for each node and example.

    Args:
        graph: the hooked model.
        clean: what is run.
        corrupt: where the nodes' values come from; None sets them to zero.
        metric: logits -> one number per example.
        nodes: parts of locations, such as one head at one position.
        batch_size: how many rows are run at once, at most.

    Raises:
        UnknownLocationError: the graph has no such location.
        ShapeMismatchError: clean and corrupt differ in shape or mask.
    """
    first, second = prepare_pair(graph, clean, corrupt)
    wholes = list(dict.fromkeys(node.whole for node in nodes))
    if second is None:
        values: Mapping[Location, Tensor] = {}
    else:
        values = graph.run(second, save=wholes)
    effects: list[Tensor] = []
    for entry, group in _by_entry(graph, nodes):
        base = graph.run(first, save=[] if entry is None else [entry], metric=metric)
        effects += _measure_group(graph, base, entry, group, values, metric, batch_size)
    order = [node for _, group in _by_entry(graph, nodes) for node in group]
    by_node = dict(zip(order, effects, strict=True))
    return torch.stack([by_node[node] for node in nodes])


def _by_entry(graph: HookGraph, nodes: Sequence[Location]) -> list[tuple[Location | None, list[Location]]]:
    """Nodes by the boundary between blocks at which a replay that patches them may start."""
    groups: dict[Location | None, list[Location]] = {}
    for node in dict.fromkeys(nodes):
        groups.setdefault(graph.entry(node), []).append(node)
    return list(groups.items())


def _measure_group(
    graph: HookGraph,
    base: Run,
    entry: Location | None,
    nodes: Sequence[Location],
    values: Mapping[Location, Tensor],
    metric: Metric,
    batch_size: int,
) -> list[Float[Tensor, " batch"]]:
    if base.metric is None:
        raise ValueError("the clean run was measured")
    batch = len(base.metric)
    if entry is None:
        return [_one(graph, base, node, values, metric) - base.metric for node in nodes]
    effects: list[Tensor] = []
    size = max(1, batch_size // batch)
    for i in range(0, len(nodes), size):
        packed = nodes[i : i + size]
        patched = graph
        for row, node in enumerate(packed):
            rows = slice(row * batch, (row + 1) * batch)
            patched = patched.hook(node.whole, _patch(node, values.get(node.whole), rows))
        value = base[entry].repeat(len(packed), *([1] * (base[entry].ndim - 1)))
        run = patched.replay(base, entry, value=value)
        effects += [metric(part) - base.metric for part in run.logits.split(batch)]
    return effects


def _one(
    graph: HookGraph, base: Run, node: Location, values: Mapping[Location, Tensor], metric: Metric
) -> Float[Tensor, " batch"]:
    patched = graph.hook(node.whole, _patch(node, values.get(node.whole), slice(None)))
    return metric(patched.run(base.inputs).logits)


def _patch(node: Location, corrupt: Tensor | None, rows: slice) -> Callable[[Tensor], Tensor]:
    """Set the node to its corrupt value, or to zero, in some rows of the batch."""

    def patch(value: Tensor) -> Tensor:
        clean = value[rows]
        part = torch.zeros_like(read(node, clean)) if corrupt is None else read(node, corrupt)
        result = value.clone()
        result[rows] = write(node, clean, part)
        return result

    return patch
