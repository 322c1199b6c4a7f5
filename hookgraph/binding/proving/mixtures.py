"""The algebra of mixtures of experts: equations between the locations of router, experts and their sum.

Each expert of each token is computed here by gathering its weights, not in the order of the models' code.
"""

from collections.abc import Iterator
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookgraph.binding.data.findings import ExpertLayer
from hookgraph.binding.proving.equations import Identity, Values, agrees
from hookgraph.binding.proving.identities import Seen
from hookgraph.binding.running.huggingface import HuggingFaceBinding
from hookgraph.binding.running.weights import affine_map
from hookgraph.ontology.transformer import TRANSFORMER_STACKS, TransformerStack


def mixture_identities(binding: HuggingFaceBinding, present: Values, seen: Seen) -> Iterator[Identity]:
    """Every identity of the mixtures of experts.

    Args:
        binding: the bound model.
        present: the clean values; they tell which equations an architecture leaves out.
        seen: what modules were given and returned in the edited pass.
    """
    stacks = {stack.RESID_PRE.stack: stack for stack in TRANSFORMER_STACKS}
    for (name, number), layer in binding.findings.experts.items():
        stack = stacks[name]
        module: nn.Module = binding.model.get_submodule(layer.experts)
        yield from _of_experts(stack, number, module, present)
        yield from _of_neurons(stack, number, module, present, seen.get(layer.experts))
        yield from _of_sum(stack, number, layer, present, seen)
        yield from _of_shared(binding, stack, number, present)
    for stack in stacks.values():
        for number in range(binding.layers(stack.RESID_PRE.stack)):
            yield from _of_logits(binding, stack, number, present)


def _of_experts(
    stack: TransformerStack, layer: int, module: nn.Module, present: Values
) -> Iterator[Identity]:
    post, out, routed = stack.EXPERT_POST[layer], stack.EXPERT_OUT[layer], stack.ROUTED_OUT[layer]
    indices, weights = stack.ROUTER_INDICES[layer], stack.ROUTER_WEIGHTS[layer]
    if all(x in present for x in (post, out, indices)):
        yield Identity(
            "moe.expert_out = moe.expert_post W_out[moe.router_indices] + b",
            (post, indices),
            lambda x: (_written(module, x[indices], x[post]), x[out]),
            (out,),
        )
    if all(x in present for x in (out, weights, routed)):
        yield Identity(
            "moe.routed_out = sum of moe.router_weights * moe.expert_out",
            (out, weights),
            lambda x: ((x[weights][..., None] * x[out]).sum(2), x[routed]),
            (routed,),
        )


def _of_neurons(
    stack: TransformerStack,
    layer: int,
    module: nn.Module,
    present: Values,
    given: tuple[Tensor, Tensor] | None,
) -> Iterator[Identity]:
    reads, indices, post = stack.MLP_IN[layer], stack.ROUTER_INDICES[layer], stack.EXPERT_POST[layer]
    if post not in present or indices not in present:
        return
    # Experts may lie between projections of their own, and read another width.
    direct = reads in present and present[reads].shape[-1] == _width_read(module)
    if direct and agrees(_read(module, present[indices], present[reads]), present[post]):
        yield Identity(
            "moe.expert_post = activation(mlp.in W_in[moe.router_indices] + b)",
            (reads, indices),
            lambda x: (_read(module, x[indices], x[reads]), x[post]),
            (post,),
        )
    elif given is not None:
        yield Identity(
            "moe.expert_post = activation(x W_in[moe.router_indices] + b)",
            (indices,),
            lambda x: (_read(module, x[indices], _like(given[0], x[indices])), x[post]),
        )


