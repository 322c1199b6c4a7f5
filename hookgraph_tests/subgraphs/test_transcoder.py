"""Transcoders and cross-layer transcoders: values, edits and gradients between sites."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hookgraph.errors import MetricError, ShapeMismatchError, SubgraphError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import LOGITS, MLP_IN, MLP_OUT, RESID_POST, RESID_PRE
from hookgraph.subgraphs.activations import JumpReLU
from hookgraph.subgraphs.dictionary import Autoencoder, Origin
from hookgraph.subgraphs.splicing import ErrorTerm, SpliceGradient
from hookgraph.subgraphs.transcoder import CrossLayerTranscoder, CrossLayerTranscoderGraph, TranscoderGraph
from hookgraph_tests.families import bound, tokens
from hookgraph_tests.subgraphs.planted import planted
from hookgraph_tests.toy import toy_graph, toy_tokens

IDS = toy_tokens()
READ, WRITE = RESID_PRE[1], MLP_OUT[1]
DRAWN = torch.Generator().manual_seed(3)


def normal(*shape: int) -> Tensor:
    return 0.5 * torch.randn(*shape, generator=DRAWN, dtype=torch.float64)


PLANTED = planted()
SKIPPING = Autoencoder(PLANTED.W_enc, PLANTED.W_dec, PLANTED.b_enc, PLANTED.b_dec, W_skip=normal(4, 4))
PLAIN = toy_graph()
SAVED = PLAIN.run(IDS, save=[READ, WRITE])
X, Y = SAVED[READ], SAVED[WRITE]
F = PLANTED.encode(X)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


def with_output(value: Tensor, graph: HookGraph = PLAIN) -> Tensor:
    """The logits when this is what the MLP wrote."""
    return graph.hook(WRITE, lambda _: value.clone()).run(IDS).logits


def transcoding(
    gradient: SpliceGradient = "identity", error: ErrorTerm = "kept", *, skip: bool = False
) -> tuple[TranscoderGraph, HookGraph]:
    found = TranscoderGraph(SKIPPING if skip else PLANTED, READ, WRITE, splice_gradient=gradient, error=error)
    return found, PLAIN.inject(found)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("gradient", ["identity", "reconstruction", "frozen"])
def test_it_reads_here_and_writes_there(gradient: SpliceGradient, skip: bool):
    transcoder, graph = transcoding(gradient, skip=skip)
    run = graph.run(IDS, save=[*transcoder.locations, transcoder.latents.grad, LOGITS], metric=metric)
    expected = F @ PLANTED.W_dec + PLANTED.b_dec + (X @ SKIPPING.W_skip if skip else 0)
    torch.testing.assert_close(run[transcoder.latents], F)
    torch.testing.assert_close(run[transcoder.reconstruction], expected)
    torch.testing.assert_close(run[transcoder.error], Y - expected)
    assert torch.equal(run.logits, PLAIN.run(IDS).logits), "unedited nothing changes"
    assert torch.equal(graph.run(IDS).logits, PLAIN.run(IDS).logits)
    assert [str(x) for x in (transcoder.latents, transcoder.error)] == [
        "resid.pre[1]/transcoder/latents",
        "mlp.out[1]/transcoder/error",
    ]


@pytest.mark.parametrize("skip", [False, True])
def test_an_edited_latent_moves_what_is_written(skip: bool):
    transcoder, graph = transcoding(skip=skip)
    edited = graph.hook(transcoder.latents.at(latent=2), lambda f: f + 1).run(IDS).logits
    torch.testing.assert_close(edited, with_output(Y + PLANTED.W_dec[2]))
    doubled = graph.hook(transcoder.latents, lambda f: 2 * f)
    run = doubled.run(IDS, save=[transcoder.error, transcoder.latents.grad, LOGITS], metric=metric)
    torch.testing.assert_close(run.logits, with_output(Y + F @ PLANTED.W_dec))
    unedited = graph.run(IDS, save=[transcoder.error])
    assert torch.equal(run[transcoder.error], unedited[transcoder.error])


def test_with_the_error_dropped_it_stands_for_the_mlp():
    _, graph = transcoding(error="dropped", skip=True)
    torch.testing.assert_close(graph.run(IDS).logits, with_output(SKIPPING(X)))


def gradient_at(graph: HookGraph, *places) -> dict:
    run = graph.run(IDS, save=[p.grad for p in places], metric=metric)
    return {p: run[p.grad] for p in places}


def test_with_identity_all_gradients_are_those_of_the_model():
    transcoder, graph = transcoding(skip=True)
    places = [RESID_PRE[0], READ, WRITE]
    found = gradient_at(graph, *places, transcoder.latents, transcoder.error)
    for place, gradient in gradient_at(PLAIN, *places).items():
        assert torch.equal(found[place], gradient)
    torch.testing.assert_close(found[transcoder.latents], found[WRITE] @ PLANTED.W_dec.T)
    assert torch.equal(found[transcoder.error], found[WRITE])


def around(value: Tensor) -> Tensor:
    """The gradient at what is read of everything but the MLP: the MLP's output is a constant."""
    return gradient_at(PLAIN.hook(WRITE, lambda _: value), READ)[READ]


