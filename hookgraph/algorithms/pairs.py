"""Clean and corrupt inputs: what must agree before they are compared."""

from dataclasses import replace

import torch
from torch import Tensor

from hookgraph.errors import HookGraphError, MetricError, ShapeMismatchError
from hookgraph.graph.abstract import Inputs, Prepared
from hookgraph.graph.examples import named_tensors, rows_of
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run


def prepare_pair(graph: HookGraph, clean: Inputs, corrupt: Inputs | None) -> tuple[Prepared, Prepared | None]:
    """Both inputs as the model takes them.

    Raises:
        HookGraphError: the model draws random numbers, so that two passes over the same inputs differ.
        ShapeMismatchError: they have other shapes, another mask, or other positions.
    """
    first = graph.binding.prepare(clean)
    if drawn := graph.binding.draws(first):
        raise HookGraphError(
            f"this model draws {drawn} in every pass, which would be measured as an effect: call "
            "model.eval() first; where it draws in evaluation too, give it what it draws, if it takes that"
        )
    if corrupt is None:
        return first, None
    second = graph.binding.prepare(corrupt)
    ours, theirs = named_tensors(first), named_tensors(second)
    for name in sorted({*ours, *theirs}, key=_rank):
        a, b = ours.get(name), theirs.get(name)
        if "mask" in name:
            _check_masks(name, a, b)
            continue
        shapes = [None if x is None else tuple(x.shape) for x in (a, b)]
        if shapes[0] != shapes[1]:
            raise ShapeMismatchError(
                f"clean and corrupt differ in {name}: {shapes[0]} and {shapes[1]}. "
                "Positions are compared one by one, so both need as many tokens"
            )
        if name == "position_ids" and a is not None and b is not None and not torch.equal(a, b):
            raise ShapeMismatchError(
                "clean and corrupt have different position_ids: positions are compared one by one, so both "
                "need the same"
            )
    return first, second


def check_apart(graph: HookGraph, inputs: Prepared, run: Run) -> None:
    """Refuse gradients where a model compares each example with each, as pictures with texts: what one of
    them does to the metric of another cannot be told apart.

    Args:
        graph: the hooked model.
        inputs: the clean inputs.
        run: their run, with a metric.

    Raises:
        MetricError: there are several examples.
    """
    count = len(run.measured)
    if count == 1 or run.columns != count:
        return
    plain = replace(graph, registrations=(), subgraphs=())
    alone = plain.run(rows_of(inputs, slice(0, 1), count)).logits
    if alone.shape[1:] == (1,):
        raise MetricError(
            f"the model compares each of the {count} examples with each, so the gradient at one of them is "
            "not of its own metric alone: give one example, or use method='exact'"
        )


def _rank(name: str) -> tuple[int, str]:
    """The order of comparison: masks and positions differ where lengths do, positions where masks do."""
    return (2 if name == "position_ids" else int("mask" in name)), name


def _check_masks(name: str, a: Tensor | None, b: Tensor | None) -> None:
    """A mask that is not given masks nothing.

    Raises:
        ShapeMismatchError: the masks are not the same.
    """
    given = a if a is not None else b
    if given is None:
        return
    a, b = (torch.ones_like(given) if x is None else x for x in (a, b))
    if not torch.equal(a, b):
        raise ShapeMismatchError(
            f"clean and corrupt have different attention masks ({name}): pad both alike, since a position "
            "that is masked in one only cannot be compared"
        )
