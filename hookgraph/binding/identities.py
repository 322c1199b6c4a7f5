"""The algebra of the vocabulary: equations between locations that hold on every architecture."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from hookgraph.binding.findings import Layer, StreamStep
from hookgraph.binding.huggingface import HuggingFaceBinding
from hookgraph.errors import UnknownLocationError
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import DECODER, ENCODER, VISION, AttentionTypes, TransformerStack
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

Values: TypeAlias = Mapping[Location, Float[Tensor, "..."]]
Sides: TypeAlias = Callable[[Values], tuple[Tensor, Tensor]]


@final
@dataclass(frozen=True, slots=True)
class Identity:
    """Two expressions that are equal, and the locations that the equation is about: an edit at any of
    them must leave it true.
    """

    text: str
    about: tuple[Location, ...]
    sides: Sides


def identities(binding: HuggingFaceBinding, present: Values) -> Iterator[Identity]:
    """Every identity between the locations that are present."""
    for stack in (DECODER, ENCODER, VISION):
        for number, layer in enumerate(binding.findings.layers.get(stack.RESID_PRE.stack, ())):
            yield from _of_stream(binding, stack, number, layer, present)
            yield from _of_pattern(stack.attention, number, present)
            yield from _of_pattern(stack.cross_attention, number, present)
            yield from _of_attention(binding, stack, number, present)
            yield from _of_mlp(binding, stack, number, present)


def _of_stream(
    binding: HuggingFaceBinding, stack: TransformerStack, number: int, layer: Layer, present: Values
) -> Iterator[Identity]:
    """The residual path, from one point of it that is a location to the next."""
    start, steps = stack.RESID_PRE[number], list[StreamStep]()
    for step in layer.stream:
        if step.kind != "here" or step.location is None:
            steps.append(step)
            continue
        added = [s.location for s in steps if s.kind == "add"]
        places = [x for x in (start, *added, step.location) if x is not None]
        if None not in added and all(x in present for x in places):
            names = " + ".join(str(x.type) for x in (start, *added) if x is not None)
            about = tuple(x for x in (start, *added) if x is not None)
            yield Identity(
                f"{step.location.type} = {names}", about, _along(binding, start, steps, step.location)
            )
        start, steps = step.location, []


def _along(binding: HuggingFaceBinding, start: Location, steps: list[StreamStep], end: Location) -> Sides:
    model, path = binding.model, tuple(steps)

    def sides(values: Values) -> tuple[Tensor, Tensor]:
        stream = values[start]
        for step in path:
            if step.kind == "add" and step.location is not None:
                stream = stream + values[step.location]
            elif step.kind == "norm":
                stream = model.get_submodule(step.name).forward(stream)
            elif step.kind == "scale":
                stream = stream * step.factor
            elif step.kind == "parameter":
                owner, _, name = step.name.rpartition(".")
                stream = stream * getattr(model.get_submodule(owner), name)
        return stream, values[end]

    return sides


def _of_pattern(types: AttentionTypes, layer: int, present: Values) -> Iterator[Identity]:
    scores, pattern, v, z = (t[layer] for t in (types.scores, types.pattern, types.v, types.z))
    if scores in present and pattern in present and present[scores].shape == present[pattern].shape:
        yield Identity("pattern = softmax(scores)", (scores,), lambda x: (x[scores].softmax(-1), x[pattern]))
    if all(x in present for x in (pattern, v, z)) and _mixable(present[pattern], present[v], present[z]):
        if _agrees(_weighted(present[pattern], present[v]), present[z]):
            yield Identity("z = pattern v", (pattern, v), lambda x: (_weighted(x[pattern], x[v]), x[z]))
        else:  # a sink takes its share of the pattern: what is left has the same direction
            yield Identity(
                "z ∝ pattern v",
                (pattern, v),
                lambda x: (normalize(_weighted(x[pattern], x[v]), dim=-1), normalize(x[z], dim=-1)),
            )


def _of_attention(
    binding: HuggingFaceBinding, stack: TransformerStack, layer: int, present: Values
) -> Iterator[Identity]:
    v, z, result, reads = (t[layer] for t in (stack.ATTN_V, stack.ATTN_Z, stack.ATTN_RESULT, stack.ATTN_IN))
    project = _weights(binding, stack, layer, W_O, b_O)
    if z in present and result in present and project is not None:
        yield Identity(
            "result = z W_O",
            (z,),
            lambda x: (einsum(x[z], project[0], "b p h d, h d m -> b p h m"), x[result]),
        )
    read = _weights(binding, stack, layer, W_V, b_V)
    if (
        reads in present
        and v in present
        and read is not None
        and read[0].shape[1] == present[reads].shape[-1]
    ):

        def values(x: Values) -> Tensor:
            return einsum(x[reads], read[0], "b p m, h m d -> b p h d") + read[1]

        if _agrees(values(present), present[v]):
            yield Identity("v = attn.in W_V + b_V", (reads,), lambda x: (values(x), x[v]))


def _of_mlp(
    binding: HuggingFaceBinding, stack: TransformerStack, layer: int, present: Values
) -> Iterator[Identity]:
    reads, before, after, out = (
        t[layer] for t in (stack.MLP_IN, stack.MLP_PRE, stack.MLP_POST, stack.MLP_OUT)
    )
    into = _weights(binding, stack, layer, W_gate, b_gate) or _weights(binding, stack, layer, W_in, b_in)
    down = _weights(binding, stack, layer, W_out, b_out)
    for source, target, weights, text in (
        (reads, before, into, "mlp.pre = mlp.in W + b"),
        (after, out, down, "mlp.out = mlp.post W_out + b_out"),
    ):
        if source not in present or target not in present or weights is None:
            continue
        if weights[0].shape[0] == present[source].shape[-1] and _agrees(
            present[source] @ weights[0] + weights[1], present[target]
        ):
            yield Identity(text, (source,), _affine(source, target, *weights))


def _affine(source: Location, target: Location, weight: Tensor, bias: Tensor) -> Sides:
    return lambda x: (x[source] @ weight + bias, x[target])


def _agrees(expected: Tensor, got: Tensor) -> bool:
    """Whether an equation holds on the clean values: where a norm or a multiplier comes between it does not,
    and is not claimed.
    """
    return expected.shape == got.shape and torch.allclose(expected, got, rtol=1e-3, atol=1e-5)


def _mixable(pattern: Tensor, v: Tensor, z: Tensor) -> bool:
    """Whether the shapes fit: with a sink the pattern has a column less, latent values another width."""
    heads = v.ndim == 4 and pattern.shape[1] % v.shape[2] == 0 and pattern.shape[1] == z.shape[2]
    return heads and pattern.shape[-1] == v.shape[1] and v.shape[-1] == z.shape[-1]


def _weights(
    binding: HuggingFaceBinding, stack: TransformerStack, layer: int, weight: WeightType, bias: WeightType
) -> tuple[Tensor, Tensor] | None:
    name = stack.RESID_PRE.stack
    try:
        return binding.weight(weight, layer, name), binding.weight(bias, layer, name)
    except UnknownLocationError:
        return None


def _weighted(
    pattern: Float[Tensor, "batch head pos key_pos"], v: Float[Tensor, "batch key_pos kv_head d_head"]
) -> Float[Tensor, "batch pos head d_head"]:
    v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
    return einsum(pattern.to(v.dtype), v, "b h q k, b k h d -> b q h d")
