"""The logit lens and tuned lenses against the model with a residual in the place of the last one."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from hookgraph.algorithms import LogitLens, PredictionTrajectory, TunedLens, lens_logits, logit_lens
from hookgraph.algorithms.readouts.lenses import Translation
from hookgraph.errors import HookGraphError, InputError, LoadError, LocationError, UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import ATTN_OUT, LOGITS, MLP_OUT, RESID_POST, RESID_PRE
from hookgraph_tests.families import FAMILIES, bound, tokens
from hookgraph_tests.toy import toy_graph, toy_tokens
from hookgraph_tests.unchecked import unchecked


def ended(graph: HookGraph, value: Tensor) -> Tensor:
    """The log-probabilities of the whole model with a value in the place of the last residual."""
    return graph.hook(RESID_POST[2], lambda _: value).run(tokens()).logits.log_softmax(-1)


def shifted() -> TunedLens:
    generator = torch.Generator().manual_seed(0)
    W, b = (torch.randn(*s, generator=generator, dtype=torch.float64) / 9 for s in ((32, 32), (32,)))
    return TunedLens({i: Translation(W, b) for i in range(3)})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_is_the_model_with_a_residual_in_the_place_of_the_last(family: str):
    graph, places = bound(family, torch.float64), [RESID_POST[0], RESID_POST[1], RESID_POST[2]]
    found = logit_lens(graph, tokens(), pos=[-1, 2], k=3, follow=[7])
    run = graph.run(tokens(), save=[*places, LOGITS])
    said = run.logits.log_softmax(-1)[:, [-1, 2]]
    for row, place in enumerate(places):
        expected = ended(graph, run[place])[:, [-1, 2]]
        best = expected.topk(3)
        torch.testing.assert_close(found.log_probs[row], best.values, rtol=0, atol=1e-12)
        assert torch.equal(found.tokens[row], best.indices)
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(found.entropy[row], entropy, rtol=0, atol=1e-12)
        divergence = kl_div(expected, said, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(found.divergence[row], divergence, rtol=0, atol=1e-12)
        order = expected.argsort(-1, descending=True)
        assert torch.equal(found.followed_ranks[row, ..., 0], (order == 7).nonzero()[:, 2].view(2, 2))
        torch.testing.assert_close(found.followed_log_probs[row, ..., 0], expected[..., 7])
    assert found.locations == tuple(places)
    assert found.positions == (5, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_logits_of_a_lens_are_the_models_own_end(family: str):
    graph, places = bound(family, torch.float64), [RESID_POST[0], RESID_POST[2]]
    run = graph.run(tokens(), save=[*places, LOGITS])
    found = lens_logits(graph, run, places)
    assert list(found) == places
    torch.testing.assert_close(found[places[1]], run.logits)
    torch.testing.assert_close(found[places[0]].log_softmax(-1), ended(graph, run[places[0]]))


def test_a_tuned_lens_translates_all_but_the_last_residual_first():
    graph, lens = bound("llama", torch.float64), shifted()
    plain, tuned = logit_lens(graph, tokens(), k=3), logit_lens(graph, tokens(), lens=lens, k=3)
    h = graph.run(tokens(), save=[RESID_POST[1]])[RESID_POST[1]]
    weight, bias = lens.translators[2].weight, lens.translators[2].bias
    expected = ended(graph, h + h @ weight.mT + bias).topk(3)
    torch.testing.assert_close(tuned.log_probs[1], expected.values, rtol=0, atol=1e-12)
    assert torch.equal(tuned.tokens[2], plain.tokens[2])
    assert (plain.lens, tuned.lens) == ("LogitLens", "TunedLens")
    torch.testing.assert_close(lens.translators[0].linear(h) @ h[0, 0], h[0, 0] + weight @ h[0, 0])


def test_a_trajectory_is_tabled_drawn_saved_and_loaded(tmp_path: Path):
    found = logit_lens(bound("gpt2", torch.float64), tokens(), pos=[0, 3], k=3, follow=[5])
    assert found.table().shape == (3, 2)
    assert len(found.likeliest()) == 3 * 2 * 2 * 3
    frame = found.to_frame()
    assert len(frame) == 3 * 2 * 2
    assert list(frame["divergence"]) == found.divergence.flatten().tolist()
    assert list(frame["rank of 5"]) == found.followed_ranks.flatten().tolist()
    assert "<table" in found._repr_html_()
    for measure in ("log_prob", "entropy", "divergence"):
        words = {text.get_text() for text in found.plot(1, measure).axes[0].texts}
        assert words == set(found.table(1).to_numpy().flatten())
    with unchecked(), pytest.raises(HookGraphError, match="unknown measure 'entropi'"):
        found.plot(measure="entropi")  # pyright: ignore[reportArgumentType]
    found.save(tmp_path / "lens.safetensors")
    again = PredictionTrajectory.load(tmp_path / "lens.safetensors")
    assert repr(again) == repr(found)
    assert again.to_frame().equals(frame)


def test_what_a_lens_cannot_read_is_refused():
    graph = bound("gpt2", torch.float64)
    with pytest.raises(LocationError, match=r"attn.out\[0\]@pos=1 is not the stream"):
        logit_lens(graph, tokens(), [ATTN_OUT[0].at(pos=1)])
    with pytest.raises(LocationError, match="pos=9 is out of range"):
        logit_lens(graph, tokens(), pos=9)
    with pytest.raises(HookGraphError, match="k=49: there are 48 tokens"):
        logit_lens(graph, tokens(), k=49)
    with pytest.raises(HookGraphError, match="follow=48: there are 48 tokens"):
        logit_lens(graph, tokens(), follow=[48])
    with pytest.raises(UnknownLocationError, match=r"no translator for resid.post\[0\].*resid.pre\[2\]"):
        logit_lens(graph, tokens(), lens=TunedLens({2: shifted().translators[2]}))


def test_a_fit_lowers_the_divergence_in_every_layer_and_is_kept(tmp_path: Path):
    graph = bound("gpt2", torch.float64)
    start = TunedLens.fit(graph, [tokens()], learning_rate=0.0)
    lens = TunedLens.fit(graph, [tokens()], epochs=20, learning_rate=3e-3)
    assert all(lens.losses[layer] < start.losses[layer] for layer in range(3))
    unfitted = logit_lens(graph, tokens(), [RESID_PRE[1]]).divergence.mean()
    assert start.losses[1] == pytest.approx(float(unfitted), abs=1e-12), "none at first"
    lens.save(tmp_path / "lens")
    again = TunedLens.load(tmp_path / "lens")
    assert (again.metadata, again.losses) == (lens.metadata, lens.losses)
    assert torch.equal(again.translators[1].weight, lens.translators[1].weight)
    assert torch.equal(again.translators[1].bias, lens.translators[1].bias)
    assert lens.translation(RESID_POST[0]) is lens.translators[1]
    assert repr(again) == repr(lens)


def test_a_fit_leaves_out_padding():
    graph, ids = bound("gpt2", torch.float64), tokens()
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    lens = TunedLens.fit(graph, [{"input_ids": ids, "attention_mask": mask}], learning_rate=0.0)
    found = logit_lens(graph, {"input_ids": ids, "attention_mask": mask}, [RESID_PRE[1]]).divergence[0]
    assert lens.losses[1] == pytest.approx(float(found[mask.bool()].mean()), abs=1e-12)


def test_published_translators_load(tmp_path: Path):
    stored = {
        f"{i}.{name}": torch.randn(*shape)
        for i in range(2)
        for name, shape in (("weight", (4, 4)), ("bias", (4,)))
    }
    torch.save(stored, tmp_path / "params.pt")
    (tmp_path / "config.json").write_text(json.dumps({"base_model_name_or_path": "gpt2"}))
    found, x = TunedLens.load(tmp_path), torch.randn(3, 4)
    assert list(found.translators) == [0, 1]
    assert found.metadata == {"name": "gpt2"}
    expected = x + x @ stored["1.weight"].T + stored["1.bias"]
    torch.testing.assert_close(found.translators[1](x), expected)


def test_lenses_that_are_none_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no batches"):
        TunedLens.fit(toy_graph(), [])
    with pytest.raises(InputError, match="no batches left for epoch 2 of 3: pass a list"):
        TunedLens.fit(toy_graph(), iter([toy_tokens()]), epochs=3)
    with pytest.raises(HookGraphError, match="epochs=0: a lens is fitted in at least one"):
        TunedLens.fit(toy_graph(), [toy_tokens()], epochs=0)
    torch.save({"weight": torch.ones(1)}, tmp_path / "params.pt")
    with pytest.raises(LoadError, match=r"expected tensors 0.weight, 0.bias, ..., found weight"):
        TunedLens.load(tmp_path)
    torch.save({"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}, tmp_path / "params.pt")
    with pytest.raises(LoadError, match=r"translators of one width, found \(2, 3\) and \(2,\)"):
        TunedLens.load(tmp_path)
    with pytest.raises(LoadError, match=r"expected tensors in a .pt file, found"):
        TunedLens.load(tmp_path / "absent.pt")
    with pytest.raises(LoadError, match="cannot save a tuned lens"):
        shifted().save(tmp_path / "params.pt")
    with pytest.raises(UnknownLocationError, match=r"no translator for mlp.out\[0\]"):
        shifted().translation(MLP_OUT[0])
    assert LogitLens().translation(MLP_OUT[0]) is None


def test_positions_of_a_padded_batch_are_those_of_each_rows_tokens():
    graph, ids = bound("llama", torch.float64), tokens()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    together = logit_lens(graph, padded, pos=[0, 2, -1])
    alone = logit_lens(graph, ids[1:, 2:], pos=[0, 2, -1])
    assert together.positions == (0, 2, -1)
    assert torch.equal(together.tokens[:, 1], alone.tokens[:, 0])
    torch.testing.assert_close(together.entropy[:, 1], alone.entropy[:, 0], rtol=1e-4, atol=1e-5)
    everything = logit_lens(graph, padded)
    assert everything.positions == tuple(range(6))
    assert torch.equal(everything.tokens[-1, ..., 0], graph.run(padded).logits.argmax(-1))
    with pytest.raises(LocationError, match="row 1 holds pos 0 to 3"):
        logit_lens(graph, padded, pos=4)
