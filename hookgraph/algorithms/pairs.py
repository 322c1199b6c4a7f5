"""Clean and corrupt inputs: what must agree before they are compared."""

import torch
from torch import Tensor

from hookgraph.errors import ShapeMismatchError
from hookgraph.graph.abstract import Inputs, Prepared
from hookgraph.graph.hook_graph import HookGraph


def prepare_pair(graph: HookGraph, clean: Inputs, corrupt: Inputs | None) -> tuple[Prepared, Prepared | None]:
    """Both inputs as the model takes them.

    Raises:
        ShapeMismatchError: they have other shapes or another attention mask.
    """
    first = graph.binding.prepare(clean)
    if corrupt is None:
        return first, None
    second = graph.binding.prepare(corrupt)
    for name in sorted({*first, *second}):
        a, b = first.get(name), second.get(name)
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else None for x in (a, b)]
        if shapes[0] != shapes[1]:
            raise ShapeMismatchError(
                f"clean and corrupt differ in {name}: {shapes[0]} and {shapes[1]}. "
                "Positions are compared one by one, so both need as many tokens"
            )
        if (
            name == "attention_mask"
            and isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and not torch.equal(a, b)
        ):
            raise ShapeMismatchError(
                "clean and corrupt have different attention masks: pad both alike, since a position that is "
                "masked in one only cannot be compared"
            )
    return first, second
