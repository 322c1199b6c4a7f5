"""Lenses read logits off any location."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hookgraph.errors import LoadError, SubgraphError
from hookgraph.ontology.transformer import LOGITS, RESID_POST, RESID_PRE
from hookgraph.subgraphs.lens import LensGraph, Translator, load_translators, logit_lens
from hookgraph_tests.families import FAMILIES, LAYERS, bound, tokens
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
    translator = Translator(4).double()
    assert torch.equal(translator(torch.ones(4).double()), torch.ones(4).double()), "none at first"
    nn.init.normal_(translator.change.weight)
    nn.init.normal_(translator.change.bias)
    lens = LensGraph(unembed, SITE, translator)
    run = PLAIN.inject(lens).run(IDS, save=[SITE, lens.logits])
    h = run[SITE]
    by_hand = unembed(h + h @ translator.change.weight.T + translator.change.bias)
    torch.testing.assert_close(run[lens.logits], by_hand)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logit_lens_is_the_models_own_end(family: str):
    graph = bound(family, torch.float64)
    places = graph.every(RESID_POST)
    run = graph.run(tokens(), save=[*places, LOGITS])
    found = logit_lens(graph, run, places)
    assert list(found) == list(places)
    torch.testing.assert_close(found[places[-1]], run.logits)
    skipped = graph.hook(RESID_POST[LAYERS - 1], lambda _: run[places[0]]).run(tokens()).logits
    torch.testing.assert_close(found[places[0]], skipped)


def test_published_translators_load(tmp_path: Path):
    content = {f"{i}.{name}": torch.randn(*shape) for i in range(2) for name, shape in
               (("weight", (4, 4)), ("bias", (4,)))}  # fmt: skip
    torch.save(content, tmp_path / "params.pt")
    found = load_translators(tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(found[1](x), x + x @ content["1.weight"].T + content["1.bias"])
    assert list(found) == [0, 1]
    torch.save({"x": torch.zeros(1)}, tmp_path / "params.pt")
    with pytest.raises(LoadError, match=r"expected tensors 0.weight, 0.bias, ..., found x"):
        load_translators(tmp_path)
