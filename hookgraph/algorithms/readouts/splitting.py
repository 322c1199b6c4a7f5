"""Updates of the stream divided by what writes them: heads, neurons, latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.streams import if_present, last_residual
from hookgraph.errors import HookGraphError, UnknownLocationError
from hookgraph.graph.abstract import Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.autoencoder import ERROR, LATENTS
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import ATTN_OUT, ATTN_Z, MLP_OUT, MLP_POST
from hookgraph.ontology.weights import W_O, W_out, WeightType, b_O, b_out

Split = dict[Location, tuple[dict[Location, Tensor], Tensor]]
"""By update: what each part inside adds, and what is left of the update."""

_ROUNDING = 2e-2
"""What differs by no more of its size is the same up to the rounding of half precision."""


@final
@dataclass(frozen=True, eq=False)
class Frozen:
    """A pass, with the linear map from the stream to the number that is divided.

    Args:
        graph: the hooked model.
        inputs: what was run.
        run: the pass.
        places: the embeddings and the updates.
        direction: u, the gradient at the last residual: the same at every update, directly.
        total: the number.
        bias: what of it is not u · x.
    """

    graph: HookGraph
    inputs: Prepared
    run: Run
    places: Sequence[Location]
    direction: Float[Tensor, "batch pos d_model"]
    total: Float[Tensor, " batch"]
    bias: Float[Tensor, " batch"]

    def along(self, value: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " batch"]:
        """u · value."""
        return (value * self.direction).flatten(1).sum(1)


@final
@dataclass(frozen=True, slots=True)
class _Writer:
    """How an update is written: from what, through which weight and bias."""

    inner: LocationType
    weight: WeightType
    bias: WeightType


_WRITERS: Mapping[str, Mapping[LocationType, _Writer]] = {
    "head": {ATTN_OUT: _Writer(ATTN_Z, W_O, b_O)},
    "neuron": {MLP_OUT: _Writer(MLP_POST, W_out, b_out)},
}


def by_writers(frozen: Frozen, kinds: Sequence[str]) -> Split:
    """The updates by heads or neurons: activation · gradient, with u as the gradient at each update.

    Raises:
        UnknownLocationError: no layer has what they are told apart by.
    """
    pairs: dict[Location, tuple[Location, _Writer]] = {}
    for kind in kinds:
        writers = _WRITERS.get(kind, {})
        written = [(x, writers[x.type]) for x in frozen.places if x.type in writers]
        found = {x: (writer.inner[x.layer or 0], writer) for x, writer in written}
        found = {x: pair for x, pair in found.items() if if_present(frozen.graph, pair[0]) is not None}
        if writers and not found:
            raise UnknownLocationError(f"no update of this model is written by a {kind} that is a location")
        pairs.update(found)
    if not pairs:
        return {}
    graph = frozen.graph
    for update in pairs:
        graph = graph.hook(update.grad, SetTo(frozen.direction))
    inner = [x for x, _ in pairs.values()]
    run = graph.run(frozen.inputs, save=[*inner, *(x.grad for x in inner)], metric=everything)
    split: Split = {}
    for update, (place, writer) in pairs.items():
        pieces = _pieces(frozen, update, writer, run[place], run[place.grad])
        split[update] = ({place: pieces}, frozen.along(frozen.run[update]) - pieces.flatten(1).sum(1))
    return split


def _pieces(
    frozen: Frozen,
    update: Location,
    writer: _Writer,
    value: Float[Tensor, "batch pos ..."],
    gradient: Float[Tensor, "batch pos ..."],
) -> Float[Tensor, "batch ..."]:
    """What each head or neuron adds: activation · gradient, the scale of a norm after the update held.

    Such a norm returns y = gain · s · x for what the projection returned, x. Its true gradient takes from
    what s held gives, w, the share along x: w = Jᵀu + x (u·y - x·Jᵀu) / |x|². Without a norm the share is 0.
    """
    weight = frozen.graph.weight(writer.weight, update.layer).detach().flatten(0, -2)
    flat, slopes = value.flatten(2), gradient.flatten(2)
    raw, out = flat @ weight.to(flat), frozen.run[update]
    bias = _bias(frozen.graph, writer.bias, update.layer, raw)
    products = flat * slopes
    if not _same(out, raw + bias):
        if bool(bias.any()):
            raise HookGraphError(
                f"{update} is neither its projection nor a norm of it without a bias: it cannot be divided"
            )
        energy = raw.square().sum(-1)
        share = ((frozen.direction * out).sum(-1) - products.sum(-1)) / energy.where(energy > 0, 1)
        products = products + flat * (raw @ weight.to(flat).T) * share[..., None]
    summed = products.sum(1).unflatten(1, value.shape[2:])
    return summed.sum(-1) if value.ndim == 4 else summed


def _bias(graph: HookGraph, kind: WeightType, layer: int | None, like: Tensor) -> Float[Tensor, " d_model"]:
    try:
        return graph.weight(kind, layer).detach().to(like)
    except UnknownLocationError:
        return like.new_zeros(like.shape[-1])


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= _ROUNDING * b.norm())


def by_latents(frozen: Frozen) -> Split:
    """The updates at which dictionaries are injected, by latents and errors.

    The gradient at each is the one that arrives along the stream alone: none goes through later updates.

    Raises:
        HookGraphError: there is no dictionary at an update.
    """
    graph, sites = frozen.graph, set(frozen.places[1:])
    inside = [x for x in graph.locations if x.site in sites and x.type in (LATENTS, ERROR)]
    if not inside:
        raise HookGraphError("no dictionary is injected at an update: inject one at attn.out or mlp.out")
    for update in sites:
        graph = graph.hook(update.grad, torch.zeros_like)
    graph = graph.hook(last_residual(graph).grad, SetTo(frozen.direction))
    run = graph.run(frozen.inputs, save=[*inside, *(x.grad for x in inside)], metric=everything)
    split: Split = {}
    for site in dict.fromkeys(x.site for x in inside if x.site is not None):
        pieces: dict[Location, Tensor] = {}
        for place in (x for x in inside if x.site == site):
            products = run[place] * run[place.grad]
            pieces[place] = products.flatten(1).sum(1) if place.type == ERROR else products.sum(1)
        explained = torch.stack([v.reshape(len(v), -1).sum(1) for v in pieces.values()]).sum(0)
        split[site] = (pieces, frozen.along(frozen.run[site]) - explained)
    return split


def everything(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
    """A metric that depends on all logits, for passes in which its own gradient is replaced."""
    return logits.flatten(1).sum(1)
