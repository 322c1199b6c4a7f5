"""Dictionaries differentiated row by row: of each position only the latents that count.

With f = enc(x), x̂ = dec(f) and e = x - x̂, all read as functions of x:

    pull, latents:  Σ_i left_i df_i/dx            push, latents:  Σ_i delta_i W_dec[i]
    pull, error:    left - (dx̂/dx)ᵀ left          push, error:    delta
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.errors import SubgraphError
from hookgraph.ontology.autoencoder import ERROR, LATENTS, LATENTS_PRE, RECONSTRUCTION
from hookgraph.ontology.locations import LocationType
from hookgraph.subgraphs.dictionary import Autoencoder, Opaque

_ROWS = 512
"""As many rows are encoded at once, so that what all latents need stays small."""


def pulled(
    coder: Autoencoder | Opaque,
    kind: LocationType,
    x: Float[Tensor, "batch d_model"],
    left: Float[Tensor, "..."],
    chosen: Int[Tensor, " batch"] | None,
) -> Float[Tensor, "batch d_model"]:
    """The gradient with respect to x of Σ left · (latents, latents before activation, x̂ or error)."""
    parts: list[Tensor] = []
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        one = None if chosen is None else chosen[rows]
        with torch.enable_grad():
            here = x[rows].detach().requires_grad_()
            total = (_read(coder, kind, here, one) * left[rows]).sum()
            parts.append(torch.autograd.grad(total, here)[0])
    return torch.cat(parts) if parts else x.detach()


def _read(coder: Autoencoder | Opaque, kind: LocationType, x: Tensor, chosen: Tensor | None) -> Tensor:
    """The values at a location as functions of x; with `chosen` one of each row."""
    if kind == ERROR:
        return x - coder.decode(coder.encode(x), x)
    if kind == RECONSTRUCTION:
        return coder.decode(coder.encode(x), x)
    if kind == LATENTS_PRE and not isinstance(coder, Autoencoder):
        raise SubgraphError("a dictionary that only encodes and decodes has no latents before activation")
    if chosen is not None and isinstance(coder, Autoencoder):
        distinct, places = chosen.unique(return_inverse=True)
        part = coder.part(distinct)
        coder, chosen = (coder, chosen) if part is None else (part, places)
    found = coder.encode_pre(x) if kind == LATENTS_PRE and isinstance(coder, Autoencoder) else coder.encode(x)
    return found if chosen is None else found.gather(1, chosen[:, None])[:, 0]


def pushed(
    coder: Autoencoder | Opaque,
    kind: LocationType,
    x: Float[Tensor, "batch d_model"],
    delta: Float[Tensor, "..."],
    chosen: Int[Tensor, " batch"] | None,
) -> Float[Tensor, "batch d_model"]:
    """The change of what goes on if the values at a location change by delta, to first order.

    Raises:
        SubgraphError: the values there do not go on by themselves: they are those before the activation.
    """
    if kind in (ERROR, RECONSTRUCTION):
        return delta
    if kind != LATENTS:
        raise SubgraphError(f"{kind} goes on through the latents only: take edges from the latents")
    if isinstance(coder, Autoencoder):
        if chosen is None:
            return coder.change(delta, x).to(x.dtype)
        return coder.moved(delta, chosen, x).to(x.dtype)
    parts: list[Tensor] = []
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        parts.append(_along(coder, x[rows], delta[rows], None if chosen is None else chosen[rows]))
    return torch.cat(parts) if parts else x


def _along(coder: Opaque, x: Tensor, delta: Tensor, chosen: Tensor | None) -> Tensor:
    """The derivative of a decoder of which nothing is known, along delta: a gradient of a gradient."""
    with torch.enable_grad():
        latents = coder.encode(x.detach()).detach().requires_grad_()
        if chosen is not None:
            delta = torch.zeros_like(latents).scatter(1, chosen[:, None], delta.to(latents)[:, None])
        made = coder.decode(latents, x.detach())
        probe = torch.zeros_like(made, requires_grad=True)
        (back,) = torch.autograd.grad(made, latents, probe, create_graph=True)
        (change,) = torch.autograd.grad(back, probe, delta.to(latents))
    return change.to(x.dtype)
