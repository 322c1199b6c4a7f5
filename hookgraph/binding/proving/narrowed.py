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
from hookgraph.binding.proving.precision import tolerated
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

_FEWEST: Final = 3
"""With fewer positions none is seen to be left alone by others."""

_LENGTH: Final = 256
"""How many positions an MLP is tried on: more than an expert has room for, where tokens are dropped."""


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
    tolerance = tolerated(logits.dtype, _TOLERANCE)
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
    """A hook: run the module again on many positions, and on some of these by themselves."""
    given = element(args, kwargs, anchor.slot)
    generator = torch.Generator().manual_seed(3)
    many = torch.randn(2, _LENGTH, given.shape[-1], generator=generator, dtype=torch.float64)
    many = many.to(given) * given.std()

    def run(x: Tensor) -> Tensor:
        again = replaced(args, kwargs, anchor.slot, x)
        return module.forward(*again[0], **again[1])

    try:
        whole = run(many)
        parts = [(run(take(many, p)), take(whole, p)) for p in (0, _LENGTH // 2, -1)]
        errors[place] = max(_difference(*pair) for pair in parts)
    except Exception:  # whatever a module raises that is given more or fewer positions
        errors[place] = float("inf")


def _error_of_logits(
    binding: HuggingFaceBinding, example: Mapping[str, Any], place: Location, logits: Tensor
) -> float:
    """By how much the logits of single positions change if the last MLP sees these only."""
    anchor = binding.findings.anchors[place]
    module = binding.model.get_submodule(anchor.module)
    if logits.shape[1] < _FEWEST:
        return float("inf")
    worst = 0.0
    try:
        for position in (0, logits.shape[1] // 2, -1):
            with narrowing(module, anchor, position):
                alone = binding.forward(binding.prepare(dict(example)))
            worst = max(worst, _difference(take(unmasked(alone), position), take(unmasked(logits), position)))
    except Exception:  # whatever a model raises whose MLP sees one position
        return float("inf")
    return worst


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9))
