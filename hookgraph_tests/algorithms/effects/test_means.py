"""Effects over a stream of pairs: means equal those of one batch, and go on where they were interrupted."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import hookgraph as hg
from hookgraph.algorithms import mean_patching_effect
from hookgraph.algorithms.batches import Batch
from hookgraph.algorithms.effects import means
from hookgraph.algorithms.effects.footprint import Footprint
from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.errors import HookGraphError, InputError, LoadError, MetricError, ShapeMismatchError
from hookgraph.graph.measuring import Metric
from hookgraph.hooks.editing import Hook
from hookgraph.locations import ATTN_PATTERN, ATTN_Z, MLP_OUT, RESID_PRE
from hookgraph_tests.families import bound, model_of
from hookgraph_tests.unchecked import unchecked

AT = [ATTN_Z[1], MLP_OUT[0].at(pos=-1), ATTN_PATTERN[2]]
ANSWERS = torch.tensor([3, 4, 5, 6, 7, 8])


def ids(seed: int, count: int = 6, length: int = 5) -> Tensor:
    return torch.randint(3, 40, (count, length), generator=torch.Generator().manual_seed(seed))


def divided() -> list[Batch]:
    clean, corrupt = ids(0), ids(1)
    parts = [slice(0, 2), slice(2, 3), slice(3, 6)]
    return [(clean[p], corrupt[p], logit_diff(ANSWERS[p], 9)) for p in parts]


def graph() -> hg.HookGraph:
    return bound("gpt2", torch.float64)


@pytest.mark.parametrize("method", ["attrib", "ig", "exact"])
def test_the_mean_over_batches_is_that_over_one(method: hg.algorithms.effects.patching.Method):
    at = AT[:2]
    whole = patching_effect(graph(), ids(0), ids(1), logit_diff(ANSWERS, 9), at, method, joint=["d_head"])
    found = mean_patching_effect(graph(), divided(), at=at, method=method, joint=["d_head"])
    for place in at:
        values = whole.effects[place]
        assert torch.allclose(found.effects[place], values.mean(0), rtol=0, atol=1e-12)
        error = values.std(0) / len(values) ** 0.5
        assert torch.allclose(found.standard_errors[place], error, rtol=1e-6, atol=1e-9)
        assert torch.allclose(found.deltas[place], whole.deltas[place].mean(0), rtol=0, atol=1e-12)
    assert found.total_effect is not None
    assert whole.total_effect is not None
    assert torch.allclose(found.total_effect, whole.total_effect, rtol=0, atol=1e-12)
    assert found.residuals.keys() == whole.residuals.keys()
    assert found.reduced[hg.Dimension.BATCH] == "mean"


def test_summed_over_positions_batches_may_differ_in_length():
    pairs: list[Batch] = [(ids(0), ids(1)), (ids(2, length=7), ids(3, length=7))]
    metric = logit_diff(3, 5)
    found = mean_patching_effect(graph(), pairs, metric, at=[ATTN_Z[1], ATTN_PATTERN[2]], positions="summed")
    each = [patching_effect(graph(), a, b, metric, [ATTN_Z[1], ATTN_PATTERN[2]]) for a, b in pairs]  # pyright: ignore[reportAssignmentType]
    z = torch.cat([x.effects[ATTN_Z[1]].sum(1) for x in each]).mean(0)
    pattern = torch.cat([x.effects[ATTN_PATTERN[2]].sum((2, 3)) for x in each]).mean(0)
    assert torch.allclose(found.effects[ATTN_Z[1]], z, rtol=0, atol=1e-12)
    assert torch.allclose(found.effects[ATTN_PATTERN[2]], pattern, rtol=0, atol=1e-12)
    with pytest.raises(ShapeMismatchError, match="pad all batches to one length"):
        mean_patching_effect(graph(), pairs, metric, at=[ATTN_Z[1]])


def test_an_interrupted_run_is_taken_up_where_it_was(tmp_path: Path):
    file = tmp_path / "effects.safetensors"
    whole = mean_patching_effect(graph(), divided(), at=AT)

    def breaking() -> Iterator[Batch]:
        yield from divided()[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mean_patching_effect(graph(), breaking(), at=AT, checkpoint=file)
    with patch.object(means, "patching_effect", wraps=patching_effect) as run:
        found = mean_patching_effect(graph(), divided(), at=AT, checkpoint=file)
    assert run.call_count == 1, "what is in the checkpoint is not run again"
    for place in AT:
        assert torch.allclose(found.effects[place], whole.effects[place], rtol=0, atol=1e-12)
        assert torch.allclose(found.standard_errors[place], whole.standard_errors[place], rtol=0, atol=1e-12)
    assert torch.equal(found.total_effect, whole.total_effect)  # pyright: ignore[reportArgumentType]
    assert found.convention == whole.convention


def test_a_checkpoint_of_other_work_or_of_other_pairs_is_refused(tmp_path: Path):
    file = tmp_path / "effects.safetensors"
    mean_patching_effect(graph(), divided(), at=AT, checkpoint=file)
    with pytest.raises(LoadError, match="differs in method"):
        mean_patching_effect(graph(), divided(), at=AT, method="ig", checkpoint=file)
    with pytest.raises(LoadError, match="batch 0 is not the one"):
        mean_patching_effect(graph(), divided()[1:], at=AT, checkpoint=file)


def last(logits: Tensor) -> Tensor:
    return logits[:, -1, 3]


def other_last(logits: Tensor) -> Tensor:
    return logits[:, -1, 4]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pairs": [(ids(0, 2), ids(5, 2)), (ids(2, 2), ids(3, 2))]}, "batch 0 .* its corrupt differs"),
        ({"pairs": [(ids(0, 2), None), (ids(2, 2), None)]}, "batch 0 .* its corrupt differs"),
        ({"pairs": [(ids(0, 2), ids(1, 2))]}, "holds 2 batches, the pairs are 1"),
        ({"metric": logit_diff(3, 6)}, "batch 0 .* its metric differs"),
        ({"metric": other_last}, "batch 0 .* its metric differs"),
        ({"hook": torch.zeros_like}, "differs in hooks"),
        ({"hook": lambda x: x * 3}, "differs in hooks"),
    ],
)
def test_a_checkpoint_is_not_taken_up_by_other_work(changed: dict[str, Any], message: str, tmp_path: Path):
    file = tmp_path / "effects.safetensors"

    work: dict[str, Any] = {
        "pairs": [(ids(0, 2), ids(1, 2)), (ids(2, 2), ids(3, 2))],
        "metric": last if changed.get("metric") is other_last else logit_diff(3, 5),
        "hook": lambda x: x * 2,
    }

    def done(pairs: Sequence[Batch], metric: Metric, hook: Hook) -> Tensor:
        hooked = graph().hook(MLP_OUT[1], hook)
        return mean_patching_effect(hooked, pairs, metric, at=AT[:1], checkpoint=file).effects[AT[0]]

    assert torch.equal(done(**work), done(**work))
    with pytest.raises(LoadError, match=message):
        done(**{**work, **changed})


def test_pairs_with_and_without_corrupt_inputs_have_no_mean():
    for mixed in ([(ids(0), ids(1)), (ids(2), None)], [(ids(0), None), (ids(2), ids(3))]):
        with pytest.raises(InputError, match=r"has corrupt inputs, batch \d has none"):
            mean_patching_effect(graph(), mixed, logit_diff(3, 5), at=AT[:1])


def test_columns_that_are_other_positions_in_each_row_are_not_averaged():
    mask = torch.ones(6, 5, dtype=torch.long)
    mask[1, :2] = 0
    pairs: list[Batch] = [tuple({"input_ids": ids(i), "attention_mask": mask} for i in (0, 1))]  # pyright: ignore[reportAssignmentType]
    metric = logit_diff(3, 5)
    with pytest.raises(InputError, match="with padding on the left a column is another position"):
        mean_patching_effect(graph(), pairs, metric, at=AT[:1])
    for at, positions in ((AT[1:2], "aligned"), (AT[:1], "summed")):
        whole = patching_effect(graph(), *pairs[0][:2], metric, at).mean("batch")
        found = mean_patching_effect(graph(), pairs, metric, at=at, positions=positions)
        expected = whole.effects if positions == "aligned" else whole.effects.sum("pos")
        assert torch.allclose(found.effects[at[0]], expected[at[0]], rtol=0, atol=1e-12)


def test_mean_ablation_of_each_node_over_a_data_set():
    statistics = hg.mean_activations(graph(), [ids(0), ids(2)], AT[:1])
    pairs: list[Batch] = [(ids(0), None), (ids(2), None)]
    metric = logit_diff(3, 5)
    found = mean_patching_effect(graph(), pairs, metric, at=AT[:1], statistics=statistics)
    each = [patching_effect(graph(), a, None, metric, AT[:1], statistics=statistics) for a, _ in pairs]  # pyright: ignore[reportAssignmentType]
    expected = torch.cat([x.effects[AT[0]] for x in each]).mean(0)
    assert torch.allclose(found.effects[AT[0]], expected, rtol=0, atol=1e-12)
    assert found.convention.ablation == "mean"
    assert found.sum("pos", "d_head").check(1)[0].exact is not None


def test_a_batch_that_fails_loses_nothing_of_those_before(tmp_path: Path):
    file = tmp_path / "effects.safetensors"
    bad = (ids(4), ids(5), lambda logits: logits[:, -1, 0] * torch.nan)
    with pytest.raises(MetricError, match="not a finite number"):
        mean_patching_effect(graph(), [*divided(), bad], at=AT, checkpoint=file)
    found = mean_patching_effect(graph(), divided(), at=AT, checkpoint=file)
    assert torch.allclose(
        found.effects[AT[0]], mean_patching_effect(graph(), divided(), at=AT).effects[AT[0]], atol=1e-12
    )


def test_the_top_of_a_mean_is_measured_exactly_over_all_pairs():
    found = mean_patching_effect(graph(), divided(), at=[ATTN_Z[1]], joint=["d_head"]).check(top=3)
    exact = mean_patching_effect(graph(), divided(), at=[ATTN_Z[1]], method="exact", joint=["d_head"])
    for node in found:
        index = dict(node.location.index)
        expected = exact.effects[ATTN_Z[1]][index[hg.Dimension.POS], index[hg.Dimension.HEAD]]
        assert node.exact == pytest.approx(float(expected), abs=1e-12)
    with pytest.raises(HookGraphError, match="the pairs streamed through"):
        mean_patching_effect(graph(), iter(divided()), at=[ATTN_Z[1]]).check()


def test_means_are_saved_and_loaded(tmp_path: Path):
    found = mean_patching_effect(graph(), divided(), at=AT)
    found.save(tmp_path / "mean.safetensors")
    loaded = hg.PatchingEffect.load(tmp_path / "mean.safetensors")
    assert loaded.reduced == found.reduced
    for place in AT:
        assert torch.equal(loaded.effects[place], found.effects[place])
        assert torch.equal(loaded.standard_errors[place], found.standard_errors[place])
        assert torch.equal(loaded.deltas[place], found.deltas[place])


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([], InputError, "there are no pairs"),
        ([torch.ones(2, 3)], InputError, "a batch of pairs is"),
        ([(ids(0), ids(1))], MetricError, "nothing is measured"),
    ],
)
def test_what_is_no_stream_of_pairs_is_refused(pairs: list[Batch], error: type[Exception], message: str):
    with unchecked(), pytest.raises(error, match=message):
        mean_patching_effect(graph(), pairs, at=(x for x in AT))  # pyright: ignore[reportArgumentType] (used once)


def test_rows_are_as_many_as_fit_into_what_is_allowed():
    metric = logit_diff(ANSWERS, 9)
    with Footprint() as one:
        graph().run(ids(0)[:1], save=[RESID_PRE[0], RESID_PRE[0].grad], metric=logit_diff(3, 9))
    allowed = int(2.5 * one.peak)
    with Footprint() as limited:
        found = patching_effect(graph(), ids(0), ids(1), metric, [RESID_PRE[0]], max_memory=allowed)
    with Footprint() as free:
        whole = patching_effect(graph(), ids(0), ids(1), metric, [RESID_PRE[0]])
    assert torch.allclose(found.effects[RESID_PRE[0]], whole.effects[RESID_PRE[0]], rtol=0, atol=1e-12)
    assert limited.peak < 0.6 * free.peak
    with pytest.raises(HookGraphError, match="a pass over one example takes"):
        patching_effect(graph(), ids(0), ids(1), metric, [RESID_PRE[0]], max_memory=one.peak // 2)


def test_one_joint_axis_may_be_named_by_itself(tmp_path: Path):
    batch = [(ids(0), ids(1))]
    listed = mean_patching_effect(graph(), batch, logit_diff(ANSWERS, 9), at=AT, joint=["d_model"])
    kept = {"at": AT, "checkpoint": tmp_path / "kept"}
    named = mean_patching_effect(graph(), batch, logit_diff(ANSWERS, 9), joint="d_model", **kept)
    again = mean_patching_effect(graph(), batch, logit_diff(ANSWERS, 9), joint=["d_model"], **kept)
    for place in AT:
        assert torch.equal(named.effects[place], listed.effects[place])
        assert torch.equal(again.effects[place], listed.effects[place])


def test_a_checkpoint_is_of_the_weights_that_it_was_made_with(tmp_path: Path):
    batch, kept = [(ids(0), ids(1))], tmp_path / "kept"
    given = {"at": [RESID_PRE[0]], "checkpoint": kept}
    mean_patching_effect(graph(), batch, logit_diff(ANSWERS, 9), **given)
    weight = next(iter(model_of(graph()).parameters()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    try:
        with pytest.raises(LoadError, match="the checkpoint of other work, which differs in weights"):
            mean_patching_effect(graph(), batch, logit_diff(ANSWERS, 9), **given)
    finally:
        with torch.no_grad():
            weight.copy_(before)
