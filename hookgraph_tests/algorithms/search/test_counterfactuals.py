"""Counterfactuals: scores against first order, the search against brute force, refusals."""

from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hookgraph as hg
from hookgraph.algorithms import Counterfactuals, counterfactuals, exact_effects, patching_effect
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.algorithms.search.examining import Examiner
from hookgraph.algorithms.search.fronts import dominated, ranks
from hookgraph.algorithms.search.swaps import Swaps
from hookgraph.demo import load
from hookgraph.errors import HookGraphError, InputError, LoadError, MetricError, UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import ATTN_OUT, ATTN_Z, EMBED, MLP_OUT, RESID_POST
from hookgraph_tests.families import VOCABULARY, bound, tokens
from hookgraph_tests.toy import toy_graph, toy_of, toy_tokens
from hookgraph_tests.unchecked import unchecked

TEXT = tokens(batch=1)
METRIC = logit_diff(3, 5)
TARGET = ATTN_Z[1].at(head=2)
STORY = "After John and Mary went to the store, Mary gave a bottle of milk to"
OTHER = STORY.replace("Mary gave", "John gave")


def gpt2() -> HookGraph:
    return bound("gpt2", torch.float64)


def examined(graph: HookGraph, text: Tensor, metric, *target) -> Examiner:
    return Examiner.of(graph, text, metric, target, 64)


def all_swaps(examiner: Examiner, edits: int = 1) -> Swaps:
    return Swaps.of(examiner, edits, range(len(examiner.tokens)), None, (), None)


