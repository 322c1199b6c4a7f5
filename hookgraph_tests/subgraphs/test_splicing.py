"""The three gradients of a splice, against formulas written by hand and finite differences."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hookgraph.errors import MetricError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import MLP_OUT, RESID_POST, RESID_PRE
from hookgraph.subgraphs.autoencoder import AutoencoderGraph
from hookgraph.subgraphs.dictionary import Autoencoder
from hookgraph.subgraphs.splicing import ErrorTerm, SpliceGradient, through
from hookgraph_tests.families import FAMILIES, bound, tokens
from hookgraph_tests.subgraphs.planted import activations, planted
from hookgraph_tests.toy import toy_graph, toy_tokens

IDS = toy_tokens()
SITE, BEHIND = MLP_OUT[1], RESID_POST[1]
PLANTED = planted()
X = activations(PLANTED)
PLAIN = toy_graph().hook(SITE, lambda _: X.clone())
"""The toy network with planted activations at the site: the gradient of what goes on is known by hand."""

GRADIENTS: tuple[SpliceGradient, ...] = ("identity", "reconstruction", "frozen")
ERRORS: tuple[ErrorTerm, ...] = ("kept", "detached", "dropped")


def metric(logits: Tensor) -> Tensor:
    return (logits * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).sum((1, 2))


def spliced(gradient: SpliceGradient, error: ErrorTerm = "kept") -> tuple[AutoencoderGraph, HookGraph]:
    sae = AutoencoderGraph(PLANTED, SITE, splice_gradient=gradient, error=error)
    return sae, PLAIN.inject(sae)


def run_at(graph: HookGraph, *asked: Location) -> Run:
    return graph.run(IDS, save=asked, metric=metric)


def measured(graph: HookGraph) -> Tensor:
    found = graph.run(IDS, metric=metric).metric
    assert found is not None
    return found


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_latent_has_the_gradient_of_its_direction(gradient: SpliceGradient, error: ErrorTerm):
    sae, graph = spliced(gradient, error)
    run = run_at(graph, sae.latents_pre.grad, sae.latents.grad, sae.reconstruction.grad, BEHIND.grad)
    g = run[BEHIND.grad]
    active = (X @ PLANTED.W_enc + PLANTED.b_enc) > 0
    torch.testing.assert_close(run[sae.reconstruction.grad], g, rtol=0, atol=0)
    torch.testing.assert_close(run[sae.latents.grad], g @ PLANTED.W_dec.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run[sae.latents_pre.grad], active * (g @ PLANTED.W_dec.T))


@pytest.mark.parametrize("gradient", ["identity", "frozen"])
def test_the_error_has_the_gradient_of_what_goes_on(gradient: SpliceGradient):
    sae, graph = spliced(gradient)
    run = run_at(graph, sae.error, sae.error.grad, BEHIND.grad)
    assert torch.equal(run[sae.error.grad], run[BEHIND.grad])
    assert run[sae.error].abs().max() > 0.1


@pytest.mark.parametrize(
    ("gradient", "error"),
    [("reconstruction", "kept"), ("identity", "detached"), ("reconstruction", "detached")],
)
def test_an_error_that_is_a_constant_has_no_gradient(gradient: SpliceGradient, error: ErrorTerm):
    sae, graph = spliced(gradient, error)
    with pytest.raises(MetricError, match=r"the metric does not depend on mlp.out\[1\]/sae/error"):
        run_at(graph, sae.error.grad, sae.latents.grad)


@pytest.mark.parametrize("error", ERRORS)
def test_identity_passes_the_gradient_on_as_it_is(error: ErrorTerm):
    sae, graph = spliced("identity", error)
    run = run_at(graph, SITE.grad, BEHIND.grad, sae.latents.grad)
    assert torch.equal(run[SITE.grad], run[BEHIND.grad])
    assert torch.equal(run_at(graph, SITE.grad)[SITE.grad], run[SITE.grad])


@pytest.mark.parametrize("error", ERRORS)
def test_reconstruction_passes_the_gradient_through_encoder_and_decoder(error: ErrorTerm):
    sae, graph = spliced("reconstruction", error)
    run = run_at(graph, SITE.grad, BEHIND.grad, sae.latents)
    active = run[sae.latents] > 0
    expected = ((run[BEHIND.grad] @ PLANTED.W_dec.T) * active) @ PLANTED.W_enc.T
    torch.testing.assert_close(run[SITE.grad], expected)
    alone = run_at(graph, SITE.grad)[SITE.grad]
    torch.testing.assert_close(alone, expected, msg="also where nobody asks for latents")


@pytest.mark.parametrize("asked", [[], ["latents"], ["error"]], ids=str)
def test_frozen_passes_no_gradient(asked: Sequence[str]):
    sae, graph = spliced("frozen")
    places = [getattr(sae, name).grad for name in asked]
    with pytest.raises(MetricError, match=r"the metric does not depend on mlp.out\[1\]"):
        run_at(graph, SITE.grad, *places)


# --- finite differences -----------------------------------------------------------------------


def slope(graph: HookGraph, location: Location, direction: Tensor, step: float = 1e-6) -> Tensor:
    """The derivative of the metric, per example, when a location moves along a direction."""
    ends = [measured(graph.hook(location, lambda x, s=s: x + s * direction)) for s in (step, -step)]
    return (ends[0] - ends[1]) / (2 * step)


def direction_like(value: Tensor) -> Tensor:
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=value.dtype)


INSIDE = ("latents_pre", "latents", "reconstruction", "error")


@pytest.mark.parametrize(
    ("gradient", "place"),
    [(g, p) for g in GRADIENTS for p in INSIDE if (g, p) != ("reconstruction", "error")],
)
def test_gradients_inside_agree_with_finite_differences(gradient: SpliceGradient, place: str):
    sae, graph = spliced(gradient)
    location: Location = getattr(sae, place)
    run = run_at(graph, location, location.grad)
    direction = direction_like(run[location])
    expected = (run[location.grad] * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope(graph, location, direction), expected, rtol=1e-6, atol=1e-8)


def test_reconstruction_agrees_with_finite_differences_at_a_constant_error():
    sae, graph = spliced("reconstruction")
    run = run_at(graph, SITE, SITE.grad, sae.error)
    direction = direction_like(run[SITE])
    constant = graph.hook(sae.error, lambda _: run[sae.error])
    expected = (run[SITE.grad] * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope(constant, SITE, direction), expected, rtol=1e-6, atol=1e-8)


def test_identity_agrees_with_finite_differences_at_constant_latents_and_at_moving_ones():
    _, graph = spliced("identity")
    run = run_at(graph, SITE, SITE.grad)
    direction = direction_like(run[SITE])
    expected = (run[SITE.grad] * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope(graph, SITE, direction), expected, rtol=1e-6, atol=1e-8)


def test_edited_latents_have_the_gradient_at_what_they_were_set_to():
    sae, graph = spliced("identity")
    doubled = graph.hook(sae.latents, lambda f: 2 * f)
    run = run_at(doubled, sae.latents, sae.latents.grad, sae.error.grad, SITE.grad, BEHIND.grad)
    g = run[BEHIND.grad]
    torch.testing.assert_close(run[sae.latents.grad], g @ PLANTED.W_dec.T)
    assert torch.equal(run[sae.error.grad], g)
    assert torch.equal(run[SITE.grad], g)
    direction = direction_like(run[sae.latents])
    expected = (run[sae.latents.grad] * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope(doubled, sae.latents, direction), expected, rtol=1e-6, atol=1e-8)


def test_what_a_hook_writes_is_differentiated():
    sae, graph = spliced("identity")
    strength = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    steered = graph.hook(sae.latents.at(latent=2), lambda f: f + strength)
    found = steered.run(IDS, metric=metric, grad=True).metric
    assert found is not None
    (gradient,) = torch.autograd.grad(found.sum(), strength)
    run = run_at(steered, sae.latents.at(latent=2).grad)
    torch.testing.assert_close(gradient, run[sae.latents.at(latent=2).grad].sum())


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_where_all_that_goes_on_is_set_nothing_is_encoded(
    gradient: SpliceGradient, error: ErrorTerm, monkeypatch: pytest.MonkeyPatch
):
    sae, graph = spliced(gradient, error)
    inside = [sae.latents] if error == "dropped" else [sae.latents, sae.error]
    values = {place: direction_like(run_at(graph, place)[place]) for place in inside}
    slow, fast = graph, graph
    for place, value in values.items():
        slow = slow.hook(place, lambda _, value=value: value.clone())
        fast = fast.hook(place, SetTo(value))
    constant = error == "detached" or gradient == "reconstruction"
    wanted = [sae.latents.grad, BEHIND, BEHIND.grad, *inside, *([] if constant else [x.grad for x in inside])]
    expected = run_at(slow, *wanted)
    monkeypatch.setattr(Autoencoder, "encode_pre", None)
    found = run_at(fast, *wanted)
    for place in wanted:
        torch.testing.assert_close(found[place], expected[place], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[sae.latents], values[sae.latents])
    assert not values[sae.latents].requires_grad


def test_what_is_set_is_encoded_where_something_else_needs_it():
    sae, graph = spliced("identity")
    code = direction_like(run_at(graph, sae.latents)[sae.latents])
    before = graph.hook(sae.latents, lambda f: None).hook(sae.latents, SetTo(code))
    error = X - PLANTED.decode(PLANTED.encode(X))
    for hooked in (graph.hook(sae.latents, SetTo(code)), before.hook(sae.error, SetTo(error))):
        run = run_at(hooked, sae.latents_pre, BEHIND)
        torch.testing.assert_close(run[sae.latents_pre], PLANTED.encode_pre(X))
        onward = graph.hook(SITE, SetTo(PLANTED.decode(code) + error))
        torch.testing.assert_close(
            run[BEHIND], run_at(HookGraph(graph.binding, onward.registrations), BEHIND)[BEHIND]
        )


# --- in a real model --------------------------------------------------------------------------


def of_width(width: int) -> Autoencoder:
    return planted(width, 3 * width)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_identity_every_other_gradient_is_that_of_the_unspliced_model_bit_for_bit(family: str):
    graph, ids = bound(family, torch.float64), tokens()
    upstream = [RESID_PRE[0].grad, MLP_OUT[0].grad, RESID_PRE[1].grad, MLP_OUT[1].grad, RESID_POST[1].grad]
    saes = [AutoencoderGraph(of_width(32), site) for site in (MLP_OUT[1], MLP_OUT[2], RESID_POST[1])]
    asked = [place.grad for sae in saes for place in (sae.latents, sae.error)]
    plain = graph.run(ids, save=upstream, metric=metric)
    run = graph.inject(*saes).run(ids, save=[*upstream, *asked], metric=metric)
    assert torch.equal(run.logits, plain.logits)
    for place in upstream:
        assert torch.equal(run[place], plain[place]), place
    for sae in saes:
        torch.testing.assert_close(run[sae.latents.grad], run[sae.error.grad] @ sae.autoencoder.W_dec.T)


def test_batched_gradients_go_through_a_splice():
    x = X.clone().requires_grad_()
    y = through(x.detach(), 2 * x, x)
    seeds = torch.eye(y.numel(), dtype=x.dtype).view(-1, *y.shape)
    (jacobian,) = torch.autograd.grad(y, x, seeds, is_grads_batched=True)
    assert torch.equal(jacobian, 3 * seeds)


def test_a_splice_can_be_differentiated_twice():
    def scalar(x: Tensor) -> Tensor:
        return through(x.detach(), x.square()).sum()

    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(scalar(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert first.tolist() == [2, 4]
    assert second.tolist() == [2, 2]
