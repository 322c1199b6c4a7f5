"""The algebra of the vocabulary: equations between locations that hold on every architecture.

Where no two locations determine each other, a location is compared with what a module of the model was
given and returned, seen by a plain PyTorch hook.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeAlias

import torch
from einops import einsum
from torch import Tensor
from torch.nn.functional import normalize

from hookgraph.binding.data.findings import Layer, StreamStep
from hookgraph.binding.data.layouts import Layout, arranged
from hookgraph.binding.data.views import Columns, Span
from hookgraph.binding.proving.equations import Identity, Sides, Unapplied, Values, agrees
from hookgraph.binding.proving.scores import of_scores
from hookgraph.binding.running.huggingface import HuggingFaceBinding
from hookgraph.binding.running.normalising import affine_of, normalised
from hookgraph.binding.running.passes import PassState
from hookgraph.binding.running.weights import affine_map, has_table
from hookgraph.binding.tracing.trace import tensors_in
from hookgraph.errors import UnknownLocationError
from hookgraph.hooks.handles import installed
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import TRANSFORMER_STACKS, TransformerStack
from hookgraph.ontology.weights import (
    W_K,
    W_O,
    W_Q,
    W_V,
    W_gate,
    W_in,
    WeightType,
    b_gate,
    b_in,
    b_K,
    b_O,
    b_Q,
    b_V,
)

Seen: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""What modules were given and what they returned, by path."""

_PROJECTED: Final = {"mlp.post": "W_out", "mixer.z": "", "final.ln_out": "W_U"}
"""Locations that are what a projection is given, whole, and its weight where that has a name."""


def identities(
    binding: HuggingFaceBinding, present: Values, clean: Seen, seen: Seen
) -> Iterator[Identity | Unapplied]:
    """Every identity between the locations that are present, and between them and what was seen; and those
    between locations that are present which this architecture leaves out.

    Args:
        binding: the bound model.
        present: the clean values; they tell which equations an architecture leaves out.
        clean: what modules were given and returned in the clean pass.
        seen: the same in the edited pass.
    """
    for stack in TRANSFORMER_STACKS:
        for number, layer in enumerate(binding.findings.layers.get(stack.RESID_PRE.stack, ())):
            yield from _of_stream(binding, stack, number, layer, present)
            yield from _of_streams(layer, present)
            yield from of_scores(stack.attention, number, present)
            yield from of_scores(stack.cross_attention, number, present)
            yield from _of_attention(binding, stack, number, present, clean)
            yield from _of_mlp(binding, stack, number, present, clean)
            yield from _of_mixer(binding, stack, number, present)
    yield from _of_modules(binding, present, seen)


@contextmanager
def watching(binding: HuggingFaceBinding) -> Generator[Seen]:
    """Within this context what norms and projections are given and return is kept, without taps."""
    seen: Seen = {}
    watched = ("norm scale", "head result", "head input")
    anchors = binding.findings.anchors.values()
    paths = {a.module for a in anchors if a.mechanism in watched or a.location.type.name in _PROJECTED}
    paths |= {w.module for w in binding.findings.weights.values() if w.side != "table"}
    layouts: dict[str, Layout] = {a.module: a.layout for a in anchors if a.layout}
    paths -= {a.module for a in anchors if a.calls > 1 or layouts.get(a.module, a.layout) != a.layout}
    repeated = {a.module for a in anchors if a.calls > 1}
    layers = binding.findings.experts.values()
    paths |= {p for e in layers if e.experts not in repeated for p in (e.experts, e.whole) if p}

    state = PassState(packed=bool(binding.findings.packed))

    def keep(path: str) -> Callable[..., None]:
        layout: Layout = layouts.get(path, "")

        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = next((t for t in tensors_in((args, kwargs)) if t.is_floating_point()), None)
            if given is not None and path in binding.findings.overtaken:
                given = given.clone()
            if isinstance(output, Tensor) and given is not None:
                seen[path] = (arranged(layout, given, state.batch), arranged(layout, output, state.batch))

        return hook

    find = binding.model.get_submodule
    hooks = [partial(find(p).register_forward_hook, keep(p), with_kwargs=True) for p in paths]
    with installed(partial(binding.model.register_forward_pre_hook, state.enter, with_kwargs=True), *hooks):
        yield seen