def _of_logits(
    binding: HuggingFaceBinding, stack: TransformerStack, layer: int, present: Values
) -> Iterator[Identity]:
    reads, logits = stack.MLP_IN[layer], stack.ROUTER_LOGITS[layer]
    if reads not in present or logits not in present:
        return
    router = binding.model.get_submodule(binding.findings.anchors[logits].module)
    experts = present[logits].shape[-1]
    owned = list(router.parameters(recurse=False))
    matrices = [p for p in owned if p.shape == (experts, present[reads].shape[-1])]
    for matrix in matrices:
        for bias in (None, *(p for p in owned if p.shape == (experts,))):
            if agrees(_routed(present[reads], matrix, bias), present[logits]):
                yield Identity(
                    "moe.router_logits = mlp.in W + b",
                    (reads,),
                    lambda x, w=matrix, b=bias: (_routed(x[reads], w, b), x[logits]),
                    (logits,),
                )
                return


def _of_sum(
    stack: TransformerStack, layer: int, place: ExpertLayer, present: Values, seen: Seen
) -> Iterator[Identity]:
    routed, shared, gate = stack.ROUTED_OUT[layer], stack.SHARED_OUT[layer], stack.SHARED_GATE[layer]
    if place.whole not in seen or routed not in present or shared not in present:
        return
    returned = seen[place.whole][1]
    if gate in present:
        yield Identity(
            "moe.routed_out + sigmoid(moe.shared_gate) moe.shared_out = what the mixture returns",
            (routed, shared, gate),
            lambda x: (x[routed] + x[gate].sigmoid() * x[shared], returned.reshape(x[routed].shape)),
        )
        return
    yield Identity(
        "moe.routed_out + moe.shared_out = what the mixture returns",
        (routed, shared),
        lambda x: (x[routed] + x[shared], returned.reshape(x[routed].shape)),
    )


def _of_shared(
    binding: HuggingFaceBinding, stack: TransformerStack, layer: int, present: Values
) -> Iterator[Identity]:
    post, out = stack.SHARED_POST[layer], stack.SHARED_OUT[layer]
    if post not in present or out not in present:
        return
    down = binding.model.get_submodule(binding.findings.anchors[post].module)
    weight, bias = affine_map(down)
    if agrees(present[post] @ weight + bias, present[out]):
        yield Identity(
            "moe.shared_out = moe.shared_post W + b",
            (post,),
            lambda x: (x[post] @ weight + bias, x[out]),
            (out,),
        )


def _like(given: Tensor, indices: Int[Tensor, "batch pos choice"]) -> Tensor:
    return given.reshape(*indices.shape[:2], -1)


def _routed(
    x: Float[Tensor, "batch pos d_model"], matrix: Float[Tensor, "expert d_model"], bias: Tensor | None
) -> Float[Tensor, "batch pos expert"]:
    logits = x @ matrix.mT
    return logits if bias is None else logits + bias


def _read(
    module: Any, indices: Int[Tensor, "batch pos choice"], x: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos choice d_mlp"]:
    name = _reading_name(module)
    copies = x[:, :, None].expand(*indices.shape, x.shape[-1])
    before = _gathered(module, name, indices, copies)
    return module._apply_gate(before) if module.has_gate else module.act_fn(before)


def _reading_name(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _width_read(module: Any) -> int:
    """How many features each expert reads."""
    weight = getattr(module, _reading_name(module))
    return int(weight.shape[1 if module.is_transposed else 2])


def _written(
    module: Any,
    indices: Int[Tensor, "batch pos choice"],
    neurons: Float[Tensor, "batch pos choice d_mlp"],
) -> Float[Tensor, "batch pos choice d_model"]:
    output = _gathered(module, "down_proj", indices, neurons)
    return module.post_expert_norm(output) if module.has_post_expert_norm else output


def _gathered(module: Any, name: str, indices: Tensor, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    weight = getattr(module, name)
    weight = weight if module.is_transposed else weight.mT
    result = einsum(x, weight[indices], "b p c i, b p c i o -> b p c o")
    return result + getattr(module, f"{name}_bias")[indices] if module.has_bias else result


def rerouted(indices: Int[Tensor, "batch pos choice"]) -> Int[Tensor, "batch pos choice"]:
    """Other experts that are as valid: each token is sent where the one before it was."""
    return torch.roll(indices, 1, dims=1)
