"""Saves during generation, on every family."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hookgraph.errors import (
    InputError,
    LoadError,
    MetricError,
    ShapeMismatchError,
    UnknownLocationError,
)
from hookgraph.graph.generating import Generation
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import (
    ATTN_K,
    ATTN_PATTERN,
    ATTN_SCORES,
    ATTN_V,
    LOGITS,
    MLP_PRE,
    RESID_POST,
    RESID_PRE,
)
from hookgraph_tests.families import FAMILIES, bound, model_of, tokens
from hookgraph_tests.toy import toy_graph, toy_tokens

IDS = tokens(2, 5)
NEW = 4
JOINED = (RESID_POST[1], MLP_PRE[2].at(d_mlp=[3, 5]), ATTN_K[1], ATTN_V[1].at(pos=slice(2, None)))
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def test_an_edit_in_place_leaves_what_was_saved_before_it_alone():
    graph = bound("gpt2").hook(RESID_PRE[1].at(pos=slice(2, None)), lambda x: x.mul_(0))
    saved = graph.generate(IDS, save=[RESID_POST[0]], **OPTIONS)[RESID_POST[0]]
    assert bool((saved != 0).all())


def generated(family: str, save: list[Location], **options: Any) -> Generation:
    return bound(family).generate(IDS, save=save, **OPTIONS, **options)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_saves_are_those_of_one_pass_over_the_tokens(family: str, options: dict[str, Any]):
    asked = [*JOINED, RESID_POST[0].at(pos=6), ATTN_PATTERN[1].at(key_pos=1, pos=slice(1, None))]
    generation = generated(family, asked, **options)
    assert list(generation) == asked
    whole = bound(family).run(generation.tokens[:, :-1], save=asked)
    for location in asked:
        torch.testing.assert_close(generation[location], whole[location], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_passes(family: str):
    last = RESID_POST[1].at(pos=-1)
    late = RESID_POST[2].at(step=slice(2, None))
    generation = generated(family, [last, late])
    assert [list(run) for run in generation.steps] == [[last], [last], [last, late], [last, late]]
    assert [span.length for span in generation.spans] == [5, 1, 1, 1]
    assert generation[last].shape == (NEW, 2, 32)
    whole = bound(family).run(generation.tokens[:, :-1], save=[RESID_POST[1]])[RESID_POST[1]]
    torch.testing.assert_close(generation[last], whole[:, 4:].transpose(0, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(generation.steps[3][late], generation[late][:, 1:])


@pytest.mark.parametrize("kind", [ATTN_PATTERN, ATTN_SCORES], ids=str)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
def test_joined_patterns_hold_nothing_where_keys_were_still_to_come(family: str, kind: LocationType):
    generation = generated(family, [kind[1]])
    whole = bound(family).run(generation.tokens[:, :-1], save=[kind[1]])[kind[1]]
    seen = torch.ones(8, 8, dtype=torch.bool).tril()
    found = generation[kind[1]]
    assert found.shape == whole.shape == (2, 4, 8, 8)
    torch.testing.assert_close(found[..., seen], whole[..., seen], rtol=1e-4, atol=1e-5)
    assert found.softmax(-1)[..., ~seen].max() < 1e-6 if kind == ATTN_SCORES else not found[..., ~seen].any()


def test_keys_that_left_a_window_are_told():
    generation = generated("gemma2", [ATTN_PATTERN[0]])
    assert generation.steps[-1][ATTN_PATTERN[0]].shape == (2, 4, 1, 4)
    with pytest.raises(ShapeMismatchError, match="keys have left a sliding window"):
        generation[ATTN_PATTERN[0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_that_the_tokens_were_chosen_from(family: str):
    last = LOGITS.at(pos=-1)
    generation = generated(family, [last])
    assert torch.equal(generation[last].argmax(-1).T, generation.tokens[:, 5:])


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_models_own_hooks_included(family: str):
    graph = bound(family).hook(RESID_POST[1].at(pos=slice(6, None)), lambda x: 1.5 * x)
    generation = graph.generate(IDS, save=[RESID_POST[1].at(pos=7)], **OPTIONS)
    with graph.attached():
        expected = model_of(graph).generate(IDS, **OPTIONS)
    assert torch.equal(generation.tokens, expected)
    plain = graph.binding.generate(graph.binding.prepare(IDS), OPTIONS)
    assert torch.equal(plain, model_of(graph).generate(IDS, **OPTIONS))


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_save_their_own_positions(family: str):
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    here = RESID_POST[1].at(pos=1)
    batch = {"input_ids": IDS * mask, "attention_mask": mask}
    together = bound(family).generate(batch, save=[here], **OPTIONS)
    alone = bound(family).generate(IDS[1:, 2:], save=[here], **OPTIONS)
    torch.testing.assert_close(together[here][1:], alone[here], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pos", [2, 4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_position_that_rows_reach_in_different_passes_is_saved_of_each(family: str, pos: int):
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    here = RESID_POST[1].at(pos=pos)
    batch = {"input_ids": IDS * mask, "attention_mask": mask}
    together = bound(family).generate(batch, save=[here], **OPTIONS)
    for row, cut in enumerate((0, 2)):
        alone = bound(family).generate(IDS[row : row + 1, cut:], save=[here], **OPTIONS)
        torch.testing.assert_close(together[here][row], alone[here][0], rtol=1e-4, atol=1e-5)


def test_a_position_that_a_row_does_not_reach_is_not_saved():
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    here = RESID_POST[1].at(pos=7)
    batch = {"input_ids": IDS * mask, "attention_mask": mask}
    found = bound("llama").generate(batch, save=[here], **OPTIONS)
    with pytest.raises(UnknownLocationError, match="nothing was saved at"):
        found[here]


def test_an_error_while_decoding_names_the_position_as_it_was_given():
    graph = bound("llama").hook(RESID_POST[1].at(pos=6), lambda x: x[:, :3])
    with pytest.raises(ShapeMismatchError, match=r"the hook at resid.post\[1\]@pos=6 was given"):
        graph.generate(IDS, **OPTIONS)


def test_a_generation_is_saved_and_loaded(tmp_path: Path):
    asked = [RESID_POST[1], RESID_POST[0].at(step=[0, 2], pos=-1)]
    generation = generated("llama", asked)
    generation.save(tmp_path / "generation")
    found = Generation.load(tmp_path / "generation")
    assert torch.equal(found.tokens, generation.tokens)
    assert (found.spans, found.metadata) == (generation.spans, generation.metadata)
    assert list(found) == asked
    for location in asked:
        assert torch.equal(found[location], generation[location])
    halved = found.to(torch.bfloat16)
    assert (halved[asked[0]].dtype, halved.tokens.dtype) == (torch.bfloat16, torch.int64)
    with pytest.raises(LoadError, match="expected a run saved by hookgraph"):
        type(found.steps[0]).load(tmp_path / "generation")


def test_locations_of_a_file_must_be_declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    generation = generated("gpt2", [RESID_POST[1]])
    generation.save(tmp_path / "generation")
    generation.steps[0].save(tmp_path / "run")
    monkeypatch.delitem(declared_types(), "resid.post")
    for kind, name in ((Generation, "generation"), (type(generation.steps[0]), "run")):
        with pytest.raises(LoadError, match="holds a location that is not declared here"):
            kind.load(tmp_path / name)


def declared_types() -> dict[str, LocationType]:
    from hookgraph.ontology import locations

    return locations._declared


def test_what_was_not_saved_is_told():
    generation = generated("gpt2", [RESID_POST[1]])
    assert repr(generation).splitlines()[0] == "Generation of tokens (2, 9) in 4 passes, 1 locations saved"
    with pytest.raises(UnknownLocationError, match=r"nothing was saved at resid.post\[2\]"):
        generation[RESID_POST[2]]
    with pytest.raises(UnknownLocationError, match="this model has no location"):
        bound("gpt2").generate(IDS, save=[RESID_POST[9]])
    with pytest.raises(MetricError, match="a generation has none, use run"):
        bound("gpt2").generate(IDS, save=[RESID_POST[1].grad])
    with pytest.raises(InputError, match="ToyBinding does not generate"):
        toy_graph().generate(toy_tokens())


def test_steps_are_no_axis():
    assert all(Dimension.STEP not in location.type.dims for location in bound("gpt2").locations)
