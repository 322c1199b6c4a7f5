"""Lenses read logits off any location."""

import pytest
import torch
from torch import Tensor

from hookgraph.algorithms import TunedLens
from hookgraph.algorithms.readouts.lenses import Translation
from hookgraph.errors import SubgraphError
from hookgraph.ontology.transformer import LOGITS, RESID_POST, RESID_PRE
from hookgraph.subgraphs.lens import LensGraph
from hookgraph_tests.toy import toy_graph, toy_of, toy_tokens

IDS = toy_tokens()
PLAIN = toy_graph()
SITE = RESID_POST[0]


def unembed(h: Tensor) -> Tensor:
    return h @ toy_of(PLAIN).unembedding


def test_a_lens_reads_and_changes_nothing():
    lens = LensGraph(unembed, SITE)
    run = PLAIN.inject(lens).run(IDS, save=[SITE, lens.logits, LOGITS])
    torch.testing.assert_close(run[lens.logits], unembed(run[SITE]))
    assert torch.equal(run.logits, PLAIN.run(IDS).logits)
    with pytest.raises(SubgraphError, match="is read by nothing: an edit there would do nothing"):
        PLAIN.inject(lens).hook(lens.logits, torch.zeros_like).run(IDS)


def test_its_logits_can_be_differentiated():
    lens = LensGraph(unembed, SITE)
    run = PLAIN.inject(lens).run(IDS, save=[RESID_PRE[0], lens.logits], grad=True)
    (gradient,) = torch.autograd.grad(run[lens.logits][..., 0].sum(), run[RESID_PRE[0]])
    assert gradient.abs().min() > 0


def test_a_tuned_lens_translates_first():
    W, b = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    lens = LensGraph(unembed, SITE, TunedLens({1: Translation(W, b)}).translation(SITE))
    run = PLAIN.inject(lens).run(IDS, save=[SITE, lens.logits])
    h = run[SITE]
    torch.testing.assert_close(run[lens.logits], unembed(h + h @ W.T + b))
