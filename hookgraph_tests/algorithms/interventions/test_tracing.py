"""Causal tracing against passes written by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hookgraph.algorithms import CausalTrace, causal_tracing
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.binding import HuggingFaceBinding
from hookgraph.errors import HookGraphError, LocationError, UnknownLocationError
from hookgraph.graph.abstract import Prepared
from hookgraph.locations import ATTN_OUT, ATTN_Z, EMBED, MLP_OUT, RESID_POST
from hookgraph_tests.families import FAMILIES, bound, tokens
from hookgraph_tests.toy import toy_graph, toy_tokens
from hookgraph_tests.unchecked import unchecked

MEASURE = logit_diff([3, 4], 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_place_is_restored_in_a_noised_pass(family: str):
    graph, ids = bound(family, torch.float64), tokens()
    found = causal_tracing(
        graph, ids, MEASURE, [[1, -4], [2]], graph.every(MLP_OUT), samples=3, window=2, seed=5, batch_size=7
    )
    clean = graph.run(ids, save=[EMBED, *graph.every(MLP_OUT)], metric=MEASURE)
    assert found.noise.std == pytest.approx(float(clean[EMBED].std()))
    subject = torch.zeros(2, 6, 1, dtype=torch.float64)
    subject[0, [1, 2]] = subject[1, 2] = 1
    generator, effects, noised_metrics = torch.Generator().manual_seed(5), [], []
    for _ in range(3):
        drawn = torch.randn(clean[EMBED].shape, generator=generator, dtype=torch.float64)
        noise = 3 * found.noise.std * drawn * subject
        noised = graph.hook(EMBED, lambda value, n=noise: value + n)
        restored = noised
        for layer in (0, 1):  # the window of two layers around layer 1
            value = clean[MLP_OUT[layer]][:, 3]
            restored = restored.hook(MLP_OUT[layer].at(pos=3), lambda _, v=value: v)
        before, after = (g.run(ids, metric=MEASURE).metric for g in (noised, restored))
        assert before is not None
        assert after is not None
        noised_metrics.append(before)
        effects.append(after - before)
    drawn = torch.stack(effects)
    assert torch.allclose(found.effects[MLP_OUT[1]][:, 3], drawn.mean(0), rtol=1e-10, atol=1e-12)
    assert torch.allclose(found.errors[MLP_OUT[1]][:, 3], drawn.std(0) / 3**0.5, rtol=1e-8, atol=1e-12)
    assert torch.allclose(found.corrupted, torch.stack(noised_metrics).mean(0))
    assert clean.metric is not None
    assert torch.allclose(found.clean, clean.metric, atol=1e-12)
    # What lies before the subject is not noised, so that restoring it changes nothing.
    assert torch.allclose(found.effects[MLP_OUT[1]][:, 0], torch.zeros(2, dtype=torch.float64), atol=1e-12)


def test_restoring_the_last_stream_at_the_answer_restores_the_metric():
    graph, ids = bound("llama", torch.float64), tokens()
    found = causal_tracing(graph, ids, MEASURE, [0], [RESID_POST[2]], samples=2)
    assert torch.allclose(found.effects[RESID_POST[2]][:, -1], found.total_effect)


def test_the_first_draws_are_the_same_whatever_their_number_and_the_batch_size():
    graph, ids = bound("gpt2", torch.float64), tokens()
    one = causal_tracing(graph, ids, MEASURE, [1], [ATTN_OUT[0]], samples=4, batch_size=2)
    two = causal_tracing(graph, ids, MEASURE, [1], [ATTN_OUT[0]], samples=4)
    assert torch.allclose(one.effects[ATTN_OUT[0]], two.effects[ATTN_OUT[0]], atol=1e-12)
    single = causal_tracing(graph, ids, MEASURE, [1], [ATTN_OUT[0]], samples=1)
    assert float(single.errors[ATTN_OUT[0]].abs().max()) == 0


def test_padding_does_not_move_what_is_traced():
    graph, ids = bound("gpt2", torch.float64), tokens(1)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0, 0] + [1] * 6])
    alone = causal_tracing(graph, ids, logit_diff(3, 5), [1], [RESID_POST[0]], std=0.0 + 1, samples=1)
    batch = {"input_ids": padded, "attention_mask": mask}
    together = causal_tracing(graph, batch, logit_diff(3, 5), [3], [RESID_POST[0]], samples=1)
    measured = graph.run(ids, save=[EMBED])[EMBED].std()
    assert together.noise.std == pytest.approx(float(measured))
    assert torch.allclose(alone.clean, together.clean, atol=1e-10)


def test_a_trace_is_kept_drawn_and_averaged(tmp_path: Path):
    graph, ids = bound("gpt2"), tokens()
    found = causal_tracing(graph, ids, MEASURE, [1, 2], [*graph.every(MLP_OUT), RESID_POST[1]], samples=2)
    found.save(tmp_path / "trace.safetensors")
    again = CausalTrace.load(tmp_path / "trace.safetensors")
    assert again.noise == found.noise
    assert torch.equal(again.effects[MLP_OUT[1]], found.effects[MLP_OUT[1]])
    assert repr(again) == repr(found)
    mean = again.mean("batch")
    assert torch.allclose(mean.effects[MLP_OUT[0]], found.effects[MLP_OUT[0]].mean(0))
    expected = found.errors[MLP_OUT[0]].square().sum(0).sqrt() / 2
    assert torch.allclose(mean.errors[MLP_OUT[0]], expected)
    rows = [text.get_text() for text in mean.plot().axes[0].get_yticklabels()]
    assert rows == ["0", "1*", "2*", "3", "4", "5"]
    assert list(mean.to_frame().columns) == ["location", "pos", "effect", "error"]
    with pytest.raises(HookGraphError, match="example=7 is out of range, the trace has 2"):
        found.plot(example=7)
    with pytest.raises(HookGraphError, match="do not reduce pos"):
        found.mean("pos").plot()


def test_no_pass_has_more_rows_than_asked_for_and_examples_are_divided(monkeypatch: pytest.MonkeyPatch):
    graph, ids, subject = bound("gpt2", torch.float64), tokens(5), [[1], [2], [1, 2], [3], [1]]
    measure = logit_diff([3, 4, 5, 6, 7], 8)
    expected = causal_tracing(graph, ids, measure, subject, [MLP_OUT[1]], samples=3)
    forward, rows = HuggingFaceBinding.forward, list[int]()

    def counted(binding: HuggingFaceBinding, inputs: Prepared) -> Tensor:
        ids = inputs["input_ids"]
        assert isinstance(ids, Tensor)
        rows.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(binding, inputs)

    monkeypatch.setattr(HuggingFaceBinding, "forward", counted)
    for size in (2, 256):
        rows.clear()
        found = causal_tracing(graph, ids, measure, subject, [MLP_OUT[1]], samples=3, batch_size=size)
        assert size > 2 or max(rows) == 2
        assert torch.allclose(found.effects[MLP_OUT[1]], expected.effects[MLP_OUT[1]], atol=1e-10)
        assert torch.allclose(found.errors[MLP_OUT[1]], expected.errors[MLP_OUT[1]], atol=1e-10)
        assert torch.allclose(found.clean, expected.clean, atol=1e-10)
        assert torch.allclose(found.corrupted, expected.corrupted, atol=1e-10)


def test_numbers_and_positions_may_be_those_of_tensors(tmp_path: Path):
    graph, ids = bound("gpt2"), tokens()
    expected = causal_tracing(graph, ids, MEASURE, [[1, 2], [2, 3]], [MLP_OUT[0]], std=0.5, samples=2)
    subject = torch.tensor([[1, 2], [2, 3]])
    with unchecked():
        found = causal_tracing(
            graph, ids, MEASURE, subject, [MLP_OUT[0]],  # pyright: ignore[reportArgumentType]
            noise=np.float32(3), std=torch.tensor(0.5), samples=2,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    found.save(tmp_path / "trace")
    assert CausalTrace.load(tmp_path / "trace").noise == expected.noise
    assert torch.equal(found.effects[MLP_OUT[0]], expected.effects[MLP_OUT[0]])


@pytest.mark.parametrize(
    ("subject", "given", "message"),
    [
        (3, {}, "subject=3 for a batch of 2: give the positions"),
        (torch.tensor(3), {}, "for a batch of 2: give the positions"),
        ([1], {"std": 0.0}, "std=0.0: it has to be a positive number"),
        ([1], {"std": -1.0}, "std=-1.0: it has to be a positive number"),
        ([1], {"batch_size": 0}, "batch_size=0: it has to be a whole number, at least 1"),
    ],
)
def test_what_names_no_noise_is_refused(subject: Any, given: dict[str, Any], message: str):
    with unchecked(), pytest.raises(HookGraphError, match=message):
        causal_tracing(bound("gpt2"), tokens(), MEASURE, subject, [MLP_OUT[0]], **given)


def test_bad_requests_are_refused():
    graph, ids = bound("gpt2"), tokens()
    with pytest.raises(HookGraphError, match="samples=0: it has to be a whole number, at least 1"):
        causal_tracing(graph, ids, MEASURE, [1], [MLP_OUT[0]], samples=0)
    with pytest.raises(HookGraphError, match="give the positions of its tokens"):
        causal_tracing(graph, ids, MEASURE, [], [MLP_OUT[0]])
    with pytest.raises(HookGraphError, match="for a batch of 2"):
        causal_tracing(graph, ids, MEASURE, [[1]], [MLP_OUT[0]])
    with pytest.raises(LocationError, match="pos=6 is out of range, the inputs have 6"):
        causal_tracing(graph, ids, MEASURE, [6], [MLP_OUT[0]])
    with pytest.raises(LocationError, match="no whole location with axes batch pos d_model"):
        causal_tracing(graph, ids, MEASURE, [1], [ATTN_Z[0]])
    with pytest.raises(UnknownLocationError, match="embed"):
        causal_tracing(toy_graph(), toy_tokens(), MEASURE, [1], [MLP_OUT[0]])
