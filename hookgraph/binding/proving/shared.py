"""Prove that copies of a batch may share their past: that they come out as each with a past of its own."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from jaxtyping import Int
from torch import Tensor

from hookgraph.binding.proving.edits import unmasked
from hookgraph.binding.proving.precision import tolerated
from hookgraph.binding.running.attention import sharing
from hookgraph.binding.running.huggingface import HuggingFaceBinding
from hookgraph.binding.running.outputs import read_output
from hookgraph.binding.running.passes import PassState
from hookgraph.binding.running.recalling import recalled
from hookgraph.binding.running.sharing import SHARED, TOGETHER, SharedPast, attending
from hookgraph.graph.conformance import Gap, Proof
from hookgraph.ontology.locations import Location

_TOLERANCE: Final = {torch.float64: 1e-6, torch.float32: 1e-3}
"""A softmax over more cells is summed in another order, in some models in single precision. Coarser dtypes
are treated like that."""

LAST: Final = (1, 2)
"""So many positions follow the past."""


@torch.no_grad()
def check_shared(
    binding: HuggingFaceBinding, example: Mapping[str, Any], locations: Sequence[Location]
) -> tuple[list[Proof], list[Gap]]:
    """The logits of copies with other last tokens that share one past, and with one each.

    Args:
        binding: the bound model.
        example: keyword arguments of the model, a batch of one.
        locations: those to check: the patterns of its attention.
    """
    anchors = attending(binding.findings)
    chosen = [x.location for x in anchors if x.location in locations]
    tokens = example.get("input_ids")
    if not chosen or not isinstance(tokens, Tensor) or tokens.shape[1] <= max(LAST) + 1:
        return [], []
    error, tolerance = 0.0, 0.0
    try:
        for last in LAST:
            rest = binding.remember(binding.prepare({"input_ids": tokens}), tokens.shape[1] - last)
            if rest is None:
                return [], []
            copies = TOGETHER // last + 2  # more than are run side by side
            inputs = {
                **binding.prepare(dict(rest), copies=copies),
                "input_ids": _others(copies, last, tokens),
            }
            expected = unmasked(read_output(binding.model(**recalled(inputs))))
            past = SharedPast(copies)
            with sharing(dict(binding.model.named_modules()), anchors, past, PassState()):
                found = unmasked(read_output(binding.model(**recalled(inputs, past))))
            error = max(error, float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9)))
            tolerance = tolerated(found.dtype, _TOLERANCE)
    except Exception:  # whatever an attention raises that sees several copies
        error = float("inf")
    if error <= tolerance:
        return [Proof(x, SHARED, True, error, tolerance) for x in chosen], []
    reason = "copies that share a past give something else, so each is given one of its own"
    return [], [Gap(x, SHARED, reason) for x in chosen]


def _others(copies: int, length: int, known: Int[Tensor, "one pos"]) -> Int[Tensor, "batch ..."]:
    """Tokens of the example, others in each copy."""
    rows = torch.arange(copies, device=known.device)[:, None]
    return known[0][(rows + torch.arange(length, device=known.device)) % known.shape[1]]
