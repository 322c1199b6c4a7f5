"""`counterfactuals`: texts a few tokens away from one, on which the model answers otherwise."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch

from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.search.descent import mgd, pez
from hookgraph.algorithms.search.discrete import discrete
from hookgraph.algorithms.search.evolution import nsga2
from hookgraph.algorithms.search.examining import Examiner
from hookgraph.algorithms.search.measured import Objective
from hookgraph.algorithms.search.pool import Pool
from hookgraph.algorithms.search.results import Counterfactuals
from hookgraph.algorithms.search.swaps import Swaps
from hookgraph.errors import HookGraphError, nearest
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import EMBED

Method: TypeAlias = Literal["discrete", "nsga2", "pez", "mgd"]
"""How texts are found."""

OBJECTIVES: tuple[Objective, ...] = ("effect", "gradient", "similarity", "fluency")

_Search: TypeAlias = Callable[[Pool, Swaps, Sequence[Objective], float, torch.Generator], None]
_SEARCHES: Mapping[Method, _Search] = {"discrete": discrete, "nsga2": nsga2, "pez": pez, "mgd": mgd}


def counterfactuals(
    graph: HookGraph,
    text: Inputs,
    metric: Metric,
    target: Sequence[Location] | Location = EMBED,
    method: Method = "discrete",
    *,
    edits: int = 2,
    positions: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    forbidden: Sequence[int] = (),
    top_k: int | None = 32,
    max_perplexity: float | None = 1.5,
    objectives: Sequence[Objective] = OBJECTIVES,
    tries: int = 512,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool | None = None,
) -> Counterfactuals:
    """Pairs (x, y) of a text and one with a few tokens swapped, between which a target tells.

    Of y are measured, exactly: the effect m(x with the target's nodes of y) - m(x), the gradient there at
    both ends, the similarity of both texts, and y's perplexity. A pair counts if the model answers y
    otherwise than x, and finds y not much stranger. Returned are the pairs that no other one dominates.

    `discrete`: the first-order score of a swap, d effect / d embedding · (E[v] - E[t]), says which texts are
    worth measuring; the best of them are edited at one more place in the next round.
    `nsga2`: generations of texts with the swaps of two parents and one more, drawn by its score, of which
    pymoo selects by front and crowding. `pez` and `mgd`: descents of embeddings, projected to the nearest
    tokens in each step, along the sum of the slopes of -|effect| and the loss, or along the shortest vector
    between them. Whatever the method, texts are measured exactly.

    Args:
        graph: the hooked model.
        text: x, one text.
        metric: logits -> one number per example.
        target: the nodes, taken together; by default the embeddings, so that the effect is m(y) - m(x).
        method: how texts are found.
        edits: how many tokens may differ.
        positions: where; by default everywhere but at the first token.
        tokens: what may be put in; by default any.
        forbidden: what may not.
        top_k: how many of the likeliest tokens after what precedes a position may take it; None for all.
        max_perplexity: y's perplexity as a multiple of x's, at most; None for no limit.
        objectives: what is large in a good pair.
        tries: how many texts are measured, at most.
        seed: of what is drawn.
        batch_size: how many texts are run at once, at most. Where memory does not suffice, fewer are.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        UnknownLocationError: the graph lacks a node of the target, or token embeddings.
        InputError: it is not one text of tokens, or nothing may be swapped.
        MetricError: the metric is not one finite number per example, or does not depend on the target.
        HookGraphError: an option is unknown or out of range, or pymoo is not installed.

    Source: HotFlip (arXiv:1712.06751) for the score, NSGA-II (Deb et al., 2002) for fronts and selection,
    PEZ (arXiv:2302.03668), multiple-gradient descent (Désidéri, 2012).
    """
    _check(method, objectives, tries, max_perplexity)
    examiner = Examiner.of(graph, text, metric, _nodes(target), batch_size)
    swaps = Swaps.of(examiner, edits, positions, tokens, forbidden, top_k)
    start = examiner.start
    most = math.inf if max_perplexity is None else float(start.loss) + math.log(max_perplexity)
    with Progress("counterfactuals", tries, shown=progress) as bar:
        pool = Pool(examiner, tries, bar)
        _SEARCHES[method](pool, swaps, objectives, most, torch.Generator().manual_seed(seed))
    return Counterfactuals.of(
        examiner,
        pool.texts,
        most,
        method=method,
        objectives=tuple(objectives),
        seed=seed,
    )


def _nodes(target: Sequence[Location] | Location) -> Sequence[Location]:
    return [target] if isinstance(target, Location) else target


def _check(method: str, objectives: Sequence[str], tries: int, max_perplexity: float | None) -> None:
    """Refuse options that mean nothing.

    Raises:
        HookGraphError: naming the option, and what it may be.
    """
    if method not in _SEARCHES:
        raise HookGraphError(f"unknown method {method!r}: {nearest(method, _SEARCHES)}")
    known = get_args(Objective)
    for name in objectives:
        if name not in known:
            raise HookGraphError(f"unknown objective {name!r}: {nearest(name, known)}")
    if not objectives:
        raise HookGraphError(f"no objective: name one at least of {', '.join(known)}")
    if tries < 1:
        raise HookGraphError(f"tries={tries}: measure one text at least")
    if max_perplexity is not None and max_perplexity <= 0:
        raise HookGraphError(f"max_perplexity={max_perplexity} is a factor, such as 1.5; None for no limit")
