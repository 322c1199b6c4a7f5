"""Prove that nothing gets past a location: with z as it was, queries may be what they like.

Equations with a projection hold of whatever module was taken for it. If another stands beside it that reads
the same, as an adapter may, what attention adds changes although z does not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.binding.proving.edits import live
from hookgraph.binding.proving.equations import Values
from hookgraph.binding.running.huggingface import HuggingFaceBinding
from hookgraph.graph.conformance import Proof
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import TRANSFORMER_STACKS, AttentionTypes, TransformerStack


@final
class _Screen(NamedTuple):
    """A location through which all goes that another has to do with what is added to the stream."""

    before: Location
    location: Location
    after: Location


@torch.no_grad()
def check_screened(
    binding: HuggingFaceBinding,
    graph: HookGraph,
    example: Mapping[str, Any],
    clean: Values,
    tolerance: float,
) -> list[Proof]:
    """Of z and neurons, where they are what a projection is given, and of what the heads write: with these as
    they were, what comes after them is as it was, though what comes before is edited. So the sum of what the
    heads write, and what does not depend on them, is all that attention adds.

    Args:
        binding: the bound model.
        graph: the same without hooks.
        example: keyword arguments of the model, a batch of one.
        clean: the clean values of the locations.
        tolerance: how far values may differ, relative to their size.
    """
    anchors = binding.findings.anchors
    every = [(stack, layer) for layer in _layers(clean) for stack in TRANSFORMER_STACKS]
    given = [x for stack, layer in every for x in _of_z(stack, layer, clean)]
    # What attention itself hands on is z all the same if its code does more to it afterwards.
    given = [x for x in given if anchors[x.location].mechanism == "input"]
    written = [x for stack, layer in every for x in _of_result(stack, layer, clean)]
    return [proof for x in (given, written) if x for proof in _check(graph, example, clean, x, tolerance)]


def _check(
    graph: HookGraph,
    example: Mapping[str, Any],
    clean: Values,
    screens: Sequence[_Screen],
    tolerance: float,
) -> Iterator[Proof]:
    """All layers in one pass: where nothing gets past, later layers are given what they were given."""
    generator = torch.Generator().manual_seed(2)
    hooked = graph
    for before, location, _ in screens:
        noise = torch.rand(clean[before].shape, generator=generator, dtype=torch.float64).to(clean[before])
        changed = torch.where(live(before, clean[before]), clean[before] * (0.5 + noise), clean[before])
        hooked = hooked.hook(before, partial(_put, changed)).hook(location, partial(_put, clean[location]))
    found = hooked.run(example, save=[x.after for x in screens])
    for before, location, after in screens:
        error = _difference(clean[after], found[after])
        text = f"{after.type} follows from {location.type}, whatever {before.type} is"
        yield Proof(location, "conserved", error <= tolerance, error, tolerance, text)


def _put(new: Tensor, value: Tensor) -> Tensor:
    """A hook: another value in the place of one. The model computes it all the same."""
    return new.clone()


def _difference(expected: Float[Tensor, "..."], found: Float[Tensor, "..."]) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-6))


def _layers(clean: Values) -> list[int]:
    return sorted({x.layer for x in clean if x.layer is not None})


def _of_z(stack: TransformerStack, layer: int, clean: Values) -> Iterator[_Screen]:
    """z of each attention, and the neurons of the MLP."""
    yield from _of_attention(stack, layer, clean, lambda types: types.z)
    ends = (stack.MLP_OUT[layer], stack.RESID_POST[layer])
    yield from _screen(stack.MLP_PRE[layer], stack.MLP_POST[layer], ends, clean)


def _of_result(stack: TransformerStack, layer: int, clean: Values) -> Iterator[_Screen]:
    """What the heads of each attention write."""
    yield from _of_attention(stack, layer, clean, lambda types: types.result)


def _of_attention(
    stack: TransformerStack, layer: int, clean: Values, kind: Callable[[AttentionTypes], LocationType]
) -> Iterator[_Screen]:
    """Behind queries, which only weigh: values may be added beside z, as memory is."""
    stream = (stack.RESID_MID[layer], stack.RESID_POST[layer])
    for types in (stack.attention, stack.cross_attention):
        yield from _screen(types.q[layer], kind(types)[layer], (types.out[layer], *stream), clean)


def _screen(
    before: Location, location: Location, after: Sequence[Location], clean: Values
) -> Iterator[_Screen]:
    """A screen between a location and the first of those after it that there are."""
    ends = [x for x in after if x in clean]
    if before in clean and location in clean and ends:
        yield _Screen(before, location, ends[0])