@pytest.mark.parametrize("skip", [False, True])
def test_with_reconstruction_the_gradient_goes_through_the_transcoder_instead_of_the_mlp(skip: bool):
    _, graph = transcoding("reconstruction", skip=skip)
    found = gradient_at(graph, READ, RESID_POST[1])
    g = found[RESID_POST[1]]
    through = (g @ PLANTED.W_dec.T * (F > 0)) @ PLANTED.W_enc.T + (g @ SKIPPING.W_skip.T if skip else 0)
    torch.testing.assert_close(found[READ], around(Y) + through)
    with pytest.raises(MetricError, match=r"does not depend on mlp.out\[1\]"):
        gradient_at(graph, WRITE)


@pytest.mark.parametrize("skip", [False, True])
def test_frozen_lets_the_gradient_through_the_skip_connection_alone(skip: bool):
    transcoder, graph = transcoding("frozen", skip=skip)
    found = gradient_at(graph, READ, RESID_POST[1], transcoder.latents, transcoder.error)
    g = found[RESID_POST[1]]
    torch.testing.assert_close(found[READ], around(Y) + (g @ SKIPPING.W_skip.T if skip else 0))
    torch.testing.assert_close(found[transcoder.latents], g @ PLANTED.W_dec.T)
    assert torch.equal(found[transcoder.error], g)
    alone = gradient_at(graph, READ)[READ]
    torch.testing.assert_close(alone, found[READ], msg="also where nobody asks for latents")


def test_on_a_real_model_it_stands_between_mlp_in_and_mlp_out():
    graph, dictionary = bound("llama", torch.float64), planted(32, 50)
    known = Autoencoder(dictionary.W_enc, dictionary.W_dec, origin=Origin(reads=MLP_IN[1], writes=MLP_OUT[1]))
    transcoder = TranscoderGraph(known)
    run = graph.inject(transcoder).run(tokens(), save=[MLP_IN[1], MLP_OUT[1], *transcoder.locations, LOGITS])
    torch.testing.assert_close(run[transcoder.latents], known.encode(run[MLP_IN[1]]))
    torch.testing.assert_close(run[transcoder.error], run[MLP_OUT[1]] - known(run[MLP_IN[1]]))
    assert torch.equal(run.logits, graph.run(tokens()).logits)


# --- cross-layer ------------------------------------------------------------------------------


def cross_layer() -> CrossLayerTranscoder:
    return CrossLayerTranscoder(
        [normal(4, 5) for _ in range(3)],
        [normal(5, 3 - i, 4) for i in range(3)],
        [normal(5) for _ in range(3)],
        [normal(4) for _ in range(3)],
        activations=[JumpReLU(torch.full((5,), 0.1, dtype=torch.float64)) for _ in range(3)],
    )


