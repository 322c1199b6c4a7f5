"""Pictures one after another on one axis, as vision towers take them: no axis tells the examples apart.

A table beside them has a row per picture: how many patches it has in time, height and width. The rows of
everything else are the patches of all pictures, as many as the table says.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hookgraph.errors import InputError

_TABLE_AXES = 2


def counted_by(inputs: Mapping[str, Any]) -> str:
    """The argument with a row per example, where all else lies packed; empty where batches are an axis."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.ndim >= _TABLE_AXES}
    for name, table in tensors.items():
        others = [x for other, x in tensors.items() if other != name]
        if table.ndim != _TABLE_AXES or table.is_floating_point() or not others:
            continue
        patches = int(table.prod(-1).sum())
        if all(x.is_floating_point() and x.shape[0] == patches for x in others):
            return name
    return ""


def examples_in(inputs: Mapping[str, Any], table: str) -> int:
    """How many pictures there are, given the name of their table.

    Raises:
        InputError: they differ in size, so that they do not lie in one tensor with an axis for the batch.
    """
    sizes: Tensor = inputs[table].prod(-1)
    if bool((sizes != sizes[0]).any()):
        raise InputError(
            f"the pictures have {', '.join(str(int(x)) for x in sizes)} patches, by {table}: locations have "
            "one axis for positions, so give pictures with as many patches each"
        )
    return len(sizes)


def repeated(inputs: Mapping[str, Any], table: str, copies: int) -> dict[str, Any]:
    """The arguments for `copies` batches one after the other."""
    count = len(inputs[table])

    def again(value: object) -> object:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] % count == 0:
            return torch.cat([value] * copies)
        return value

    return {name: again(value) for name, value in inputs.items()}
