"""The straight line from clean to corrupt that a site moves along, and where in the model it is walked.

What goes on from a dictionary is linear in its latents and its error. Where they move along a line, so does
the value at the dictionary's site, and the gradient at latents is the gradient there, through the decoder:

    z(α) = (1 - α) clean + α corrupt   gives   x(α) = x + α push(corrupt - clean),    dm/dz = pushᵀ dm/dx

So the line is walked at the site, and there is one copy of the latents, however many steps it takes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.sites import Contrast, subgraph_of
from hookgraph.graph.abstract import AbstractSubgraph
from hookgraph.ontology.locations import Location

Tensors = dict[Location, Float[Tensor, "..."]]


@final
@dataclass(frozen=True, eq=False)
class Line:
    """What is put where.

    Args:
        start: the clean values, by location.
        end: the corrupt ones.
        back: from gradients at these locations to those at the places of the site.
    """

    start: Mapping[Location, Float[Tensor, "..."]]
    end: Mapping[Location, Float[Tensor, "..."]]
    back: Callable[[Tensors], Tensors]


def line(contrast: Contrast, site: Sequence[Location]) -> Line:
    """Where the places of one site move together."""
    carrier = contrast.carrier(site)
    if carrier is None:
        return Line({p: contrast.clean[p] for p in site}, {p: contrast.corrupt[p] for p in site}, dict)
    subgraph = subgraph_of(contrast.graph, site[0])
    x = contrast.base[carrier]
    rows = x.flatten(0, 1).flatten(1)
    with torch.no_grad():
        moved = [subgraph.push(p, rows, contrast.deltas[p].flatten(0, 1)).view_as(x) for p in site]
    end = x + torch.stack(moved).sum(0)
    return Line({carrier: x}, {carrier: end}, partial(_back, contrast, site, subgraph, carrier))


def _back(
    contrast: Contrast,
    site: Sequence[Location],
    subgraph: AbstractSubgraph,
    carrier: Location,
    found: Tensors,
) -> Tensors:
    """pushᵀ of the gradient at the carrier."""
    rows = contrast.base[carrier].flatten(0, 1).flatten(1)
    gradients: Tensors = {}
    for place in site:
        delta = contrast.deltas[place]
        # Not the delta itself: where latents do not change there is a gradient, too.
        probe = torch.ones_like(delta).requires_grad_()
        with torch.enable_grad():
            pushed = subgraph.push(place, rows, probe.flatten(0, 1))
        (gradients[place],) = torch.autograd.grad(pushed, probe, found[carrier].flatten(0, 1).flatten(1))
    return gradients
