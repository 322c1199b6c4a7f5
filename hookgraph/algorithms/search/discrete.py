"""The discrete search: swaps by their first-order score, measured exactly, one edit more in each round."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hookgraph.algorithms.search.fronts import ranks
from hookgraph.algorithms.search.measured import Measured, Objective
from hookgraph.algorithms.search.pool import Pool
from hookgraph.algorithms.search.swaps import Swaps

_BEAM = 8
"""How many texts are edited further in each round."""
_SPARE = 4
"""How many times as many swaps are drawn as are measured: some lead to texts that were measured."""


def discrete(
    pool: Pool, swaps: Swaps, objectives: Sequence[Objective], most: float, generator: torch.Generator
) -> None:
    """Fill the pool: in each round the best texts so far are edited at one more place.

    Args:
        pool: of texts.
        swaps: which are allowed.
        objectives: what makes a text good.
        most: the largest loss of a text that counts.
        generator: of what is drawn.
    """
    parents = pool.examiner.start
    for rounds in range(swaps.edits, 0, -1):
        count = -(-pool.left // rounds)
        predicted = parents.effect[:, None, None] + swaps.scores(pool.examiner, parents.tokens)
        pool.add(swaps.drawn(parents.tokens, predicted, _SPARE * count, generator), count)
        found = pool.texts
        if not len(found):
            return
        parents = found.rows(best(found, objectives, most)[:_BEAM])


def best(texts: Measured, objectives: Sequence[Objective], most: float) -> Int[Tensor, "..."]:
    """All texts, the best first: those fluent enough, by front, by the size of the effect."""
    strange = (texts.loss > most).tolist()
    front = ranks(texts.values(objectives)).tolist()
    effect = texts.effect.abs().tolist()
    order = sorted(range(len(texts)), key=lambda i: (strange[i], front[i], -effect[i]))
    return torch.tensor(order, dtype=torch.long)
