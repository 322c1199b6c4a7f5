"""That queries and keys are the ones which attention compares: shown by how the scores change with them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.errors import InputError
from hookgraph.graph.conformance import Proof
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.hooks.masking import masked_cells
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import TRANSFORMER_STACKS

_TEXT = "scores change with q along k, and with k along q"


def check_comparison(
    graph: HookGraph, example: Mapping[str, Any], clean: Run, tolerance: float
) -> list[Proof]:
    """∂score/∂q is a multiple of k, and ∂score/∂k of q, whatever scale, cap, bias or mask is applied.

    A row of scores may also have been shifted by one of them, which a softmax does not notice.
    """
    stacks = [types for stack in TRANSFORMER_STACKS for types in (stack.attention, stack.cross_attention)]
    asked: list[tuple[Location, Location, Location]] = []
    for location in clean:
        for types in stacks:
            if location.type == types.scores and location.layer is not None:
                q, k = types.q[location.layer], types.k[location.layer]
                if q in clean and k in clean and _comparable(clean[q], clean[k], clean[location]):
                    asked.append((q, k, location))
    if not asked:
        return []
    try:
        run = graph.run(example, save=[x for triple in asked for x in triple], grad=True)
    except InputError:  # a backward pass runs it again, but has no hooks by then
        return []
    proofs: list[Proof] = []
    for triple in asked:
        if not run[triple[-1]].requires_grad:
            continue  # a model may compute a part of it without gradients
        q, k, scores = (run[x] for x in triple)
        error = _misdirection(q, k, scores[..., : k.shape[1]])
        proofs += [Proof(x, "conserved", error <= tolerance, error, tolerance, _TEXT) for x in triple[:2]]
    return proofs


def _comparable(q: Tensor, k: Tensor, scores: Tensor) -> bool:
    """Whether a query and a key have one width, and the scores one row per query head, a column per key.

    Columns of no token, as of a sink or a learned key, stand behind those.
    """
    heads = q.shape[2] % k.shape[2] == 0 and scores.shape[1] == q.shape[2]
    return (
        heads
        and q.shape[-1] == k.shape[-1]
        and scores.shape[2] == q.shape[1]
        and scores.shape[3] >= k.shape[1]
    )


def _misdirection(
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    scores: Float[Tensor, "batch head pos key_pos"],
) -> float:
    """How far gradients of the last position's scores are from key and query, in the first and last head."""
    last, group = q.shape[1] - 1, q.shape[2] // k.shape[2]
    worst = 0.0
    live = torch.where(masked_cells(scores), math.inf, scores.detach())
    for head in {0, q.shape[2] - 1}:
        key = int(live[0, head, last].argmin())  # not the largest: some models subtract it from the row
        score = scores[0, head, last, key]
        by_q, by_k = torch.autograd.grad(score, (q, k), retain_graph=True, allow_unused=True)
        if (
            by_q is None
            or by_k is None
            or not (by_q[0, last, head].any() and by_k[0, key, head // group].any())
        ):
            return 1.0  # these scores are not made of them
        own, keys = q[0, last, head].detach(), k[0, :, head // group].detach()
        pairs = [torch.stack([keys[key], other]) for other in keys]
        along_k = min(_outside(by_q[0, last, head], pair) for pair in pairs)
        worst = max(worst, along_k, _outside(by_k[0, key, head // group], own[None]))
    return worst


def _outside(vector: Float[Tensor, " d_head"], span: Float[Tensor, "... d_head"]) -> float:
    """The part of a vector that lies outside the span of others, relative to its size."""
    v, basis = vector.double(), span.double().mT
    rest = v - basis @ (torch.linalg.pinv(basis) @ v)
    return float(rest.norm() / v.norm().clamp_min(1e-30))
