"""Crosscoders: one code of several sites."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hookgraph.errors import ShapeMismatchError, SubgraphError
from hookgraph.ontology.transformer import LOGITS, MLP_OUT, RESID_POST
from hookgraph.subgraphs.crosscoder import Crosscoder, CrosscoderGraph
from hookgraph_tests.toy import toy_graph, toy_tokens
from hookgraph_tests.unchecked import unchecked

IDS = toy_tokens()
SITES = [RESID_POST[0], RESID_POST[1]]
DRAWN = torch.Generator().manual_seed(4)


def normal(*shape: int) -> Tensor:
    return 0.5 * torch.randn(*shape, generator=DRAWN, dtype=torch.float64)


CODER = Crosscoder(normal(2, 4, 6), normal(6, 2, 4), normal(6), normal(2, 4))
PLAIN = toy_graph()


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


def test_it_encodes_all_sites_and_reconstructs_each():
    x = normal(2, 3, 2, 4)
    weight = CODER.joined.W_enc.view(2, 4, 6)
    pre = torch.einsum("bpsd,sdf->bpf", x, weight) + CODER.joined.b_enc
    torch.testing.assert_close(CODER.encode(x), pre.relu())
    for site in range(2):
        direction, bias = CODER.decoder(site)
        torch.testing.assert_close(CODER.decode(pre.relu())[:, :, site], pre.relu() @ direction + bias)


@pytest.mark.parametrize("gradient", ["identity", "reconstruction", "frozen"])
def test_its_locations_stand_at_the_last_site(gradient):
    crosscoder = CrosscoderGraph(CODER, SITES, splice_gradient=gradient)
    graph = PLAIN.inject(crosscoder)
    asked = [*SITES, *crosscoder.locations, crosscoder.latents.grad, LOGITS]
    run = graph.run(IDS, save=asked, metric=metric)
    x = torch.stack([run[site] for site in SITES], dim=-2)
    torch.testing.assert_close(run[crosscoder.latents], CODER.encode(x))
    hat = CODER.decode(CODER.encode(x))[:, :, 1]
    torch.testing.assert_close(run[crosscoder.reconstruction], hat)
    torch.testing.assert_close(run[crosscoder.error], run[SITES[1]] - hat)
    assert torch.equal(run.logits, PLAIN.run(IDS).logits)
    assert str(crosscoder.latents) == "resid.post[1]/crosscoder/latents"


def test_an_edited_latent_moves_its_direction_at_the_last_site():
    crosscoder = CrosscoderGraph(CODER, SITES)
    edited = PLAIN.inject(crosscoder).hook(crosscoder.latents.at(latent=3), lambda f: f + 1)
    direction = CODER.decoder(1)[0][3]
    expected = PLAIN.hook(SITES[1], lambda x: x + direction).run(IDS).logits
    torch.testing.assert_close(edited.run(IDS).logits, expected)


def test_it_can_write_elsewhere():
    later = [MLP_OUT[2], RESID_POST[2]]
    crosscoder = CrosscoderGraph(CODER, SITES, write=later)
    assert list(crosscoder.errors) == later
    edited = PLAIN.inject(crosscoder).hook(crosscoder.latents.at(latent=3), lambda f: f + 1)
    expected = PLAIN
    for site, direction in zip(later, (CODER.decoder(i)[0][3] for i in range(2)), strict=True):
        expected = expected.hook(site, lambda x, d=direction: x + d)
    torch.testing.assert_close(edited.run(IDS).logits, expected.run(IDS).logits)
    asked = [crosscoder.latents.grad, *(x.grad for x in crosscoder.errors.values())]
    run = PLAIN.inject(crosscoder).run(IDS, save=asked, metric=metric)
    by_hand = sum(run[x.grad] @ CODER.decoder(i)[0].T for i, x in enumerate(crosscoder.errors.values()))
    torch.testing.assert_close(run[crosscoder.latents.grad], by_hand)


def test_the_gradient_of_a_reconstruction_reaches_every_site_that_is_read():
    crosscoder = CrosscoderGraph(CODER, SITES, splice_gradient="reconstruction")
    run = PLAIN.inject(crosscoder).run(IDS, save=[SITES[1].grad, crosscoder.latents], metric=metric)
    g = PLAIN.run(IDS, save=[SITES[1].grad], metric=metric)[SITES[1].grad]
    active = run[crosscoder.latents] > 0
    expected = (g @ CODER.decoder(1)[0].T * active) @ CODER.joined.W_enc.view(2, 4, 6)[1].T
    torch.testing.assert_close(run[SITES[1].grad], expected)


WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "count": (lambda: CrosscoderGraph(CODER, SITES[:1]), SubgraphError, "has 2 sites, 1 are given"),
    "order": (lambda: CrosscoderGraph(CODER, SITES[::-1]), SubgraphError, "given in causal order, each once"),
    "too early": (
        lambda: CrosscoderGraph(CODER, SITES, write=[RESID_POST[0], None]),
        SubgraphError,
        r"cannot write at resid.post\[0\], before resid.post\[1\] is known",
    ),
    "shapes": (
        lambda: Crosscoder(normal(2, 4, 6), normal(2, 6, 4), normal(6), normal(2, 4)),
        ShapeMismatchError,
        r"they have to be \(site, d_model, latent\) and \(latent, site, d_model\)",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_a_crosscoder_says_why(
    make: Callable[[], object], kind: type[Exception], message: str
):
    with unchecked(), pytest.raises(kind, match=message):
        make()
