"""What writers add to the stream, and by how much it changes from clean to corrupt."""

from contextlib import suppress
from dataclasses import dataclass
from typing import final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.circuits.components import Writer
from hookgraph.errors import UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location
from hookgraph.ontology.weights import W_O, b_O

_ROUNDING = 1e-3
_TOKENS = 256
"""The heads' results of so many tokens are made at once."""


@final
@dataclass(frozen=True, eq=False)
class Change:
    """By how much a writer changes.

    Args:
        writer: which.
        delta: corrupt - clean: of z of every head, else of what is added.
        weight: W_O, where each head's part of the update is z W_O; None where a norm or more follows, and
            where the writer is no head.
    """

    writer: Writer
    delta: Float[Tensor, "..."]
    weight: Float[Tensor, "..."] | None

    def along(self, slopes: Float[Tensor, "..."], run: Run) -> Float[Tensor, "..."]:
        """Σ over examples, positions and the stream of change · gradient: (nodes of the writer, gradients).

        Args:
            slopes: gradients at the stream, one after the other.
            run: the pass they are of, for the way from z into the stream where it is not linear.
        """
        flat = slopes.flatten(1, 2)
        if not self.writer.dims:
            return (flat.flatten(1) @ self.delta.to(flat).flatten())[None]
        if self.weight is None:
            return self._tangents(run).flatten(1).to(flat) @ flat.flatten(1).T
        total = flat.new_zeros(self.delta.shape[2], len(flat))
        delta = self.delta.to(flat).flatten(0, 1)
        for start in range(0, len(delta), _TOKENS):
            rows = slice(start, start + _TOKENS)
            made = torch.einsum("the,hed->htd", delta[rows], self.weight.to(flat))
            total += made.flatten(1) @ flat[:, rows].flatten(1).T
        return total

    def _tangents(self, run: Run) -> Float[Tensor, "..."]:
        """By how much the update changes with each head, to first order: a gradient of a gradient."""
        out, z = run[self.writer.update], run[self.writer.place]
        probe = torch.zeros_like(out, requires_grad=True)
        (back,) = torch.autograd.grad(out, z, probe, create_graph=True)
        heads = torch.eye(z.shape[2]).to(z)[:, None, None, :, None]
        moves = heads * self.delta.to(z)
        (found,) = torch.autograd.grad(back, probe, moves, is_grads_batched=True, retain_graph=True)
        return found


def change_of(graph: HookGraph, writer: Writer, clean: Run, corrupt: Run | None) -> Change:
    """The change of a writer; without a corrupt run, zero stands in."""
    place = writer.place if writer.dims else writer.update
    before = clean[place].detach()
    delta = (torch.zeros_like(before) if corrupt is None else corrupt[place].detach()) - before
    return Change(writer, delta, head_weight(graph, writer, clean) if writer.dims else None)


def head_weight(graph: HookGraph, writer: Writer, run: Run) -> Float[Tensor, "..."] | None:
    """W_O, if what attention adds is Σ_h z[h] W_O[h] + b in a run."""
    try:
        weight = graph.weight(W_O, writer.place.layer).detach()
    except UnknownLocationError:
        return None
    z, out = run[writer.place].detach(), run[writer.update].detach()
    made = torch.einsum("bshe,hed->bsd", z, weight.to(z))
    with suppress(UnknownLocationError):
        made = made + graph.weight(b_O, writer.place.layer).detach().to(made)
    return weight if (made - out).norm() <= _ROUNDING * out.norm() else None


def results(
    delta: Float[Tensor, "batch pos head d_head"], weight: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """What each head adds: (head, batch, pos, d_model)."""
    return rearrange(torch.einsum("bshe,hed->bshd", delta, weight.to(delta)), "b s h d -> h b s d")


def places_written(writers: list[Writer]) -> list[Location]:
    """What is to be saved to know the changes of writers."""
    return list(dict.fromkeys(x for w in writers for x in ((w.place, w.update) if w.dims else (w.update,))))
