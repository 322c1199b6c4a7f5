"""Edits of many rows in one pass: row i of a batch of equal rows is what one edit makes of it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hookgraph.graph.hook_graph import HookGraph
from hookgraph.hooks.masking import masked_cells
from hookgraph.ontology.locations import Location

_RULED_OUT: Final = 1e30
"""Logits of this size are no measurements."""


def rows_of(graph: HookGraph, example: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """The example as a batch of `count` equal rows."""
    return graph.binding.prepare(dict(example), copies=count)


def replace_rows(first: int, new: Shaped[Tensor, "batch ..."]) -> Callable[[Tensor], Tensor]:
    """A hook that puts these values in the place of as many rows, from the first one on."""
    return partial(_replaced, first, new)


def _replaced(first: int, new: Tensor, value: Tensor) -> Tensor:
    value = value.clone()
    value[first : first + new.shape[0]] = new
    return value


def live(location: Location, value: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Cells that are not masked: masked scores and ruled-out logits stay as they are."""
    if location.type.name.endswith("scores"):
        return ~masked_cells(value)
    return value.abs() < _RULED_OUT


def unmasked(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The logits with 0 for tokens that a model rules out by infinity, or by the lowest number there is."""
    return torch.where(logits.abs() < _RULED_OUT, logits, 0.0)


def inside_kernel(location: Location) -> bool:
    """Whether a layer leaves its fused kernel where a location of it is looked at."""
    return location.type.name.split(".")[-1] in ("scores", "pattern", "expert_post", "expert_out")
