"""Resampling from a data set."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hookgraph.algorithms import (
    ActivationSamples,
    ablate,
    mean_activations,
    optimal_constants,
    sample_activations,
)
from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.interventions.replacements import moved
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.algorithms.padding import real_tokens, weights_at
from hookgraph.errors import HookGraphError, InputError, LocationError, ShapeMismatchError
from hookgraph.hooks.editing import SetTo
from hookgraph.locations import ATTN_OUT, ATTN_PATTERN, ATTN_Z, MLP_OUT
from hookgraph.ontology.dimensions import Dimension
from hookgraph_tests.families import bound, tokens
from hookgraph_tests.toy import toy_graph, toy_tokens


def test_tokens_are_drawn_alike_at_all_locations_and_never_padding(tmp_path: Path):
    graph, ids = bound("gpt2", torch.float64), tokens(4)
    mask = torch.tensor([[1] * 6, [0, 0] + [1] * 4, [1] * 4 + [0, 0], [1] * 6])
    at = [MLP_OUT[1], ATTN_Z[0].at(head=2)]
    batches = [{"input_ids": ids[i], "attention_mask": mask[i]} for i in (slice(0, 3), slice(3, 4))]
    found = sample_activations(graph, batches, at, count=7, seed=3, progress=False)
    assert found.seen == 20
    values = graph.run({"input_ids": ids, "attention_mask": mask}, save=at)
    real = {x: values[x][mask.bool()] for x in at}
    chosen = [int((real[MLP_OUT[1]] - row).abs().sum(-1).argmin()) for row in found.values[MLP_OUT[1]]]
    assert len(set(chosen)) == 7
    for place in at:
        assert torch.allclose(found.values[place], real[place][chosen], atol=1e-12)
    found.save(tmp_path / "samples.safetensors")
    again = ActivationSamples.load(tmp_path / "samples.safetensors")
    assert repr(again) == repr(found)
    seen: dict[str, Tensor] = {}
    ablated = ablate(graph, at, "resample", statistics=again, seed=1)
    for name, place in zip("ab", at, strict=True):
        ablated = ablated.hook(place, lambda value, n=name: seen.update({n: value.clone()}))
    assert ablated.run(ids[:1]).logits.shape[0] == 1
    lots = torch.randint(7, (1, 6), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(seen["a"], found.values[at[0]][lots])
    assert torch.allclose(seen["b"], found.values[at[1]][lots])


def test_whole_examples_keep_their_positions():
    graph, ids = toy_graph(), toy_tokens()
    found = sample_activations(graph, [ids[:1], ids[1:]], [ATTN_OUT[0]], per_position=True)
    values = graph.run(ids, save=[ATTN_OUT[0]])[ATTN_OUT[0]]
    assert {tuple(x) for x in found.values[ATTN_OUT[0]].flatten(1).tolist()} == {
        tuple(x) for x in values.flatten(1).tolist()
    }
    logits = ablate(graph, [ATTN_OUT[0]], "resample", statistics=found).run(ids).logits
    lots = torch.randint(2, (2,), generator=torch.Generator().manual_seed(0))
    put = found.values[ATTN_OUT[0]][lots]
    assert torch.equal(logits, graph.hook(ATTN_OUT[0], lambda _: put).run(ids).logits)
    with pytest.raises(ShapeMismatchError, match="has position 3, its samples end at 2"):
        ablate(graph, [ATTN_OUT[0]], "resample", statistics=found).run(ids[:, [0, 1, 2, 0]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_whole_examples_are_drawn_and_put_token_by_token(side: str, tmp_path: Path):
    graph, mask = bound("gpt2", torch.float64), torch.ones(3, 5, dtype=torch.long)
    mask[1, slice(0, 2) if side == "left" else slice(3, 5)] = 0
    data, inputs = ({"input_ids": tokens(3, 5, i) * mask, "attention_mask": mask} for i in (0, 1))
    at = [MLP_OUT[1], ATTN_Z[0].at(head=2)]
    sample_activations(graph, [data, tokens(1, 4, 2)], at, per_position=True).save(tmp_path / "s.safetensors")
    found = ActivationSamples.load(tmp_path / "s.safetensors")
    lengths = found.lengths[at[0]].tolist()
    assert sorted(lengths) == [3, 4, 5, 5]
    rows = [data["input_ids"][i : i + 1, mask[i].bool()] for i in range(3)] + [tokens(1, 4, 2)]
    alone = [graph.run(ids, save=at) for ids in rows]
    for place in at:
        for value, length in zip(found.values[place], lengths, strict=True):
            full = [run[place][0] for run in alone if run[place].shape[1] == length]
            gaps = [float((values - value[:length]).abs().max()) for values in full]
            assert min(gaps) < 1e-12
            assert not value[length:].any()
    ablated = ablate(graph, at, "resample", statistics=found, seed=4).run(inputs).logits
    lots = torch.randint(4, (3,), generator=torch.Generator().manual_seed(4)).tolist()
    for row, lot in enumerate(lots):
        ids, hooked = inputs["input_ids"][row : row + 1, mask[row].bool()], graph
        chosen = [next(k % 4 for k in range(lot, lot + 4) if lengths[k % 4] > t) for t in range(ids.shape[1])]
        for place in at:
            put = torch.stack([found.values[place][k, t] for t, k in enumerate(chosen)])
            hooked = hooked.hook(place, SetTo(put[None]))
        assert torch.allclose(ablated[row, mask[row].bool()], hooked.run(ids).logits[0], rtol=0, atol=1e-10)


def test_bad_requests_are_refused():
    graph, ids = bound("gpt2"), tokens()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    with pytest.raises(InputError, match="no data to draw from"):
        sample_activations(graph, [], [MLP_OUT[0]])
    with pytest.raises(InputError, match="of one length without padding"):
        sample_activations(graph, [padded], [ATTN_PATTERN[0]], per_position=True)
    with pytest.raises(InputError, match="of one length without padding"):
        sample_activations(graph, [ids, ids[:, :4]], [ATTN_PATTERN[0]], per_position=True)
    patterns = sample_activations(graph, [ids], [ATTN_PATTERN[0]], per_position=True)
    for other in (padded, ids[:, :4]):
        with pytest.raises(ShapeMismatchError, match="as long as the sampled examples, without padding"):
            ablate(graph, [ATTN_PATTERN[0]], "resample", statistics=patterns).run(other)
    with pytest.raises(LocationError, match="has no token each"):
        sample_activations(graph, [ids], [MLP_OUT[0].at(pos=0)])
    with pytest.raises(InputError, match="pad on the right"):
        mean_activations(graph, [padded], [MLP_OUT[0]], per_position=True)
    found = sample_activations(graph, [ids], [MLP_OUT[0]])
    with pytest.raises(HookGraphError, match=r"mlp\.out\[1\] was not sampled"):
        ablate(graph, [MLP_OUT[1]], "resample", statistics=found)
    with pytest.raises(HookGraphError, match="mean ablation needs statistics=mean_activations"):
        ablate(graph, [MLP_OUT[0]], "mean", statistics=found)


def test_means_of_named_positions_are_those_of_each_row_of_a_padded_batch():
    graph, ids = bound("gpt2", torch.float64), tokens()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    here = MLP_OUT[1].at(pos=[0, 1])
    padded = {"input_ids": ids, "attention_mask": mask}
    value = graph.run(padded, save=[here])[here]
    found = mean_activations(graph, [padded], [here], per_position=True)
    assert torch.allclose(found.means[here], value.mean(0), atol=1e-12)


def test_means_per_position_follow_the_sequence_while_decoding_and_behind_padding():
    graph, ids = bound("gpt2", torch.float64), tokens(2, 5)
    place, head = MLP_OUT[1], ATTN_Z[0].at(head=2)
    found = mean_activations(graph, [tokens(4, 9, seed=3)], [place, head], per_position=True)
    ablated = ablate(graph, [place, head], statistics=found)
    cached = ablated.generate(ids, save=[place, head], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    afresh = ablated.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached.tokens, afresh.tokens)
    for at in (place, head):
        seen = cached[at]
        assert torch.allclose(seen, found.means[at][None, : seen.shape[1]].expand_as(seen), atol=1e-12)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    padded = torch.stack([ids[0], torch.cat([torch.zeros_like(ids[1, :2]), ids[1, :3]])])
    together = ablated.run({"input_ids": padded, "attention_mask": mask}).logits
    assert torch.allclose(together[1, 2:], ablated.run(ids[1:, :3]).logits[0], atol=1e-10)
    assert torch.allclose(together[0], ablated.run(ids[:1]).logits[0], atol=1e-10)
    with pytest.raises(ShapeMismatchError, match="position 9, its constants end at 8: use means over all"):
        ablated.run(tokens(1, 10))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_nobodys_value_to_resample(side: str):
    graph, ids = bound("gpt2", torch.float64), tokens(3, 5)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 2) if side == "left" else slice(3, 5)] = 0
    padded = {"input_ids": ids * mask, "attention_mask": mask}
    order, first = moved(3, seed=0).tolist(), 2 if side == "left" else 0
    for place in (MLP_OUT[0], MLP_OUT[0].at(pos=1), ATTN_OUT[2].at(pos=[0, 1, 2])):
        whole = place.whole
        before = graph.run(padded, save=[whole])[whole]
        after = ablate(graph, [place], "resample").run(padded, save=[whole])[whole]
        chosen = dict(place.index).get(Dimension.POS, range(5))
        for row in range(3):
            for pos in (chosen,) if isinstance(chosen, int) else chosen:
                if row == 1 and pos > 2:
                    continue  # it has three tokens
                other = order[row] if order[row] != 1 or pos <= 2 else order[1]
                start, there = (first if i == 1 else 0 for i in (row, other))
                assert torch.allclose(after[row, start + pos], before[other, there + pos], atol=1e-12)
    both = {"input_ids": padded["input_ids"][:2], "attention_mask": mask[:2]}
    with pytest.raises(HookGraphError, match="position 3 is that of one row only"):
        ablate(graph, [MLP_OUT[0]], "resample").run(both)
    with pytest.raises(HookGraphError, match="rows of different lengths have other keys"):
        ablate(graph, [ATTN_PATTERN[0]], "resample").run(padded)


@pytest.mark.parametrize("side", ["left", "right"])
def test_copies_of_a_padded_batch_are_resampled_like_the_batch(side: str):
    graph, mask = bound("gpt2", torch.float64), torch.ones(3, 5, dtype=torch.long)
    mask[1, slice(0, 2) if side == "left" else slice(3, 5)] = 0
    clean, corrupt = ({"input_ids": tokens(3, 5, i) * mask, "attention_mask": mask} for i in (0, 1))
    metric = logit_diff([3, 4, 5], 6, pos=[4, 4 if side == "left" else 2, 4])
    ablated, nodes = ablate(graph, [MLP_OUT[1]], "resample"), [ATTN_Z[0].at(head=i) for i in (0, 3)]
    other, before = ablated.run(corrupt, save=nodes), ablated.run(clean, metric=metric).metric
    after = [ablated.hook(x, SetTo(other[x])).run(clean, metric=metric).metric for x in nodes]
    found = exact_effects(ablated, clean, corrupt, metric, nodes)
    expected = torch.stack([x - before for x in after])  # pyright: ignore[reportOperatorIssue]
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_constants_are_fitted_where_they_are_put():
    graph, ids = bound("gpt2", torch.float64), tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    padded = {"input_ids": ids * mask, "attention_mask": mask}
    means = mean_activations(graph, [tokens(4, 6, seed=3)], [MLP_OUT[0]], per_position=True)
    seen: list[Tensor] = []

    def loss(logits: Tensor) -> Tensor:
        seen.append(logits.detach().clone())
        return -logits[:, -1, 5]

    optimal_constants(graph, [padded], [MLP_OUT[0]], means, steps=1, loss=loss, progress=False)
    ablated = ablate(graph, [MLP_OUT[0]], statistics=means).run(padded).logits
    assert torch.allclose(seen[0][mask.bool()], ablated[mask.bool()], rtol=0, atol=1e-12)


def test_a_mask_of_tokens_says_nothing_of_patches():
    ids, mask = torch.ones(2, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    patches, text = torch.ones(2, 4, 3), {"input_ids": ids, "attention_mask": mask}
    pictures = {**text, "pixel_values": torch.ones(2, 3, 8, 8)}
    decoding = {**text, "decoder_input_ids": ids}
    kept = {
        (stack, name): int(real_tokens(inputs, patches, stack).sum())
        for stack in ("decoder", "encoder", "vision")
        for name, inputs in {"text": text, "pictures": pictures, "decoding": decoding}.items()
    }
    expected = {("encoder", "pictures"): 8, ("decoder", "decoding"): 8}
    for (stack, name), count in kept.items():
        assert count == expected.get((stack, name), 8 if stack == "vision" else 7)
    graph = bound("gpt2", torch.float64)
    wide = {"attention_mask": torch.ones(2, 9), "input_ids": ids}
    assert weights_at(graph, MLP_OUT[0], patches.double(), wide).shape == (2, 1, 1)


def test_a_number_of_samples_that_is_none_and_statistics_for_zeros_are_refused():
    graph = toy_graph()
    with pytest.raises(HookGraphError, match="count=0: it has to be a whole number, at least 1"):
        sample_activations(graph, [toy_tokens()], [MLP_OUT[1]], count=0)
    means = mean_activations(graph, [toy_tokens()], [MLP_OUT[1]])
    with pytest.raises(HookGraphError, match="zero ablation takes no statistics"):
        ablate(graph, [MLP_OUT[1]], "zero", statistics=means)
