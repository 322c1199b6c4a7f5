"""Latents chosen one after another, and what is expected of each position, by closed forms."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hookgraph.errors import HookGraphError, ShapeMismatchError, SubgraphError, UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import MLP_OUT
from hookgraph.subgraphs.activations import TopK
from hookgraph.subgraphs.autoencoder import AutoencoderGraph
from hookgraph.subgraphs.dictionary import Autoencoder
from hookgraph.subgraphs.encoders import CausalAttention, MatchingPursuit, Projection, TemporalExpectation
from hookgraph_tests.families import bound, model_of, tokens
from hookgraph_tests.subgraphs.planted import activations, planted
from hookgraph_tests.subgraphs.test_autoencoder import IDS, PLAIN, SITE, metric, with_value
from hookgraph_tests.unchecked import unchecked

PLANTED = planted()
X = activations(PLANTED)


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def matching_pursuit() -> Autoencoder:
    W_dec, b = PLANTED.W_dec, PLANTED.b_dec
    return Autoencoder(W_dec.T, W_dec, b_dec=b, b_in=b, pursuit=MatchingPursuit(rounds=3))


def attention(latents: int, heads: int = 1, seed: int = 0) -> CausalAttention:
    drawn = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Projection:
        weight = torch.randn(rows, latents, generator=drawn, dtype=torch.float64)
        return Projection(weight / latents**0.5, torch.randn(rows, generator=drawn, dtype=torch.float64))

    return CausalAttention(draw(3 * heads), draw(3 * heads), draw(latents), draw(latents), heads)


def temporal() -> Autoencoder:
    expectation = TemporalExpectation([attention(9, 3), attention(9, 3, seed=1)])
    W_enc, W_dec, b = PLANTED.W_enc, PLANTED.W_dec, PLANTED.b_dec
    return Autoencoder(W_enc, W_dec, b_dec=b, b_in=b, activation=TopK(3), expectation=expectation)


# --- matching pursuit -------------------------------------------------------------------------


def test_pursuit_takes_from_the_rest_what_each_direction_explains():
    directions = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    x = row(2.0, 1.0)
    one, two, three = (MatchingPursuit(rounds=n)(x, directions) for n in (1, 2, 3))
    torch.testing.assert_close(one, row(2.0, 0.0))  # 2 of the first against 1.2 + 0.8 of the second: a tie
    torch.testing.assert_close(two, row(2.0, 0.8))
    torch.testing.assert_close(three, two)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tolerance": 0.0}, (3.0, 2.0, 1.0)),
        ({"tolerance": 1.5}, (3.0, 2.0, 0.0)),
        ({"tolerance": 0.0, "rounds": 1}, (3.0, 0.0, 0.0)),
    ],
)
def test_pursuit_stops_at_the_tolerance_or_the_last_round(options: Any, expected: tuple[float, ...]):
    directions = torch.eye(3, dtype=torch.float64)
    found = MatchingPursuit(**options)(row(3.0, 2.0, 1.0), directions)
    torch.testing.assert_close(found, row(*expected))


@pytest.mark.parametrize(("stops", "expected"), [(True, 0.75), (False, 0.9375)])
def test_a_repeated_latent_ends_a_pursuit_if_asked(stops: bool, expected: float):
    """A direction of length sqrt(0.5) takes half of what is left, 0.5 of it in each round."""
    direction = row(0.5**0.5)
    latents = MatchingPursuit(0.0, 4, stops_on_repeat=stops)(row(1.0), direction)
    torch.testing.assert_close(latents @ direction, row(expected))


def test_a_pursuit_has_the_gradient_of_its_sizes():
    pursuit = MatchingPursuit(0.0, 3)
    x, W_dec = X[0].clone().requires_grad_(), PLANTED.W_dec.clone().requires_grad_()
    assert torch.autograd.gradcheck(pursuit, (x, W_dec))


def test_a_pursuit_needs_a_round():
    with pytest.raises(HookGraphError, match="rounds=0: matching pursuit takes at least one round"):
        MatchingPursuit(rounds=0)


def test_a_pursuit_has_no_latents_pre():
    sae = AutoencoderGraph(matching_pursuit(), SITE)
    assert sae.latents_pre not in sae.locations
    with pytest.raises(UnknownLocationError):
        PLAIN.inject(sae).run(IDS, save=[sae.latents_pre])
    with pytest.raises(HookGraphError, match="one after another: it has no latents_pre"):
        matching_pursuit().encode_pre(X)


# --- expectation ------------------------------------------------------------------------------


def test_what_comes_later_is_not_expected_from():
    expectation = temporal().expectation
    assert expectation is not None
    changed = X.clone()
    changed[:, 2] += 1
    before, after = (expectation(x, PLANTED.W_enc, PLANTED.W_dec) for x in (X, changed))
    torch.testing.assert_close(before[:, :2], after[:, :2])
    earlier = X.clone()
    earlier[:, 0] += 1
    assert not torch.allclose(before[:, 2], expectation(earlier, PLANTED.W_enc, PLANTED.W_dec)[:, 2])


def test_the_rest_is_encoded_and_the_expected_is_added():
    dictionary = temporal()
    assert dictionary.expectation is not None
    x = X - PLANTED.b_dec
    expected = dictionary.expectation(x, PLANTED.W_enc, PLANTED.W_dec)
    f = TopK(3)((x - expected) @ PLANTED.W_enc)
    torch.testing.assert_close(dictionary.encode(X), f)
    torch.testing.assert_close(dictionary(X), f @ PLANTED.W_dec + PLANTED.b_dec + expected)
    with pytest.raises(HookGraphError, match=r"expects a part of its input: decode\(latents, x\) needs"):
        dictionary.decode(f)


def test_maps_of_attention_have_to_fit():
    one = Projection(torch.zeros(4, 4), torch.zeros(4))
    with unchecked(), pytest.raises(ShapeMismatchError, match="3 heads do not divide queries of 4"):
        CausalAttention(one, one, one, one, 3)
    wide = Projection(torch.zeros(4, 5), torch.zeros(4))
    with unchecked(), pytest.raises(ShapeMismatchError, match=r"a projection has shape \(4, 5\)"):
        CausalAttention(one, wide, one, one, 2)


# --- both, injected ---------------------------------------------------------------------------


@pytest.mark.parametrize("dictionary", [matching_pursuit(), temporal()], ids=["pursuit", "temporal"])
@pytest.mark.parametrize("gradient", ["identity", "reconstruction", "frozen"])
def test_both_are_injected_like_any_dictionary(dictionary: Autoencoder, gradient: Any):
    sae = AutoencoderGraph(dictionary, SITE, splice_gradient=gradient)
    graph = PLAIN.inject(sae)
    run = graph.run(IDS, save=[*sae.locations, sae.latents.grad], metric=metric)
    assert torch.equal(run.logits, PLAIN.run(IDS).logits)
    f = dictionary.encode(X)
    torch.testing.assert_close(run[sae.latents], f)
    torch.testing.assert_close(run[sae.reconstruction], dictionary(X))
    torch.testing.assert_close(run[sae.error], X - dictionary(X))
    latent = int(f.flatten(0, 1).sum(0).argmax())
    edited = graph.hook(sae.latents.at(latent=latent), torch.zeros_like).run(IDS)
    moved = X - f[..., latent, None] * PLANTED.W_dec[latent]
    torch.testing.assert_close(edited.logits, with_value(moved))


# --- with a cache -----------------------------------------------------------------------------


def expecting(layer: int = 1) -> tuple[HookGraph, AutoencoderGraph]:
    """A graph with a temporal dictionary of the width of its model."""
    graph = bound("gpt2", torch.float64)
    width = graph.run(tokens(), save=[MLP_OUT[layer]])[MLP_OUT[layer]].shape[-1]
    directions = torch.eye(width, dtype=torch.float64)
    expectation = TemporalExpectation([attention(width, 1)])
    sae = AutoencoderGraph(Autoencoder(directions, directions, expectation=expectation), MLP_OUT[layer])
    return graph.inject(sae), sae


def test_a_pass_that_continues_a_cache_does_not_hold_what_is_expected_from():
    graph, sae = expecting()
    options: dict[str, object] = {"max_new_tokens": 3, "do_sample": False}
    with pytest.raises(
        SubgraphError, match=r"holds none of the \d+ that are in the cache: .*use_cache=False"
    ):
        graph.generate(tokens(), save=[sae.latents], **options)
    model: Any = model_of(graph)
    with graph.hook(sae.latents, torch.zeros_like).attached(), pytest.raises(SubgraphError, match="cache"):
        model.generate(tokens(), **options)
    past = model(tokens(), use_cache=True).past_key_values
    with pytest.raises(SubgraphError, match="cache"):
        graph.run({"input_ids": tokens(), "past_key_values": past}, save=[sae.latents])


def test_without_a_cache_generation_gives_the_latents_of_one_pass():
    graph, sae = expecting()
    found = graph.generate(tokens(), save=[sae.latents], max_new_tokens=3, do_sample=False, use_cache=False)
    whole = graph.run(found.tokens[:, :-1], save=[sae.latents])[sae.latents]
    torch.testing.assert_close(found[sae.latents], whole)