def _of_modules(binding: HuggingFaceBinding, present: Values, seen: Seen) -> Iterator[Identity]:
    """What norms and projections make of the locations at them is what they return."""
    for location in present:
        anchor = binding.findings.anchors[location]
        if anchor.module not in seen:
            continue
        given, returned = seen[anchor.module]
        module = binding.model.get_submodule(anchor.module)
        if anchor.mechanism == "norm scale":
            gain, bias = affine_of(module, given, centred=anchor.centred)
            moved = given - given.mean(-1, keepdim=True) if anchor.centred else given
            yield Identity(
                "norm(x) = gain (x - centre) s + bias",
                (location,),
                _scaled(location, gain * moved, bias, returned),
            )
        elif anchor.mechanism == "head result":
            yield Identity(
                "sum of attn.result + b_O = what the projection returns",
                (location,),
                _summed(location, affine_map(module)[1], returned),
            )
        elif anchor.mechanism == "head input" and isinstance(anchor.view, Columns):
            yield Identity(
                f"{location.type} W + b = what the projection returns, by head",
                (location,),
                _read_by_head(location, anchor.view, *affine_map(module), returned),
            )
    yield from _of_projected(binding, present, seen)


def _of_projected(binding: HuggingFaceBinding, present: Values, seen: Seen) -> Iterator[Identity]:
    """What is given to a projection, wherever it is reached, makes what the projection returns."""
    for location in present:
        if location.type.name not in _PROJECTED:
            continue
        key = (location.type.stack, _PROJECTED[location.type.name], location.layer)
        source, anchor = binding.findings.weights.get(key), binding.findings.anchors[location]
        given = anchor.module if anchor.mechanism == "input" else ""
        path = given if source is None else source.module
        if path in seen and has_table(binding.model.get_submodule(path)):
            weight, bias = affine_map(binding.model.get_submodule(path))
            returned = seen[path][1]
            yield Identity(
                f"{location.type} W + b = what the projection returns",
                (location,),
                _projected(location, weight, bias, returned),
            )


def _scaled(location: Location, moved: Tensor, bias: Tensor, returned: Tensor) -> Sides:
    return lambda x: (moved * x[location] + bias, returned)


def _summed(location: Location, bias: Tensor, returned: Tensor) -> Sides:
    return lambda x: (x[location].sum(2) + bias, returned)


def _read_by_head(location: Location, view: Columns, weight: Tensor, bias: Tensor, returned: Tensor) -> Sides:
    into, offset = view.get(weight[None])[0], view.get(bias[None, None])[0, 0]
    return lambda x: (einsum(x[location], into, "b p h m, m h d -> b p h d") + offset, view.get(returned))


def _projected(location: Location, weight: Tensor, bias: Tensor, returned: Tensor) -> Sides:
    return lambda x: (x[location] @ weight + bias, returned)


def _of_stream(
    binding: HuggingFaceBinding, stack: TransformerStack, number: int, layer: Layer, present: Values
) -> Iterator[Identity]:
    """The residual path, from one point of it that is a location to the next."""
    start, steps = stack.RESID_PRE[number], list[StreamStep]()
    for step in layer.stream:
        if step.kind != "here" or step.location is None:
            steps.append(step)
            continue
        added = [s.location if s.kind == "add" else None for s in steps if s.kind in ("add", "share")]
        origin = None if any(s.kind == "anew" for s in steps) else start
        about = tuple(x for x in (origin, *added) if x is not None)
        if None not in added and all(x in present for x in (*about, step.location)):
            names = " + ".join(str(x.type) for x in about)
            yield Identity(
                f"{step.location.type} = {names}",
                about,
                _along(binding, origin, steps, step.location),
                (step.location,),
            )
        start, steps = step.location, []


def _of_streams(layer: Layer, present: Values) -> Iterator[Identity]:
    """What several streams take a share of: an edit of it moves each of them along itself."""
    shared: Location | None = None
    for step in layer.stream:
        if step.kind == "share":
            shared = step.location
        elif step.kind == "here" and step.location is not None:
            if shared in present and step.location in present and shared is not None:
                text = f"{step.location.type} moves along {shared.type}, in each stream"
                yield Identity(text, (shared,), _moves_along(shared, step.location, present))
            shared = None


def _moves_along(shared: Location, streams: Location, present: Values) -> Sides:
    """The change of the streams, and as much of it as lies along the change of what is shared out."""
    before, base = present[shared], present[streams]

    def sides(values: Values) -> tuple[Tensor, Tensor]:
        along = normalize(values[shared] - before, dim=-1).unsqueeze(2)
        moved = values[streams] - base
        return (moved * along).sum(-1, keepdim=True) * along, moved

    return sides


def _along(
    binding: HuggingFaceBinding, start: Location | None, steps: list[StreamStep], end: Location
) -> Sides:
    model, path = binding.model, tuple(steps)

    def sides(values: Values) -> tuple[Tensor, Tensor]:
        stream = torch.zeros_like(values[end]) if start is None else values[start]
        for step in path:
            if step.kind == "add" and step.location is not None:
                stream = stream + values[step.location]
            elif step.kind == "norm":
                stream = normalised(model.get_submodule(step.name), stream, step.layout)
            elif step.kind == "scale":
                stream = stream * step.factor
            elif step.kind == "parameter":
                owner, _, name = step.name.rpartition(".")
                stream = stream * getattr(model.get_submodule(owner), name)
        return stream, values[end]

    return sides


