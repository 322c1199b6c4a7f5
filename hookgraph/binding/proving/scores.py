"""The equations of attention: scores of queries and keys, the pattern of scores, z of pattern and values."""

from collections.abc import Iterator
from functools import partial
from typing import Final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from hookgraph.binding.proving.equations import Identity, Unapplied, Values, agrees
from hookgraph.hooks.masking import masked_cells
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import AttentionTypes

_SCORES: Final = "scores = q k times a number"
_APART: Final = "each head has keys and values of its own"
_REPEATED: Final = (
    "every {} heads in a row are the same, which the model repeats before it multiplies them: to edit the "
    "one they are copies of, edit all of these alike"
)
_PATTERN: Final = "pattern = softmax(scores)"
_Z: Final = "z = pattern v"


def of_scores(types: AttentionTypes, layer: int, present: Values) -> Iterator[Identity | Unapplied]:
    """The equations between the locations that a layer has, of those that make scores and use them."""
    kinds = (types.q, types.k, types.v, types.scores, types.pattern, types.z)
    q, k, v, scores, pattern, z = (kind[layer] for kind in kinds)
    if all(x in present for x in (q, k, scores)):
        yield _of_queries(q, k, scores, present)
    for location in (k, v):
        copies = _copies_of_each(present[location]) if location in present else 1
        if copies > 1:
            yield Unapplied(_APART, (location,), _REPEATED.format(copies))
    if scores in present and pattern in present:
        yield _of_softmax(scores, pattern, present)
    if all(x in present for x in (pattern, v, z)):
        yield _of_values(pattern, v, z, present)


def _of_queries(q: Location, k: Location, scores: Location, present: Values) -> Identity | Unapplied:
    about = (q, k, scores)
    if not _pairable(present[q], present[k], present[scores]):
        return Unapplied(_SCORES, about, f"their sizes do not fit: {_sizes(about, present)}")
    found = present[scores]
    seen, made = ~masked_cells(found), _products(present[q], present[k])
    made, found = (torch.where(seen, x, 0) for x in (made, found))
    factor = (made * found).sum((0, 2, 3)) / made.square().sum((0, 2, 3)).clamp_min(1e-12)
    if not agrees(made * factor[:, None, None], found):
        why = "unmasked ones are no multiple of it, as where a bias is added or a cap put on them"
        return Unapplied(_SCORES, about, why)
    return Identity(_SCORES, (q, k), partial(_scores_sides, q, k, scores, factor), (scores,))


def _scores_sides(
    q: Location, k: Location, scores: Location, factor: Float[Tensor, " head"], values: Values
) -> tuple[Tensor, Tensor]:
    found = values[scores]
    seen, made = ~masked_cells(found), _products(values[q], values[k])
    return torch.where(seen, made * factor[:, None, None], 0), torch.where(seen, found, 0)


def _of_softmax(scores: Location, pattern: Location, present: Values) -> Identity | Unapplied:
    if present[scores].shape != present[pattern].shape:
        sizes = _sizes((scores, pattern), present)
        return Unapplied(_PATTERN, (scores, pattern), f"the pattern is without what a sink gets: {sizes}")
    return Identity(_PATTERN, (scores,), lambda x: (x[scores].softmax(-1), x[pattern]), (pattern,))


def _of_values(pattern: Location, v: Location, z: Location, present: Values) -> Identity | Unapplied:
    if not _mixable(present[pattern], present[v], present[z]):
        about = (pattern, v, z)
        return Unapplied(_Z, about, f"their sizes do not fit: {_sizes(about, present)}")
    if agrees(_weighted(present[pattern], present[v]), present[z]):
        return Identity(_Z, (pattern, v), lambda x: (_weighted(x[pattern], x[v]), x[z]), (z,))
    # A sink takes its share of the pattern: what is left has the same direction.
    return Identity(
        "z ∝ pattern v",
        (pattern, v),
        lambda x: (normalize(_weighted(x[pattern], x[v]), dim=-1), normalize(x[z], dim=-1)),
    )


def _sizes(locations: tuple[Location, ...], present: Values) -> str:
    return ", ".join(f"{x.type} {' '.join(map(str, present[x].shape[1:]))}" for x in locations)


def _copies_of_each(heads: Float[Tensor, "batch key_pos kv_head ..."]) -> int:
    """How many heads in a row are the same, throughout."""
    count = heads.shape[2] if heads.ndim == 4 and heads.any() else 1
    sizes = (n for n in range(count, 1, -1) if count % n == 0)
    return next((n for n in sizes if _are_alike(heads, n)), 1)


def _are_alike(heads: Float[Tensor, "batch key_pos kv_head ..."], copies: int) -> bool:
    in_a_row = heads.unflatten(2, (-1, copies))
    return bool((in_a_row == in_a_row[:, :, :, :1]).all())


def _pairable(q: Tensor, k: Tensor, scores: Tensor) -> bool:
    """Whether each query can be multiplied with each key, and the scores are as many."""
    four = q.ndim == k.ndim == 4 and q.shape[2] % k.shape[2] == 0 and q.shape[3] == k.shape[3]
    return four and scores.shape[1:] == (q.shape[2], q.shape[1], k.shape[1])


def _products(
    q: Float[Tensor, "batch pos head d_head"], k: Float[Tensor, "batch key_pos kv_head d_head"]
) -> Float[Tensor, "batch head pos key_pos"]:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return einsum(q, k.to(q.dtype), "b q h d, b k h d -> b h q k")


def _mixable(pattern: Tensor, v: Tensor, z: Tensor) -> bool:
    """Whether the shapes fit: with a sink the pattern has a column less, latent values another width."""
    heads = v.ndim == 4 and pattern.shape[1] % v.shape[2] == 0 and pattern.shape[1] == z.shape[2]
    return heads and pattern.shape[-1] == v.shape[1] and v.shape[-1] == z.shape[-1]


def _weighted(
    pattern: Float[Tensor, "batch head pos key_pos"], v: Float[Tensor, "batch key_pos kv_head d_head"]
) -> Float[Tensor, "batch pos head d_head"]:
    v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
    return einsum(pattern.to(v.dtype), v, "b h q k, b k h d -> b q h d")
