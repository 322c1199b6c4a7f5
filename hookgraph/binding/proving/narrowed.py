"""Prove that one position can be computed by itself: what a pass may then leave out.

Two things together allow it for the last MLP: it treats each position by itself, and nothing after it carries
one position to another.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from hookgraph.binding.data.anchors import Anchor
from hookgraph.binding.proving.edits import unmasked
from hookgraph.binding.running.huggingface import HuggingFaceBinding
from hookgraph.binding.running.mechanisms import element, replaced
from hookgraph.binding.running.narrowing import NARROWED, is_plain, last_mlp, narrowing
from hookgraph.graph.conformance import Gap, Proof
from hookgraph.graph.measuring import take
from hookgraph.hooks.handles import installed
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import FINAL_LN_OUT, MLP_IN

_TOLERANCE: Final = {torch.float64: 1e-9, torch.float32: 1e-3}
"""A product with fewer rows may be summed in another order. Coarser dtypes are treated like single ones."""

_LAST: Final = -1
"""The position that is computed by itself: what attention brings it comes from all others."""


@torch.no_grad()
def check_narrowed(
    binding: HuggingFaceBinding, example: Mapping[str, Any], locations: Sequence[Location]
) -> tuple[list[Proof], list[Gap]]:
    """Of one position: what MLPs return, and the logits where the last MLP is given that position only.

    Args:
        binding: the bound model.
        example: keyword arguments of the model, a batch of one.
        locations: those to check.
    """
    anchors, last = binding.findings.anchors, last_mlp(binding.findings)
    errors: dict[Location, float] = {}
    hooks = [
        partial(
            binding.model.get_submodule(anchors[x].module).register_forward_hook,
            partial(_compare, errors, x, anchors[x]),
            with_kwargs=True,
        )
        for x in locations
        if x.type == MLP_IN and is_plain(anchors[x])
    ]
    with installed(*hooks):
        logits = binding.forward(binding.prepare(dict(example)))
    if last is not None and FINAL_LN_OUT in locations:
        errors[FINAL_LN_OUT] = _error_of_logits(binding, example, last, logits)
    tolerance = _TOLERANCE.get(logits.dtype, _TOLERANCE[torch.float32])
    fine = [Proof(x, NARROWED, True, e, tolerance) for x, e in errors.items() if e <= tolerance]
    reason = "one position by itself gives something else, so passes compute all of them"
    return fine, [Gap(x, NARROWED, reason) for x, error in errors.items() if not error <= tolerance]


def _compare(
    errors: dict[Location, float],
    place: Location,
    anchor: Anchor,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """A hook: run the module once more, on one position."""
    try:
        one = replaced(args, kwargs, anchor.slot, take(element(args, kwargs, anchor.slot), _LAST))
        errors[place] = _difference(module.forward(*one[0], **one[1]), take(output, _LAST))
    except Exception:  # whatever a module raises that is given one position
        errors[place] = float("inf")


def _error_of_logits(
    binding: HuggingFaceBinding, example: Mapping[str, Any], place: Location, logits: Tensor
) -> float:
    """By how much the logits of one position change if the last MLP sees that position only."""
    anchor = binding.findings.anchors[place]
    try:
        with narrowing(binding.model.get_submodule(anchor.module), anchor, _LAST):
            alone = binding.forward(binding.prepare(dict(example)))
        return _difference(take(unmasked(alone), _LAST), take(unmasked(logits), _LAST))
    except Exception:  # whatever a model raises whose MLP sees one position
        return float("inf")


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9))