CLT = cross_layer()
READS, WRITES = [RESID_PRE[i] for i in range(3)], [MLP_OUT[i] for i in range(3)]


def test_every_layer_writes_at_all_later_ones():
    clt = CrossLayerTranscoderGraph(CLT, READS, WRITES)
    graph = PLAIN.inject(clt)
    run = graph.run(IDS, save=[*READS, *WRITES, *clt.locations, LOGITS])
    latents = [CLT.encode(run[site], i) for i, site in enumerate(READS)]
    for i in range(3):
        by_hand = sum(latents[m] @ CLT.W_dec[m][:, i - m] for m in range(i + 1)) + CLT.b_dec[i]
        torch.testing.assert_close(run[clt.latents[i]], latents[i])
        torch.testing.assert_close(run[clt.reconstructions[i]], by_hand)
        torch.testing.assert_close(run[clt.reconstructions[i]], CLT.decode(latents[: i + 1]))
        torch.testing.assert_close(run[clt.errors[i]], run[WRITES[i]] - by_hand)
    assert torch.equal(run.logits, PLAIN.run(IDS).logits)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_an_edited_latent_of_a_cross_layer_transcoder_moves_all_that_it_writes(with_gradient: bool):
    clt = CrossLayerTranscoderGraph(CLT, READS, WRITES)
    edited = PLAIN.inject(clt).hook(clt.latents[1].at(latent=3), lambda f: f + 1)
    asked = [clt.latents[1].grad, LOGITS] if with_gradient else [LOGITS]
    logits = edited.run(IDS, save=asked, metric=metric).logits
    moved = PLAIN
    for i in (1, 2):
        direction = CLT.W_dec[1][3, i - 1]
        moved = moved.hook(WRITES[i], lambda y, d=direction: y + d)
    # The latents of layer 2 are read after the edit, and are those of the edited stream.
    by_hand = moved.run(IDS).logits
    torch.testing.assert_close(logits, by_hand)


def test_a_latent_has_the_sum_of_the_gradients_of_what_it_writes():
    clt = CrossLayerTranscoderGraph(CLT, READS, WRITES)
    asked = [clt.latents[0].grad, *(e.grad for e in clt.errors), *(w.grad for w in WRITES)]
    run = PLAIN.inject(clt).run(IDS, save=asked, metric=metric)
    expected = sum(run[WRITES[i].grad] @ CLT.W_dec[0][:, i].T for i in range(3))
    torch.testing.assert_close(run[clt.latents[0].grad], expected)
    plain = PLAIN.run(IDS, save=[w.grad for w in WRITES], metric=metric)
    for write, error in zip(WRITES, clt.errors, strict=True):
        assert torch.equal(run[write.grad], plain[write.grad])
        assert torch.equal(run[error.grad], run[write.grad])


# --- errors -----------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "order": (
        lambda: TranscoderGraph(PLANTED, WRITE, READ),
        SubgraphError,
        r"writes behind what it reads: resid.pre\[1\] is not behind mlp.out\[1\]",
    ),
    "no sites": (lambda: TranscoderGraph(PLANTED), SubgraphError, "does not say where it belongs"),
    "too few": (
        lambda: CrossLayerTranscoderGraph(CLT, READS[:2], WRITES),
        SubgraphError,
        "a transcoder of 3 layers needs 3 sites in `reads`, not 2",
    ),
    "layers in the wrong order": (
        lambda: CrossLayerTranscoderGraph(CLT, WRITES, READS),
        SubgraphError,
        r"writes behind what it reads: resid.pre\[0\] is not behind mlp.out\[0\]",
    ),
    "decoders": (
        lambda: CrossLayerTranscoder([normal(4, 5)], [normal(5, 2, 4)], [normal(5)], [normal(4)]),
        ShapeMismatchError,
        r"W_dec\[0\] has shape \(5, 2, 4\); of 1 layers it has to be \(latent, 1, d_model\)",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_a_transcoder_says_why(
    make: Callable[[], object], kind: type[Exception], message: str
):
    with pytest.raises(kind, match=message):
        make()
