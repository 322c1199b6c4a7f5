"""The algebra of the vocabulary: equations between locations that hold on every architecture."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hookgraph.errors import UnknownLocationError
from hookgraph.graph.abstract import AbstractBinding
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import DECODER, TransformerStack
from hookgraph.ontology.weights import (
    W_O,
    W_V,
    W_gate,
    W_in,
    W_out,
    WeightType,
    b_gate,
    b_in,
    b_O,
    b_out,
    b_V,
)

Values = Mapping[Location, Tensor]
Sides = Callable[[Values], tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]]


@final
@dataclass(frozen=True, slots=True)
class Identity:
    """Two expressions that are equal, and the locations that the equation is about: an edit at any of
    them must leave it true.
    """

    text: str
    about: tuple[Location, ...]
    sides: Sides


def identities(binding: AbstractBinding, present: Values) -> Iterator[Identity]:
    """Every identity between the locations that are present."""
    stack = DECODER
    for location in present:
        if location.type == stack.RESID_POST and location.layer is not None:
            yield from _of_stream(stack, location.layer, present)
            yield from _of_attention(binding, stack, location.layer, present)
            yield from _of_mlp(binding, stack, location.layer, present)


def _of_stream(stack: TransformerStack, layer: int, present: Values) -> Iterator[Identity]:
    before, after, middle = stack.RESID_PRE[layer], stack.RESID_POST[layer], stack.RESID_MID[layer]
    attention, mlp = stack.ATTN_OUT[layer], stack.MLP_OUT[layer]
    if not all(x in present for x in (before, attention, mlp)):
        return
    if middle in present:
        yield Identity(
            "resid.mid = resid.pre + attn.out",
            (before, attention),
            lambda v: (v[before] + v[attention], v[middle]),
        )
        yield Identity(
            "resid.post = resid.mid + mlp.out", (middle, mlp), lambda v: (v[middle] + v[mlp], v[after])
        )
    else:
        yield Identity(
            "resid.post = resid.pre + attn.out + mlp.out",
            (before, attention, mlp),
            lambda v: (v[before] + v[attention] + v[mlp], v[after]),
        )


def _of_attention(
    binding: AbstractBinding, stack: TransformerStack, layer: int, present: Values
) -> Iterator[Identity]:
    scores, pattern = stack.ATTN_SCORES[layer], stack.ATTN_PATTERN[layer]
    v, z, result, reads = (t[layer] for t in (stack.ATTN_V, stack.ATTN_Z, stack.ATTN_RESULT, stack.ATTN_IN))
    if scores in present and pattern in present and present[scores].shape == present[pattern].shape:
        yield Identity("pattern = softmax(scores)", (scores,), lambda x: (x[scores].softmax(-1), x[pattern]))
    if all(x in present for x in (pattern, v, z)):
        yield Identity("z = pattern v", (pattern, v), lambda x: (_weighted(x[pattern], x[v]), x[z]))
    project = _weights(binding, layer, W_O, b_O)
    if z in present and result in present and project is not None:
        yield Identity(
            "result = z W_O",
            (z,),
            lambda x: (einsum(x[z], project[0], "b p h d, h d m -> b p h m"), x[result]),
        )
    read = _weights(binding, layer, W_V, b_V)
    if reads in present and v in present and read is not None:
        yield Identity(
            "v = attn.in W_V + b_V",
            (reads,),
            lambda x: (einsum(x[reads], read[0], "b p m, h m d -> b p h d") + read[1], x[v]),
        )


def _of_mlp(
    binding: AbstractBinding, stack: TransformerStack, layer: int, present: Values
) -> Iterator[Identity]:
    reads, before, out = stack.MLP_IN[layer], stack.MLP_PRE[layer], stack.MLP_OUT[layer]
    after = stack.MLP_POST[layer]
    into = _weights(binding, layer, W_gate, b_gate) or _weights(binding, layer, W_in, b_in)
    if reads in present and before in present and into is not None:
        yield Identity(
            "mlp.pre = mlp.in W + b", (reads,), lambda x: (x[reads] @ into[0] + into[1], x[before])
        )
    down = _weights(binding, layer, W_out, b_out)
    if after in present and out in present and down is not None:
        same = torch.allclose(present[after] @ down[0] + down[1], present[out], rtol=1e-3, atol=1e-5)
        if same:  # where a post-norm follows, mlp.out is not the projection's output
            yield Identity(
                "mlp.out = mlp.post W_out + b_out", (after,), lambda x: (x[after] @ down[0] + down[1], x[out])
            )


def _weights(
    binding: AbstractBinding, layer: int, weight: WeightType, bias: WeightType
) -> tuple[Tensor, Tensor] | None:
    try:
        return binding.weight(weight, layer), binding.weight(bias, layer)
    except UnknownLocationError:
        return None


def _weighted(
    pattern: Float[Tensor, "batch head pos key_pos"], v: Float[Tensor, "batch key_pos kv_head d_head"]
) -> Float[Tensor, "batch pos head d_head"]:
    v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
    return einsum(pattern.to(v.dtype), v, "b h q k, b k h d -> b q h d")
