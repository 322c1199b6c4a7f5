"""Coordinates of a subspace, and subspaces that are learned."""

import pytest
import torch
from torch import Tensor

from hookgraph.errors import ShapeMismatchError, SubgraphError
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import LOGITS, RESID_POST
from hookgraph.subgraphs.subspace import SubspaceGraph, align
from hookgraph_tests.families import bound, tokens
from hookgraph_tests.toy import orthonormal, toy_graph, toy_tokens

IDS = toy_tokens()
SITE = RESID_POST[1]
Q = orthonormal(4, 2)
PLAIN = toy_graph()


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


def test_coordinates_are_saved_edited_and_differentiated():
    subspace = SubspaceGraph(Q, SITE)
    graph = PLAIN.inject(subspace)
    asked = [SITE, SITE.grad, subspace.coordinates, subspace.coordinates.grad, LOGITS]
    run = graph.run(IDS, save=asked, metric=metric)
    torch.testing.assert_close(run[subspace.coordinates], run[SITE] @ Q)
    torch.testing.assert_close(run[subspace.coordinates.grad], run[SITE.grad] @ Q)
    plain = PLAIN.run(IDS, save=[SITE.grad], metric=metric)
    torch.testing.assert_close(run[SITE.grad], plain[SITE.grad])
    torch.testing.assert_close(run.logits, plain.logits)
    assert torch.equal(graph.run(IDS, save=[subspace.coordinates, LOGITS]).logits, plain.logits)
    edited = graph.hook(subspace.coordinates.at(latent=1), lambda c: c + 1).run(IDS).logits
    torch.testing.assert_close(edited, PLAIN.hook(SITE, lambda x: x + Q[:, 1]).run(IDS).logits)


def test_the_gradient_of_an_edited_subspace_is_the_true_one():
    subspace = SubspaceGraph(Q, SITE)
    constant = PLAIN.inject(subspace).hook(subspace.coordinates, torch.zeros_like)
    run = constant.run(IDS, save=[SITE, SITE.grad], metric=metric)
    torch.testing.assert_close(run[SITE.grad] @ Q, torch.zeros(2, 3, 2, dtype=torch.float64))
    step = 1e-6 * torch.ones_like(run[SITE])
    ends = [constant.hook(SITE, lambda x, s=s: x + s * step).run(IDS, metric=metric).metric for s in (1, -1)]
    expected = (run[SITE.grad] * step).flatten(1).sum(1)
    torch.testing.assert_close((ends[0] - ends[1]) / 2, expected, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("k", [1, 2])
def test_alignment_search_finds_the_directions_whose_exchange_does_most(k: int):
    graph = toy_graph(quadratic=False)
    base, source = toy_tokens(((1, 2, 3),)), toy_tokens(((4, 5, 6),))
    # Linear from here on: exchanging c moves the metric by (x_source - x_base) B Bᵀ g.
    run = graph.run(base, save=[SITE, SITE.grad], metric=metric)
    delta = (graph.run(source, save=[SITE])[SITE] - run[SITE])[0, -1]
    g = run[SITE.grad][0, -1]
    best = 0.5 * (delta @ g + delta.norm() * g.norm())
    found = align(
        graph, base, source, metric, SITE, k, part=lambda c: c.at(pos=-1), steps=300, progress=False
    )
    swap = graph.run(source, save=[SITE])[SITE] @ found.basis
    here = found.coordinates.at(pos=-1)
    moved = graph.inject(found).hook(here, lambda _: swap[:, -1]).run(base, metric=metric).metric
    reached = float((moved - run.metric)[0])
    assert reached == pytest.approx(float(best), rel=1e-3)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(k, dtype=torch.float64))
    assert not found.basis.requires_grad


def test_a_learned_subspace_leaves_the_model_as_it_was():
    graph = bound("gpt2", torch.float64)
    before = {p: p.grad for p in graph.binding.model.parameters()}
    align(graph, tokens(), tokens(seed=1), metric, SITE, steps=2, progress=False)
    assert all(p.grad is before[p] and p.requires_grad for p in graph.binding.model.parameters())


@pytest.mark.parametrize("site", [SITE.at(pos=1), SITE.grad], ids=str)
def test_a_part_is_no_site(site: Location):
    made = (lambda: SubspaceGraph(Q, site), lambda: align(PLAIN, IDS, IDS, metric, site, progress=False))
    for make in made:
        with pytest.raises(SubgraphError, match=r"inject at resid.post\[1\], .* of its coordinates"):
            make()


def test_a_basis_that_does_not_fit_is_an_error():
    with pytest.raises(SubgraphError, match="columns of a basis are orthonormal, these are off by 3"):
        SubspaceGraph(2 * Q, SITE)
    wide = SubspaceGraph(orthonormal(5, 2), SITE)
    with pytest.raises(ShapeMismatchError, match=r"directions of 5, and resid.post\[1\] has width 4"):
        PLAIN.inject(wide).run(IDS, save=[wide.coordinates])
