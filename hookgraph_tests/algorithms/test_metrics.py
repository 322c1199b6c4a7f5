"""Metrics: their formulas, the positions that they read, and what they refuse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hookgraph.algorithms import metrics
from hookgraph.algorithms.metrics import PositionedMetric
from hookgraph.errors import MetricError
from hookgraph.graph.measuring import Tiled, measure, take
from hookgraph.locations import MLP_OUT
from hookgraph_tests.families import FAMILIES, bound, tokens
from hookgraph_tests.unchecked import unchecked

BATCH, LENGTH, VOCABULARY = 3, 5, 11

Make = Callable[[Tensor, Tensor], PositionedMetric]

EACH: dict[str, Make] = {
    "logit_diff": lambda logits, ids: metrics.logit_diff([1, 2, 3], 4, pos=[0, -1, 2]),
    "logit": lambda logits, ids: metrics.logit([1, 2, 3], pos=[4, 3, 2]),
    "log_prob": lambda logits, ids: metrics.log_prob(torch.tensor([1, 2, 3]), pos=2),
    "prob": lambda logits, ids: metrics.prob([1, 2, 3]),
    "margin": lambda logits, ids: metrics.margin([1, 2, 3], pos=[4, 3, 2]),
    "kl_to": lambda logits, ids: metrics.kl_to(logits.flip(0), pos=[1, 2, 3]),
    "kl_to everywhere": lambda logits, ids: metrics.kl_to(logits.flip(0), pos=None),
    "cross_entropy": lambda logits, ids: metrics.cross_entropy(ids),
}


def drawn() -> tuple[Tensor, Tensor]:
    logits = torch.randn(BATCH, LENGTH, VOCABULARY, dtype=torch.float64)
    return logits, torch.randint(VOCABULARY, (BATCH, LENGTH))


def test_logit_difference_reads_the_answer_of_each_example():
    logits, _ = drawn()
    got = metrics.logit_diff([1, 2, 3], 4, pos=[0, -1, 2])(logits)
    rows, places = torch.arange(3), torch.tensor([0, 4, 2])
    correct = logits[rows, places, torch.tensor([1, 2, 3])]
    assert torch.equal(got, correct - logits[rows, places, 4])


def test_a_logit_is_that_of_the_answer_of_each_example():
    logits, _ = drawn()
    assert torch.equal(
        metrics.logit([1, 2, 3], pos=2)(logits), logits[torch.arange(3), 2, torch.tensor([1, 2, 3])]
    )
    assert metrics.logit([1, 2, 3]).tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "metric", [metrics.logit([1, 2, 3]), metrics.logit_diff(5, [1, 2, 3]), metrics.logit(4)]
)
def test_answers_are_linear_along_the_columns_of_an_unembedding(
    metric: metrics.Logit | metrics.LogitDifference,
):
    table, states = (
        torch.randn(7, VOCABULARY, dtype=torch.float64),
        torch.randn(BATCH, 1, 7, dtype=torch.float64),
    )
    found = (states[:, 0] * metric.along(table, BATCH)).sum(-1)
    assert torch.allclose(found, metric(states @ table), rtol=1e-12)


def test_a_margin_is_positive_exactly_where_the_token_wins():
    logits, _ = drawn()
    best = logits[:, -1].argmax(-1)
    assert (metrics.margin(best)(logits) > 0).all()
    assert (metrics.margin((best + 1) % VOCABULARY)(logits) < 0).all()


def test_divergence_is_that_of_torch_and_zero_from_itself():
    logits, _ = drawn()
    other = torch.randn_like(logits)
    expected = torch.nn.functional.kl_div(
        other[:, -1].log_softmax(-1), logits[:, -1].log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert torch.allclose(metrics.kl_to(logits)(other), expected, rtol=1e-12)
    assert metrics.kl_to(logits, pos=None)(logits).abs().max() < 1e-12


def test_cross_entropy_is_that_of_torch_over_the_real_positions():
    logits, ids = drawn()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    got = metrics.cross_entropy(ids, mask)(logits)
    for row, (first, last) in enumerate([(0, 4), (2, 4), (0, 2)]):
        expected = torch.nn.functional.cross_entropy(logits[row, first:last], ids[row, first + 1 : last + 1])
        assert torch.allclose(got[row], expected, rtol=1e-12)


@pytest.mark.parametrize("make", EACH.values(), ids=EACH)
def test_a_metric_needs_no_logits_but_those_it_says(make: Make):
    logits, ids = drawn()
    metric = make(logits, ids)
    read = logits if metric.reads is None else take(logits, metric.reads)
    assert torch.equal(metric.of(read), metric(logits))


@pytest.mark.parametrize("make", EACH.values(), ids=EACH)
def test_the_rows_of_a_metric_are_the_metric_of_those_examples(make: Make):
    logits, ids = drawn()
    metric = make(logits, ids)
    assert torch.equal(metric.rows(slice(1, 3))(logits[1:3]), metric(logits)[1:3])


@pytest.mark.parametrize("make", EACH.values(), ids=EACH)
def test_a_tiled_metric_measures_each_copy(make: Make):
    logits, ids = drawn()
    metric = make(logits, ids)
    changed = logits + 1e-2 * torch.randn_like(logits)
    tiled = Tiled(metric, BATCH, copies=2)
    both = torch.cat([logits, changed])
    expected = torch.cat([metric(logits), metric(changed)])
    assert torch.equal(tiled(both), expected)
    read = both if tiled.reads is None else take(both, tiled.reads)
    assert torch.equal(tiled.of(read), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pos", [-1, [0, 3]], ids=str)
def test_a_pass_that_computes_the_logits_read_measures_the_same(family: str, pos: int | list[int]):
    graph, at = bound(family, torch.float64), MLP_OUT[1]
    metric = metrics.log_prob(7, pos=pos)
    whole = graph.run(tokens(), save=[at, at.grad], metric=metric)
    part = graph.run(tokens(), save=[at, at.grad], metric=metric, logits=False)
    assert whole.metric is not None
    assert part.metric is not None
    assert torch.allclose(part.metric, whole.metric, rtol=1e-12)
    assert torch.allclose(part[at.grad], whole[at.grad], rtol=1e-10, atol=1e-14)
    assert torch.equal(part.logits, whole.logits)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (metrics.logit_diff(1, 2, pos=7), "pos=7 is out of range, the logits have 5 positions"),
        (metrics.logit_diff(1, 2, pos=[0, 1]), "pos has shape .2,. for a batch of 3: give one for all"),
        (metrics.log_prob(1, pos=[0, 1, -6]), "pos=-6 is out of range"),
        (metrics.prob([1, 2]), "token has shape .2,. for a batch of 3"),
        (metrics.prob(11), "token 11 is out of range, there are 11 logits"),
        (metrics.margin([1, 2, 12]), "token 12 is out of range"),
        (metrics.kl_to(torch.zeros(2, 5, 11)), "the reference .2, 1, 11.: give the reference's logits"),
        (metrics.cross_entropy(torch.zeros(3, 4, dtype=torch.long)), "give the tokens that are run"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_the_logits_is_refused(metric: PositionedMetric, message: str):
    logits, _ = drawn()
    with pytest.raises(MetricError, match=message):
        measure(metric, logits, taken=False)


def test_copies_cannot_be_divided():
    with pytest.raises(MetricError, match="divide the metric itself"):
        Tiled(metrics.prob(1), 2, 2).rows(slice(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_measured_in_single_precision(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 3, 40, generator=generator)).to(dtype)
    other = (logits.float() + 0.05 * torch.randn(2, 3, 40, generator=generator)).to(dtype)
    for metric in (metrics.kl_to(logits), metrics.log_prob(3), metrics.prob(3), metrics.logit_diff(3, 5)):
        found = measure(metric, other, taken=False)
        assert found.dtype == torch.float32
        assert torch.equal(found, measure(metric, other.float(), taken=False))
    assert (measure(metrics.kl_to(logits), other, taken=False) > 0).all()
    assert torch.equal(metrics.kl_to(logits)(other), metrics.kl_to(logits.float())(other.float()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: metrics.prob(-1), "token=-1 is no token"),
        (lambda: metrics.logit_diff([1, -2], 3), "correct=-2 is no token"),
        (lambda: metrics.logit_diff(" Mary", 3), "correct=' Mary': give token ids, which a tokenizer makes"),
        (lambda: metrics.log_prob([5.7, 6.2]), "token=.5.7, 6.2.: give token ids"),
        (lambda: metrics.margin(1, pos=0.5), "pos=0.5: give positions"),
        (
            lambda: metrics.margin(1, pos=torch.tensor([[1, 2]])),
            "pos has shape .1, 2.: give one for all",
        ),
        (lambda: metrics.cross_entropy([[1, 2]]), "takes the token ids that are run"),
        (
            lambda: metrics.cross_entropy(tokens(), torch.ones(2, 3)),
            "mask has shape .2, 3., the tokens",
        ),
    ],
    ids=range(8),
)
def test_what_is_no_token_or_position_is_refused_when_the_metric_is_made(
    make: Callable[[], object], message: str
):
    with unchecked(), pytest.raises(MetricError, match=message):
        make()


def test_a_position_may_be_a_tensor_without_axes():
    logits, _ = drawn()
    found = metrics.logit_diff(1, 2, pos=torch.tensor(3))
    assert found.reads == 3
    assert torch.equal(found(logits), metrics.logit_diff(1, 2, pos=3)(logits))


@pytest.mark.parametrize("hits", [torch.bool, torch.long])
def test_hits_and_counts_are_measured_as_numbers(hits: torch.dtype):
    logits, _ = drawn()
    found = measure(lambda x: (x[:, -1].argmax(-1) == 3).to(hits), logits, taken=False)
    assert found.dtype == torch.float32
    assert torch.equal(found.bool(), logits[:, -1].argmax(-1) == 3)


@pytest.mark.parametrize(("pos", "row"), [(-1, 1), (4, 1), ([4, 3], 1), (0, 0)])
def test_padding_is_not_read(pos: int | list[int], row: int):
    graph, ids = bound("llama"), tokens(batch=2, pos=5)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with pytest.raises(MetricError, match=f"which is padding in row {row}: .*are at pos=.4, 2."):
        graph.run({"input_ids": ids, "attention_mask": mask}, metric=metrics.prob(3, pos=pos))
    found = graph.run({"input_ids": ids, "attention_mask": mask}, metric=metrics.prob(3, pos=[-1, 2]))
    assert found.metric is not None
    assert found.metric.isfinite().all()