def _of_attention(
    binding: HuggingFaceBinding, stack: TransformerStack, layer: int, present: Values, clean: Seen
) -> Iterator[Identity]:
    z, result, reads = stack.ATTN_Z[layer], stack.ATTN_RESULT[layer], stack.ATTN_IN[layer]
    project = _weights(binding, stack, layer, W_O, b_O)
    if z in present and result in present and project is not None:
        yield Identity(
            "result = z W_O",
            (z,),
            lambda x: (einsum(x[z], project[0], "b p h d, h d m -> b p h m"), x[result]),
            (result,),
        )
    for kind in (stack.ATTN_Q_IN, stack.ATTN_K_IN, stack.ATTN_V_IN):
        if reads in present and kind[layer] in present and agrees(*_copied(reads, kind[layer])(present)):
            copies = kind[layer]
            yield Identity(f"{kind}[head] = attn.in", (reads,), _copied(reads, copies), (copies,))
    heads = (
        ((stack.ATTN_Q_PRE, stack.ATTN_Q), W_Q, b_Q),
        ((stack.ATTN_K_PRE, stack.ATTN_K), W_K, b_K),
        ((stack.ATTN_V,), W_V, b_V),
    )
    for kinds, weight, bias in heads:
        made = next((k[layer] for k in kinds if k[layer] in present), None)
        source = binding.findings.weights.get((stack.RESID_PRE.stack, weight.value, layer))
        read = _weights(binding, stack, layer, weight, bias)
        if made is None or source is None or read is None or reads not in present:
            continue
        returned = binding.findings.anchors[made].module == source.module
        if returned and _is_given(clean, source.module, present[reads]):
            yield Identity(
                f"{made.type} = attn.in {weight} + {bias}", (reads,), _heads(reads, made, *read), (made,)
            )


def _copied(source: Location, copies: Location) -> Sides:
    return lambda x: (x[source].unsqueeze(2).expand(-1, -1, x[copies].shape[2], -1), x[copies])


def _is_given(clean: Seen, module: str, value: Tensor) -> bool:
    """Whether a module was given this very value in the clean pass: a norm may come between."""
    given = clean.get(module)
    return given is not None and agrees(given[0], value)


def _heads(source: Location, target: Location, weight: Tensor, bias: Tensor) -> Sides:
    return lambda x: (einsum(x[source], weight, "b p m, h m d -> b p h d") + bias, x[target])


def _of_mlp(
    binding: HuggingFaceBinding, stack: TransformerStack, layer: int, present: Values, clean: Seen
) -> Iterator[Identity]:
    reads, before = stack.MLP_IN[layer], stack.MLP_PRE[layer]
    for weight, bias in ((W_gate, b_gate), (W_in, b_in)):
        source = binding.findings.weights.get((stack.RESID_PRE.stack, weight.value, layer))
        into = _weights(binding, stack, layer, weight, bias)
        if source is None or into is None or reads not in present or before not in present:
            continue
        if _is_given(clean, source.module, present[reads]):
            yield Identity("mlp.pre = mlp.in W + b", (reads,), _affine(reads, before, *into), (before,))
        return


def _of_mixer(
    binding: HuggingFaceBinding, stack: TransformerStack, layer: int, present: Values
) -> Iterator[Identity]:
    reads, gate = stack.MIXER_IN[layer], stack.MIXER_GATE[layer]
    if reads not in present or gate not in present:
        return
    anchor = binding.findings.anchors[gate]
    weight, bias = affine_map(binding.model.get_submodule(anchor.module))
    if isinstance(anchor.view, Span):
        weight, bias = anchor.view.get(weight), anchor.view.get(bias)
    sides = _affine(reads, gate, weight, bias)
    if present[reads].shape[-1] == weight.shape[0] and agrees(*sides(present)):
        yield Identity("mixer.gate = mixer.in W + b", (reads,), sides, (gate,))


def _affine(source: Location, target: Location, weight: Tensor, bias: Tensor) -> Sides:
    return lambda x: (x[source] @ weight + bias, x[target])


def _weights(
    binding: HuggingFaceBinding, stack: TransformerStack, layer: int, weight: WeightType, bias: WeightType
) -> tuple[Tensor, Tensor] | None:
    name = stack.RESID_PRE.stack
    try:
        return binding.weight(weight, layer, name), binding.weight(bias, layer, name)
    except UnknownLocationError:
        return None
