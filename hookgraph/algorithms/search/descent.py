"""Descent on embeddings that are projected to tokens in each step: PEZ, and multiple-gradient descent."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hookgraph.algorithms.search.measured import Objective
from hookgraph.algorithms.search.pool import Pool
from hookgraph.algorithms.search.swaps import Swaps

_STARTS = 16
"""How many descents run side by side."""
_STEPS = 8
"""How many steps each takes; then others start elsewhere, in all about twice as many steps as tries."""
_STEP = 0.3
"""Adam's learning rate, in units of the root mean square of the embeddings."""

Slopes: TypeAlias = Float[Tensor, "batch pos d_model"]


def _descend(
    combine: Callable[[Slopes, Slopes], Slopes],
    pool: Pool,
    swaps: Swaps,
    objectives: Sequence[Objective],
    most: float,
    generator: torch.Generator,
) -> None:
    """Fill the pool with the texts that descents pass through, some side by side after others.

    Args:
        combine: the slopes of -|effect| and of the loss -> what is gone against.
        pool: of texts.
        swaps: which are allowed.
        objectives: not used, a descent weighs the effect against the loss.
        most: likewise.
        generator: of where the descents start.
    """
    for _ in range(-(-2 * pool.left // (_STARTS * _STEPS))):
        if not pool.left:
            return
        texts = pool.examiner.start.tokens.expand(_STARTS, -1)
        for _ in range(swaps.edits):
            texts = swaps.mutated(pool.examiner, texts, generator)
        _descents(combine, pool, swaps, texts)


def _descents(
    combine: Callable[[Slopes, Slopes], Slopes], pool: Pool, swaps: Swaps, texts: Int[Tensor, "batch pos"]
) -> None:
    """From some texts on, moving the embeddings of the tokens that are edited.

    A step: measure; go against the combined slopes at these tokens; project to the nearest ones.
    """
    examiner, free = pool.examiner, texts != swaps.start
    moved = examiner.embeddings[texts].clone().requires_grad_()
    size = float(examiner.embeddings.square().mean().sqrt())
    optimizer = torch.optim.Adam([moved], lr=_STEP * size)
    away = -1.0 if float(examiner.start.metric) > 0 else 1.0
    against = torch.zeros_like(moved)
    new = free.any(1)
    for _ in range(_STEPS):
        pool.add(texts)
        if not pool.left:
            return
        if bool(new.any()):  # elsewhere the slopes are those of the last step
            effects = pool.effects(texts[new]).to(moved)
            signs = torch.where(effects == 0, away, effects.sign())[:, None, None]
            rise, loss = examiner.slopes(texts[new]), examiner.loss_slopes(texts[new])
            against[new] = combine(-signs * rise, loss) * free[new][:, :, None]
        moved.grad = against.clone()
        optimizer.step()
        before, texts = texts, projected(moved.detach(), examiner.embeddings, swaps, free)
        new = (texts != before).any(1)


def projected(
    moved: Slopes, embeddings: Float[Tensor, "vocab d_model"], swaps: Swaps, free: Bool[Tensor, "batch pos"]
) -> Int[Tensor, "batch pos"]:
    """The tokens whose embeddings are nearest, among those allowed at each place and the start's own; where
    a text is not free, the start's.
    """
    allowed = swaps.allowed.scatter(1, swaps.start[:, None], True)
    distance = torch.cdist(moved, embeddings).masked_fill(~allowed, torch.inf)
    return torch.where(free, distance.argmin(-1), swaps.start)


def weights(first: Slopes, second: Slopes) -> Float[Tensor, " batch"]:
    """γ in [0, 1] for which |γ first + (1 - γ) second| is least, row by row.

    γ = second · (second - first) / |second - first|², cut off at both ends. Against the shortest of these
    vectors both functions decrease; where it is 0, neither can without the other's increasing.

    Source: Désidéri, "Multiple-gradient descent algorithm", C. R. Acad. Sci. Paris 350 (2012).
    """
    gap = (second - first).flatten(1)
    length = gap.square().sum(1)
    found = (second.flatten(1) * gap).sum(1) / length
    return torch.where(length == 0, 0.5, found).clamp(0, 1)


def _sum(first: Slopes, second: Slopes) -> Slopes:
    return first + second


def _shortest(first: Slopes, second: Slopes) -> Slopes:
    share = weights(first, second)[:, None, None]
    return share * first + (1 - share) * second


pez = partial(_descend, _sum)
"""Along the sum of both slopes. Source: Wen et al., "Hard prompts made easy", arXiv:2302.03668."""

mgd = partial(_descend, _shortest)
"""Along the shortest vector between both slopes, so that neither number gets worse."""