def singles(text: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Every text that differs from this one in one token."""
    places = product(range(len(text)), range(vocabulary))
    return [[*text[:p], v, *text[p + 1 :]] for p, v in places if v != text[p]]


# --- scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [EMBED, ATTN_OUT[1]])
def test_where_all_is_linear_a_score_is_the_effect_of_the_swap(target):
    graph, text = toy_graph(quadratic=False, embeds=True), toy_tokens([[1, 2, 3]])
    examiner = examined(graph, text, lambda logits: logits[..., 2].sum(1), target)
    swaps = all_swaps(examiner)
    scores = swaps.scores(examiner, text)[0]
    texts = singles([1, 2, 3], 7)
    exact = examiner.measure(torch.tensor(texts)).effect
    assert torch.allclose(scores[swaps.allowed], exact, atol=1e-12)
    assert bool(scores[torch.arange(3), text[0]].isnan().all())


def test_a_score_is_the_slope_of_the_effect_along_the_swap():
    """On a quadratic toy, halfway through a text that is edited already."""
    graph, text, edited = toy_graph(embeds=True), toy_tokens([[1, 2, 3]]), torch.tensor([[1, 6, 3]])
    examiner = examined(graph, text, lambda logits: logits[..., 2].sum(1), MLP_OUT[1])
    scores = all_swaps(examiner, 2).scores(examiner, edited)[0]
    table = toy_of(graph).embedding.detach()

    def effect(step: float) -> Tensor:
        """With the last token moved a little from 3 towards 5."""
        moved = table[edited].clone()
        moved[0, 2] += step * (table[5] - table[3])
        node = graph.hook(EMBED, lambda _: moved).run(text, save=[MLP_OUT[1]])[MLP_OUT[1]]
        found = graph.hook(MLP_OUT[1], lambda _: node).run(text, metric=examiner.metric).metric
        assert found is not None
        return found

    slope = (effect(1e-5) - effect(-1e-5)) / 2e-5
    assert torch.allclose(scores[2, 5], slope[0], rtol=1e-6)


def test_scores_know_hooks_and_the_way_through_the_target_alone():
    graph = gpt2().hook(EMBED, lambda x: 0.5 * x)
    examiner = examined(graph, TEXT, METRIC, RESID_POST[0])
    slopes = examiner.slopes(TEXT)
    run = graph.run(TEXT, save=[EMBED.grad], metric=METRIC)
    assert torch.allclose(slopes, 0.5 * run[EMBED.grad], atol=1e-10)


def test_slopes_of_the_loss_are_those_of_what_is_read():
    examiner = examined(gpt2(), TEXT, METRIC, EMBED)
    found = examiner.loss_slopes(TEXT)
    run = gpt2().run(TEXT, save=[EMBED.grad], metric=hg.metrics.cross_entropy(TEXT))
    assert torch.allclose(found, run[EMBED.grad], atol=1e-12)


# --- measures ---------------------------------------------------------------------------------


def test_measures_are_what_runs_give():
    graph, texts = gpt2(), torch.tensor(singles(TEXT[0].tolist(), VOCABULARY))[::40]
    measured = examined(graph, TEXT, METRIC, TARGET).measure(texts)
    for i, text in enumerate(texts):
        run = graph.run(text[None], metric=METRIC)
        assert run.metric is not None
        assert torch.allclose(measured.metric[i], run.metric[0])
        assert torch.allclose(
            measured.effect[i], exact_effects(graph, TEXT, text[None], METRIC, [TARGET])[0, 0]
        )
        loss = -run.logits[0, :-1].log_softmax(-1).gather(1, text[1:, None]).mean()
        assert torch.allclose(measured.loss[i], loss)
        assert int(measured.answers[i]) == int(run.logits[0, -1].argmax())
    assert measured.edits.tolist() == [1] * len(texts)


def test_with_the_embeddings_as_the_target_the_effect_is_the_difference_of_the_metric():
    examiner = examined(gpt2(), TEXT, METRIC, EMBED)
    measured = examiner.measure(tokens(batch=5, seed=3))
    assert torch.allclose(measured.effect, measured.metric - examiner.start.metric)


def test_the_gradient_is_the_lesser_of_both_ends():
    graph, other = gpt2(), tokens(batch=1, seed=3)
    examiner = examined(graph, TEXT, METRIC, TARGET)
    node = graph.run(other, save=[TARGET])[TARGET]
    ends = (graph, graph.hook(TARGET, lambda _: node))
    norms = [run.run(TEXT, save=[TARGET.grad], metric=METRIC)[TARGET.grad].norm() for run in ends]
    assert torch.allclose(examiner.measure(other).gradient, torch.stack(norms).amin())


# --- fronts -----------------------------------------------------------------------------------


def beats(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def test_the_front_is_what_brute_force_finds():
    values = torch.randint(0, 4, (60, 3), generator=torch.Generator().manual_seed(1)).double()
    rows = values.tolist()
    worse = [any(beats(other, row) for other in rows) for row in rows]
    assert dominated(values).tolist() == worse
    assert (ranks(values) == 0).tolist() == [not x for x in worse]


def test_a_rank_is_how_many_fronts_are_peeled_off_before():
    assert ranks(torch.tensor([[1.0, 1], [2, 2], [2, 2], [0, 3], [0, 0]])).tolist() == [1, 0, 0, 0, 2]


# --- the search -------------------------------------------------------------------------------


def test_with_enough_tries_the_search_is_brute_force_over_all_single_swaps():
    graph, text = toy_graph(embeds=True), toy_tokens([[1, 2, 3]])

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 2] - logits[:, 0, 4]

    found = counterfactuals(graph, text, metric, ATTN_OUT[1], edits=1, positions=[0, 1, 2], top_k=None)
    every = singles([1, 2, 3], 7)
    assert sorted(map(tuple, found.seen.tokens.tolist())) == sorted(map(tuple, every))
    texts = examined(graph, text, metric, ATTN_OUT[1]).measure(torch.tensor(every))
    counts = (texts.loss <= found.start.loss + torch.tensor(1.5).log()) & (
        texts.answers != found.start.answers
    )
    rows = texts.values(found.objectives)[counts].tolist()
    best = [not any(beats(other, row) for other in rows) for row in rows]
    expected = texts.tokens[counts][torch.tensor(best)].tolist()
    assert sorted(found.front.tokens.tolist()) == sorted(expected)
    assert expected


def test_a_second_edit_is_found_and_no_third():
    found = counterfactuals(gpt2(), TEXT, METRIC, TARGET, top_k=None, max_perplexity=None, tries=120)
    assert set(found.seen.edits.tolist()) == {1, 2}
    assert len(found.seen) == 120
    assert len({tuple(text) for text in found.seen.tokens.tolist()}) == 120
    assert torch.equal(found.seen.tokens[:, 0], TEXT[0, :1].expand(120))


def test_a_seed_gives_the_same_texts_again_and_another_one_others():
    first, again, other = (
        counterfactuals(gpt2(), TEXT, METRIC, TARGET, tries=40, seed=seed).seen.tokens.tolist()
        for seed in (1, 1, 2)
    )
    assert first == again
    assert sorted(first) != sorted(other)


def test_only_what_is_allowed_is_swapped():
    likely = gpt2().run(TEXT).logits[0].topk(6).indices
    found = counterfactuals(
        gpt2(), TEXT, METRIC, TARGET, positions=[2, -1], forbidden=[int(likely[1, 0])], top_k=6, tries=60
    )
    changed = found.seen.tokens != TEXT
    assert set(changed.nonzero()[:, 1].tolist()) == {2, 5}
    assert set(found.seen.tokens[:, 2].tolist()) <= {*likely[1, 1:].tolist(), int(TEXT[0, 2])}
    listed = counterfactuals(gpt2(), TEXT, METRIC, TARGET, tokens=[7, 9], top_k=None, tries=60)
    assert set(listed.seen.tokens[listed.seen.tokens != TEXT].tolist()) == {7, 9}


def test_padding_is_neither_swapped_nor_read():
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 2, dtype=torch.long), TEXT], 1),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]),
    }
    found, plain = (
        counterfactuals(gpt2(), text, METRIC, TARGET, tries=400, edits=1, top_k=None)
        for text in (padded, TEXT)
    )
    assert torch.equal(found.seen.tokens[:, :3], padded["input_ids"][:, :3].expand(len(found.seen), 3))
    found, plain = (x.seen.rows(x.seen.metric.argsort()) for x in (found, plain))
    assert torch.equal(found.tokens[:, 2:], plain.tokens)
    for name in ("effect", "loss", "similarity", "gradient"):
        assert torch.allclose(found.tensors()[name], plain.tensors()[name])


# --- on the embedded model ---------------------------------------------------------------------


@cache
def demo() -> tuple[HookGraph, hg.metrics.LogitDifference, hg.Location]:
    """The model, what is measured, and the head with the largest effect."""
    model, tokenizer = load()
    graph = hg.bind(model, tokenizer, check=False)
    metric = logit_diff(*tokenizer.convert_tokens_to_ids(["John", "Mary"]))
    effect = patching_effect(graph, STORY, OTHER, metric, graph.every(ATTN_Z))
    return graph, metric, effect.effects.sum("batch", "pos", "d_head").top(1)[0].location


@cache
def told() -> Counterfactuals:
    return counterfactuals(demo()[0], STORY, demo()[1], demo()[2], tries=200)


@pytest.mark.parametrize("seed", range(5))
def test_two_edits_turn_what_the_top_head_says(seed: int):
    graph, metric, head = demo()
    found = counterfactuals(graph, STORY, metric, head, seed=seed, tries=200)
    best = found.front.rows(torch.tensor([0]))
    assert int(best.edits) <= 2
    assert int(best.answers) != int(found.start.answers)
    assert float(best.loss.exp()) <= 1.5 * float(found.start.loss.exp())
    assert float(best.effect) < -8
    others = graph.binding.prepare(OTHER)["input_ids"]
    assert isinstance(others, Tensor)
    assert others.tolist()[0] in found.front.tokens.tolist()


def test_pairs_are_clean_and_corrupt_inputs():
    graph, metric, head = demo()
    found = told()
    effect = patching_effect(graph, *found.pairs, metric, [head])
    assert len(found.pairs[0]["input_ids"]) == len(found)
    assert effect.total_effect is not None
    assert torch.allclose(effect.total_effect, found.front.metric - found.start.metric, atol=1e-4)
    assert torch.allclose(
        exact_effects(graph, *found.pairs, metric, [head])[0], found.front.effect, atol=1e-4
    )


def test_results_are_told_drawn_and_kept(tmp_path: Path):
    found = told()
    found.save(tmp_path / "found.safetensors")
    loaded = Counterfactuals.load(tmp_path / "found.safetensors")
    assert repr(loaded) == repr(found)
    assert loaded.target == found.target
    assert torch.equal(loaded.front.tokens, found.front.tokens)
    assert "Mary → John at 10" in found.to_frame()["swaps"].tolist()
    assert "answer John" in repr(found)
    assert "<table" in found._repr_html_()
    drawn = found.plot().axes[0].collections
    assert [len(points.get_offsets()) for points in drawn] == [
        200 - int(found.counts.sum()),
        int(found.counts.sum()),
        len(found),
    ]


# --- what is refused ----------------------------------------------------------------------------


def test_nothing_found_is_said():
    found = counterfactuals(gpt2(), TEXT, METRIC, TARGET, max_perplexity=1e-6, tries=30)
    assert len(found) == 0
    assert "no counterfactual among 30 texts measured" in repr(found)
    assert "Allow more edits" in found._repr_html_()
    assert len(found.plot().axes) == 1
    with pytest.raises(HookGraphError, match="no counterfactual among 30"):
        _ = found.pairs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edits": 0}, "edits=0"),
        ({"positions": [6]}, "position 6 is out of range, the text has 6 tokens"),
        ({"positions": [-7]}, "position -7 is out of range"),
        ({"tokens": [3, 48]}, "tokens: there is no token 48, the vocabulary has 48"),
        ({"forbidden": [-1]}, "forbidden: there is no token -1"),
        ({"forbidden": range(48)}, "no token may be replaced"),
        ({"top_k": 0}, "top_k=0"),
        ({"tries": 0}, "tries=0"),
        ({"max_perplexity": 0.0}, "max_perplexity=0.0 is a factor"),
        ({"objectives": ["effekt"]}, "unknown objective 'effekt': did you mean effect"),
        ({"objectives": []}, "no objective"),
        ({"method": "discreet"}, "unknown method 'discreet': did you mean discrete"),
    ],
)
def test_an_option_that_means_nothing_is_refused(options, message: str):
    with unchecked(), pytest.raises(HookGraphError, match=message):
        counterfactuals(gpt2(), TEXT, METRIC, TARGET, **options)


def test_a_position_that_is_padding_is_refused():
    padded = {"input_ids": TEXT, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}
    with pytest.raises(InputError, match="position 0 is padding"):
        counterfactuals(gpt2(), padded, METRIC, TARGET, positions=[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (tokens(), "searched for one text, these are 2"),
        (TEXT[:, :1], "one token has no fluency"),
        ({"inputs_embeds": torch.zeros(1, 3, 32, dtype=torch.float64)}, "hold none, only"),
    ],
)
def test_what_is_not_one_text_is_refused(text, message: str):
    with pytest.raises(InputError, match=message):
        counterfactuals(gpt2(), text, METRIC, TARGET)


def test_a_node_that_the_graph_lacks_is_named():
    with pytest.raises(UnknownLocationError, match="no location attn"):
        counterfactuals(gpt2(), TEXT, METRIC, ATTN_Z[9])


def test_a_target_that_does_not_depend_on_the_tokens_is_refused():
    graph = gpt2().hook(MLP_OUT[0], torch.zeros_like).hook(ATTN_OUT[0], torch.ones_like)
    with pytest.raises(MetricError, match="the target does not depend on embed"):
        counterfactuals(graph, TEXT, METRIC, ATTN_OUT[0])


def test_another_file_is_no_result(tmp_path: Path):
    gpt2().run(TEXT, save=[EMBED]).save(tmp_path / "run.safetensors")
    with pytest.raises(LoadError, match="expected a counterfactuals"):
        Counterfactuals.load(tmp_path / "run.safetensors")
