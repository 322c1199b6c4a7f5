"""Stimulus-response alignment: against sums written by hand, and where a lens is the model itself."""

from pathlib import Path

import pytest
import torch

from hookgraph.algorithms import StimulusResponse, TunedLens, stimulus_response
from hookgraph.algorithms.bases.alignment import Intervention, aitchison
from hookgraph.algorithms.bases.subspaces import deranged
from hookgraph.algorithms.readouts.lenses import Translation
from hookgraph.errors import HookGraphError, LocationError
from hookgraph.locations import MLP_OUT, RESID_POST
from hookgraph_tests.families import bound, tokens
from hookgraph_tests.unchecked import unchecked

INTERVENTIONS = ("noise", "resample", "lens")


def test_the_weighted_cosine_is_that_of_centred_log_ratios():
    x, y = torch.randn(2, 3, 5, dtype=torch.float64)
    w = torch.rand(3, 5, dtype=torch.float64).softmax(-1)
    for row in range(3):
        a, b = (z[row] - (w[row] @ z[row]) for z in (x, y))
        expected = (w[row] * a) @ b / ((w[row] * a) @ a * ((w[row] * b) @ b)).sqrt()
        assert float(aitchison(x, y, w)[row]) == pytest.approx(float(expected), abs=1e-12)
    torch.testing.assert_close(aitchison(x, y, w), aitchison(x + 3, y - 1, w))


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_after_the_last_layer_the_lens_is_the_model(intervention: Intervention):
    found = stimulus_response(
        bound("llama", torch.float64), tokens(), [RESID_POST[2]], intervention=intervention
    )
    torch.testing.assert_close(found.similarity, torch.ones_like(found.similarity), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.stimulus, found.response)
    assert bool((found.response > 0).all())


def test_stimulus_and_response_are_those_of_the_hooked_model():
    graph, place = bound("gpt2", torch.float64), RESID_POST[0]
    found = stimulus_response(graph, tokens(), [place], seed=4)
    h = graph.run(tokens(), save=[place])[place]
    other = h.flatten(0, 1)[deranged(h.shape[0] * h.shape[1], 4)].view_as(h)

    def lens(x: torch.Tensor) -> torch.Tensor:
        return graph.hook(RESID_POST[2], lambda _: x).run(tokens()).logits.log_softmax(-1)

    before, after = lens(h), lens(other)
    said, moved = (
        g.run(tokens()).logits.log_softmax(-1) for g in (graph, graph.hook(place, lambda _: other))
    )
    expected = aitchison(after - before, moved - said, (said.exp() + moved.exp()) / 2)
    torch.testing.assert_close(found.similarity[0], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.stimulus[0], (before.exp() * (before - after)).sum(-1))
    torch.testing.assert_close(found.response[0], (said.exp() * (said - moved)).sum(-1))


def test_through_the_lens_states_come_to_say_what_others_said():
    graph, generator = bound("gpt2", torch.float64), torch.Generator().manual_seed(0)
    W = torch.randn(32, 32, generator=generator, dtype=torch.float64) / 20
    lens = TunedLens({i: Translation(W, W[0]) for i in range(3)})
    plain, inverted = (
        stimulus_response(graph, tokens(), [RESID_POST[0]], lens=lens, intervention=x)
        for x in ("resample", "lens")
    )
    torch.testing.assert_close(inverted.stimulus, plain.stimulus, rtol=0.05, atol=0)


def test_padding_neither_changes_nor_counts():
    graph, ids = bound("gpt2", torch.float64), tokens()
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    found = stimulus_response(graph, {"input_ids": ids, "attention_mask": mask}, intervention="noise")
    for part in (found.similarity, found.stimulus, found.response):
        assert torch.equal(part.isnan(), ~mask.bool().expand(3, -1, -1))
    assert not found.to_frame().isna().any().any()


def test_an_alignment_is_tabled_drawn_saved_and_loaded(tmp_path: Path):
    found = stimulus_response(bound("gpt2", torch.float64), tokens())
    found.save(tmp_path / "alignment.safetensors")
    again = StimulusResponse.load(tmp_path / "alignment.safetensors")
    assert repr(again) == repr(found)
    assert again.locations == (RESID_POST[0], RESID_POST[1], RESID_POST[2])
    assert list(found.to_frame().columns) == ["similarity", "stimulus", "response"]
    assert "<table" in found._repr_html_()
    assert found.plot().axes


def test_what_cannot_be_aligned_is_refused():
    graph = bound("gpt2", torch.float64)
    with pytest.raises(LocationError, match=r"mlp.out\[0\]@pos=1 is not the stream"):
        stimulus_response(graph, tokens(), [MLP_OUT[0].at(pos=1)])
    with pytest.raises(HookGraphError, match="at least two vectors"):
        stimulus_response(graph, tokens()[:1, :1])
    with unchecked(), pytest.raises(HookGraphError, match="unknown intervention 'noize'"):
        stimulus_response(graph, tokens(), intervention="noize")  # pyright: ignore[reportArgumentType]
