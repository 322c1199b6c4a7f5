"""The algebra of the vocabulary: equations between locations that hold on every architecture.

Where no two locations determine each other, a location is compared with what a module of the model was
given and returned, seen by a plain PyTorch hook.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hookgraph.binding.huggingface import HuggingFaceBinding
from hookgraph.binding.mechanisms import element
from hookgraph.binding.norms import affine_of
from hookgraph.errors import UnknownLocationError
from hookgraph.hooks.handles import installed
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import DECODER, TransformerStack
from hookgraph.ontology.weights import (
    W_K,
    W_O,
    W_Q,
    W_U,
    W_V,
    W_gate,
    W_in,
    W_out,
    WeightType,
    b_gate,
    b_in,
    b_K,
    b_O,
    b_out,
    b_Q,
    b_U,
    b_V,
)

Values = Mapping[Location, Tensor]
Sides = Callable[[Values], tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]]
Seen = dict[str, tuple[Tensor, Tensor]]
"""What modules were given and what they returned, by path."""


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


def identities(binding: HuggingFaceBinding, present: Values, seen: Seen) -> Iterator[Identity]:
    """Every identity between the locations that are present, and between them and what was seen."""
    stack = DECODER
    for location in present:
        if location.type == stack.RESID_POST and location.layer is not None:
            yield from _of_stream(stack, location.layer, present)
            yield from _of_attention(binding, stack, location.layer, present)
            yield from _of_mlp(binding, stack, location.layer, present)
        if binding.findings.anchors[location].mechanism == "norm scale":
            yield from _of_norm(binding, location, seen)
    yield from _of_projections(binding, stack, present, seen)


@contextmanager
def watching(binding: HuggingFaceBinding) -> Generator[Seen]:
    """Within this context what norms and projections are given and return is kept, without taps."""
    seen: Seen = {}
    slots = {a.module: a.slot for a in binding.findings.anchors.values() if a.mechanism == "norm scale"}
    slots |= {source.module: 0 for source in binding.findings.weights.values() if source.side != "table"}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and (args or kwargs):
                slot = slots[path] if args else next(iter(kwargs))
                seen[path] = (element(args, kwargs, slot), output)

        return hook

    modules = binding.model.get_submodule
    with installed(
        *(lambda p=p: modules(p).register_forward_hook(keep(p), with_kwargs=True) for p in slots)
    ):
        yield seen


def _of_norm(binding: HuggingFaceBinding, location: Location, seen: Seen) -> Iterator[Identity]:
    anchor = binding.findings.anchors[location]
    if anchor.module not in seen:
        return
    given, returned = seen[anchor.module]
    with torch.no_grad():
        module = binding.model.get_submodule(anchor.module)
        gain, bias = affine_of(module, given, centred=anchor.centred)
    moved = given - given.mean(-1, keepdim=True) if anchor.centred else given
    yield Identity(
        "norm(x) = gain (x - centre) s + bias",
        (location,),
        lambda v: (gain * moved * v[location] + bias, returned),
    )


def _of_projections(
    binding: HuggingFaceBinding, stack: TransformerStack, present: Values, seen: Seen
) -> Iterator[Identity]:
    """What projections make of the locations that they read is what they return."""
    for (name, layer), source in binding.findings.weights.items():
        if source.module not in seen or name not in ("W_O", "W_out", "W_U"):
            continue
        returned = seen[source.module][1]
        if name == "W_U":
            reads, weight, bias = stack.FINAL_LN_OUT, W_U, b_U
        elif layer is not None and name == "W_out":
            reads, weight, bias = stack.MLP_POST[layer], W_out, b_out
        else:
            continue
        projection = _weights(binding, layer, weight, bias)
        if reads in present and projection is not None:
            yield Identity(
                f"{reads.type} {weight} + {bias} = what the projection returns",
                (reads,),
                lambda v, reads=reads, p=projection, out=returned: (v[reads] @ p[0] + p[1], out),
            )
    for location in present:
        path = binding.findings.anchors[location].module
        if location.type == stack.ATTN_RESULT and path in seen:
            yield Identity(
                "sum of attn.result + b_O = what the projection returns",
                (location,),
                lambda v, here=location, path=path: (
                    v[here].sum(2) + binding.weight(b_O, here.layer),
                    seen[path][1],
                ),
            )


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
            (middle,),
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
    binding: HuggingFaceBinding, stack: TransformerStack, layer: int, present: Values
) -> Iterator[Identity]:
    scores, pattern = stack.ATTN_SCORES[layer], stack.ATTN_PATTERN[layer]
    v, z, result, reads = (t[layer] for t in (stack.ATTN_V, stack.ATTN_Z, stack.ATTN_RESULT, stack.ATTN_IN))
    if scores in present and pattern in present and present[scores].shape == present[pattern].shape:
        yield Identity(
            "pattern = softmax(scores)",
            (scores,),
            lambda x: (x[scores].softmax(-1), x[pattern]),
            (pattern,),
        )
    if all(x in present for x in (pattern, v, z)):
        yield Identity(
            "z = pattern v", (pattern, v), lambda x: (_weighted(x[pattern], x[v]), x[z]), (z,)
        )
    project = _weights(binding, layer, W_O, b_O)
    if z in present and result in present and project is not None:
        yield Identity(
            "result = z W_O",
            (z,),
            lambda x: (einsum(x[z], project[0], "b p h d, h d m -> b p h m"), x[result]),
            (result,),
        )
    heads = (
        (next((x for x in (stack.ATTN_Q_PRE[layer], stack.ATTN_Q[layer]) if x in present), None), W_Q, b_Q),
        (next((x for x in (stack.ATTN_K_PRE[layer], stack.ATTN_K[layer]) if x in present), None), W_K, b_K),
        (v, W_V, b_V),
    )
    for made, weight, bias in heads:
        read = _weights(binding, layer, weight, bias)
        if reads in present and made in present and made is not None and read is not None:
            yield Identity(
                f"{made.type} = attn.in {weight} + {bias}",
                (reads,),
                lambda x, made=made, read=read: (
                    einsum(x[reads], read[0], "b p m, h m d -> b p h d") + read[1],
                    x[made],
                ),
                (made,),
            )


def _of_mlp(
    binding: HuggingFaceBinding, stack: TransformerStack, layer: int, present: Values
) -> Iterator[Identity]:
    reads, before, out = stack.MLP_IN[layer], stack.MLP_PRE[layer], stack.MLP_OUT[layer]
    after = stack.MLP_POST[layer]
    into = _weights(binding, layer, W_gate, b_gate) or _weights(binding, layer, W_in, b_in)
    if reads in present and before in present and into is not None:
        yield Identity(
            "mlp.pre = mlp.in W + b",
            (reads,),
            lambda x: (x[reads] @ into[0] + into[1], x[before]),
            (before,),
        )
    down = _weights(binding, layer, W_out, b_out)
    if after in present and out in present and down is not None:
        same = torch.allclose(present[after] @ down[0] + down[1], present[out], rtol=1e-3, atol=1e-5)
        if same:  # where a post-norm follows, mlp.out is not the projection's output
            yield Identity(
                "mlp.out = mlp.post W_out + b_out", (after,), lambda x: (x[after] @ down[0] + down[1], x[out])
            )


def _weights(
    binding: HuggingFaceBinding, layer: int | None, weight: WeightType, bias: WeightType
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
