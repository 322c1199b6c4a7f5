# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""NSGA-II: generations of texts, crossed, swapped by first-order score, selected by rank and crowding."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.algorithms.search.fronts import ranks
from hookgraph.algorithms.search.measured import Measured, Objective
from hookgraph.algorithms.search.pool import Pool
from hookgraph.algorithms.search.swaps import Swaps
from hookgraph.errors import HookGraphError

_SIZE = 32
"""How many texts a generation has."""
_IDLE = 5
"""How many generations may bring no new text before the search ends."""


def nsga2(
    pool: Pool, swaps: Swaps, objectives: Sequence[Objective], most: float, generator: torch.Generator
) -> None:
    """Fill the pool, as `discrete` does: children have the swaps of two parents, and one more.

    Raises:
        HookGraphError: pymoo is not installed.

    Source: Deb et al., "NSGA-II", IEEE Trans. Evol. Comput. 6 (2002).
    """
    start = pool.examiner.start.tokens
    scores = swaps.scores(pool.examiner, start)
    population = pool.add(swaps.drawn(start, scores, _SIZE, generator))
    idle = 0
    while population is not None and pool.left and idle < _IDLE:
        parents = _chosen(population, objectives, generator)
        children = swaps.mutated(
            pool.examiner, crossed(*parents, start[0], swaps.edits, generator), generator
        )
        measured = pool.add(children)
        idle = idle + 1 if measured is None else 0
        if measured is not None:
            both = Measured.joined([population, measured])
            population = both.rows(survivors(both, objectives, most, _SIZE, generator))


def _chosen(
    population: Measured, objectives: Sequence[Objective], generator: torch.Generator
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Two parents for each child: the one of lower rank among two drawn, each time."""
    rank = ranks(population.values(objectives)).cpu()
    drawn = torch.randint(len(population), (2, _SIZE, 2), generator=generator)
    better = rank[drawn].argmin(-1, keepdim=True)
    first, second = drawn.gather(-1, better)[..., 0].to(population.tokens.device)
    return population.tokens[first], population.tokens[second]


def crossed(
    first: Int[Tensor, "batch pos"],
    second: Int[Tensor, "batch pos"],
    start: Int[Tensor, " pos"],
    edits: int,
    generator: torch.Generator,
) -> Int[Tensor, "batch pos"]:
    """Each token from either parent; of edits too many, some drawn at random are undone."""
    device = first.device
    coin = torch.rand(first.shape, generator=generator).to(device)
    child = torch.where(coin < 0.5, first, second)
    edited = child != start
    order = torch.where(edited, torch.rand(first.shape, generator=generator).to(device), -1.0)
    place = order.argsort(1, descending=True).argsort(1)
    return torch.where(edited & (place < edits), child, start)


def survivors(
    texts: Measured, objectives: Sequence[Objective], most: float, count: int, generator: torch.Generator
) -> Int[Tensor, "..."]:
    """The numbers of those that go on: those that count by front, then by crowding; then the others.

    Raises:
        HookGraphError: pymoo is not installed.
    """
    try:
        from pymoo.core.population import Population
        from pymoo.core.problem import Problem
        from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
    except ImportError as error:
        raise HookGraphError(
            "the method 'nsga2' selects texts by pymoo, which is not installed: use 'discrete', or "
            "pip install 'hookgraph[search]'"
        ) from error
    strangeness = (texts.loss - most).clamp(min=0)
    broken: Float[Tensor, "batch ..."] = torch.stack([strangeness, (~texts.differs).to(strangeness)], 1)
    values = texts.values(objectives)
    population = Population.new("F", -_array(values), "G", _array(broken))
    problem = Problem(n_var=1, n_obj=values.shape[1], n_ieq_constr=broken.shape[1])
    seed = int(torch.randint(2**31, (1,), generator=generator))
    kept = RankAndCrowding().do(
        problem,
        population,
        n_survive=min(count, len(texts)),
        random_state=np.random.default_rng(seed),
        return_indices=True,
    )
    return torch.tensor(kept, dtype=torch.long)


def _array(values: Float[Tensor, "batch ..."]) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    return values.double().cpu().numpy()
