"""Equations between locations, and those that an architecture leaves out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.ontology.locations import Location

Values: TypeAlias = Mapping[Location, Float[Tensor, "..."]]
Sides: TypeAlias = Callable[[Values], tuple[Tensor, Tensor]]


@final
@dataclass(frozen=True, slots=True)
class Identity:
    """Two expressions that are equal.

    Args:
        text: the equation.
        about: an edit at any of these locations must leave it true.
        sides: both expressions, from the values of all locations.
        also: other locations of which it is true as long as nothing is edited.
    """

    text: str
    about: tuple[Location, ...]
    sides: Sides
    also: tuple[Location, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Unapplied:
    """An equation that is not claimed of a model, between locations that it has, and why."""

    text: str
    about: tuple[Location, ...]
    why: str


def agrees(expected: Tensor, got: Tensor) -> bool:
    """Whether an equation holds on the clean values: where a norm or a multiplier comes between it does not,
    and is not claimed.
    """
    return expected.shape == got.shape and torch.allclose(expected, got, rtol=1e-3, atol=1e-5)
