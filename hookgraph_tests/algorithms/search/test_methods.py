"""NSGA-II, PEZ and multiple-gradient descent: their parts by hand, and what they find by brute force."""

import sys
from itertools import product

import pytest
import torch
from torch import Tensor

from hookgraph.algorithms import counterfactuals
from hookgraph.algorithms.search.descent import projected, weights
from hookgraph.algorithms.search.evolution import crossed, survivors
from hookgraph.algorithms.search.examining import Examiner
from hookgraph.algorithms.search.fronts import dominated
from hookgraph.algorithms.search.measured import Measured
from hookgraph.algorithms.search.results import counting
from hookgraph.algorithms.search.searching import OBJECTIVES, Method
from hookgraph.algorithms.search.swaps import Swaps
from hookgraph.errors import HookGraphError
from hookgraph.locations import ATTN_OUT
from hookgraph_tests.algorithms.search.test_counterfactuals import STORY, demo
from hookgraph_tests.toy import toy_graph, toy_tokens

TEXT = toy_tokens([[1, 2, 3]])
TARGET = ATTN_OUT[1]
GRAPH = toy_graph(embeds=True)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 2] - logits[:, 0, 4] + logits[:, 1, 5]


def examiner() -> Examiner:
    return Examiner.of(GRAPH, TEXT, metric, [TARGET], 256)


def every_text() -> Measured:
    """All texts of three of the seven tokens."""
    return examiner().measure(torch.tensor([*product(range(7), repeat=3)]))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("method", "least"), [("discrete", 1 - 1e-9), ("nsga2", 1 - 1e-9), ("pez", 0.95), ("mgd", 0.95)]
)
def test_the_largest_effect_of_two_edits_is_found(method: Method, least: float):
    texts = every_text()
    two = texts.rows(((texts.edits <= 2) & (texts.edits > 0)).nonzero()[:, 0])
    assert len(two) == 126
    found = counterfactuals(
        GRAPH, TEXT, metric, TARGET, method, positions=[0, 1, 2], top_k=None, tries=120, max_perplexity=None
    )
    assert len(found.seen) <= 120
    assert float(found.seen.effect.abs().max()) >= least * float(two.effect.abs().max())
    front = found.front.values(OBJECTIVES)
    counted = found.seen.rows(counting(found.seen, found.most).nonzero()[:, 0]).values(OBJECTIVES)
    assert len(front) == int((~dominated(counted)).sum())


@pytest.mark.parametrize("method", ["nsga2", "pez", "mgd"])
def test_every_method_finds_the_text_that_names_the_other(method: Method):
    graph, logit_difference, head = demo()
    found = counterfactuals(graph, STORY, logit_difference, head, method, tries=128)
    assert float(found.front.effect.abs().max()) > 8
    assert 10 in (found.front.tokens[0] != found.start.tokens[0]).nonzero()[:, 0].tolist()
    assert int(found.seen.edits.max()) <= 2


@pytest.mark.parametrize("method", ["nsga2", "pez", "mgd"])
def test_a_seed_gives_the_same_texts_again(method: Method):
    first, again = (
        counterfactuals(GRAPH, TEXT, metric, TARGET, method, top_k=None, tries=30, seed=3).seen.tokens
        for _ in range(2)
    )
    assert torch.equal(first, again)


# --- NSGA-II ----------------------------------------------------------------------------------


def test_those_that_count_survive_by_front_and_the_others_come_last():
    texts, most = every_text(), float(examiner().start.loss)
    counts = counting(texts, most)
    front = counts.nonzero()[:, 0]
    front = front[~dominated(texts.values(OBJECTIVES)[front])]
    kept = survivors(texts, OBJECTIVES, most, len(front), generator())
    assert sorted(kept.tolist()) == front.tolist()
    more = survivors(texts, OBJECTIVES, most, int(counts.sum()) + 3, generator())
    assert set(counts.nonzero()[:, 0].tolist()) < set(more.tolist())


def test_a_child_has_tokens_of_its_parents_and_few_edits():
    start = torch.zeros(6, dtype=torch.long)
    first = torch.tensor([[1, 1, 0, 0, 0, 0]]).repeat(50, 1)
    second = torch.tensor([[0, 0, 2, 2, 0, 0]]).repeat(50, 1)
    children = crossed(first, second, start, 2, generator())
    assert bool(((children == first) | (children == second) | (children == start)).all())
    assert set((children != start).sum(1).tolist()) == {0, 1, 2}
    assert bool((children[:, 4:] == 0).all())
    alike = crossed(first, first, start, 2, generator())
    assert torch.equal(alike, first)


def test_without_pymoo_the_error_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pymoo.core.population", None)
    with pytest.raises(HookGraphError, match=r"not installed: use 'discrete', or pip install 'hookgraph"):
        counterfactuals(GRAPH, TEXT, metric, TARGET, "nsga2", top_k=None)


# --- descent ----------------------------------------------------------------------------------


def test_weights_are_those_of_the_shortest_vector_between_two():
    drawn = torch.randn(2, 40, 3, 2, generator=generator(), dtype=torch.float64)
    first, second = drawn
    share = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None, None, None]
    lengths = (share * first + (1 - share) * second).flatten(2).square().sum(-1)
    best = share.flatten()[lengths.argmin(0)]
    found = weights(first, second)
    assert torch.allclose(found, best, atol=1e-3)
    assert 0 < int(((found > 0) & (found < 1)).sum()) < 40
    shortest = found[:, None, None] * first + (1 - found)[:, None, None] * second
    length = shortest.square().sum((1, 2))
    for slope in (first, second):
        assert bool(((shortest * slope).sum((1, 2)) >= length - 1e-12).all())


def test_of_equal_slopes_either_is_shortest():
    same = torch.ones(2, 1, 3)
    assert weights(same, same).tolist() == [0.5, 0.5]


def test_embeddings_are_projected_to_the_nearest_token_that_is_allowed():
    table = torch.tensor([[0.0, 0], [1, 0], [2, 0], [0, 3]])
    swaps = Swaps(torch.tensor([0, 3]), torch.tensor([[False, False, True, True], [True] * 4]), 2)
    moved = torch.tensor([[[1.2, 0], [0.9, 0.1]], [[0.9, 0.0], [0.9, 0.1]]])
    everywhere = torch.ones(2, 2, dtype=torch.bool)
    assert projected(moved, table, swaps, everywhere).tolist() == [[2, 1], [0, 1]]
    first_only = torch.tensor([[True, False]]).expand(2, 2)
    assert projected(moved, table, swaps, first_only).tolist() == [[2, 3], [0, 3]]
