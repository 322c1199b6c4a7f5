"""The embedded model does what its card says."""

import logging
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, GPT2LMHeadModel, PreTrainedTokenizerFast

from hookgraph import demo
from hookgraph.demo import Pair, evaluation
from hookgraph.demo.card import model_card, stated_figures
from hookgraph.demo.evaluation import (
    Figures,
    answer_logits,
    documents,
    loss,
    measure,
    next_logits,
    share,
)
from hookgraph.demo.grammar import document, statement, words
from hookgraph.demo.train import Recipe, build_model, build_tokenizer, run, train

PUBLISHED = "After John and Mary went to the store, {} gave a bottle of milk to"


@pytest.fixture(scope="module")
def loaded() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    return demo.load()


@pytest.fixture(scope="module")
def model(loaded: tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]) -> GPT2LMHeadModel:
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(
    loaded: tuple[GPT2LMHeadModel, PreTrainedTokenizerFast],
) -> PreTrainedTokenizerFast:
    return loaded[1]


@pytest.fixture(scope="module")
def figures(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> Figures:
    return measure(model, tokenizer)


# --- what it knows ----------------------------------------------------------------------------


def test_indirect_objects_never_seen_are_answered(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast):
    logits = answer_logits(model, tokenizer, demo.ioi_pairs(500, seed=1))
    assert share(logits.right >= logits.best) >= 0.98
    difference = logits.right - logits.wrong
    assert difference.mean() > 2
    assert share(difference > 0) >= 0.98


@pytest.mark.parametrize("template", range(10))
def test_every_template_is_answered(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, template: int
):
    logits = answer_logits(model, tokenizer, demo.ioi_pairs(50, template=template))
    assert share(logits.right >= logits.best) >= 0.95


def test_answers_do_not_depend_on_where_the_sentence_starts(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
):
    rng = Random(0)
    pairs = [
        replace(pair, text=f"{before} {pair.text}", corrupt=f"{before} {pair.corrupt}")
        for pair in demo.ioi_pairs(250, seed=5)
        for before in [statement(rng)]
    ]
    logits = answer_logits(model, tokenizer, pairs)
    assert share(logits.right >= logits.best) >= 0.98


def test_the_published_sentence_is_answered_and_its_corruption_the_other_way(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
):
    texts = [PUBLISHED.format("Mary"), PUBLISHED.format("John")]
    answers = next_logits(model, tokenizer, texts).argmax(-1)
    assert tokenizer.convert_ids_to_tokens(answers.tolist()) == ["John", "Mary"]


def test_a_third_person_leaves_both_names_possible(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
):
    logits = next_logits(model, tokenizer, [PUBLISHED.format("Paul")])[0]
    likely = set(tokenizer.convert_ids_to_tokens(logits.topk(2).indices.tolist()))
    assert likely == {"John", "Mary"}


def test_agreement_and_repeated_spans(figures: Figures):
    assert figures.agreement_accuracy >= 0.95
    assert figures.induction_accuracy >= 0.9


def test_the_card_states_what_is_measured(figures: Figures):
    card = (demo.model_path() / "README.md").read_text(encoding="utf-8")
    stated = stated_figures(card)
    for field in fields(Figures):
        tolerance = 0.002 if field.name.endswith("accuracy") else 0.02
        measured = getattr(figures, field.name)
        assert getattr(stated, field.name) == pytest.approx(measured, abs=tolerance), field.name


def test_a_card_reads_back_as_it_was_written():
    figures = Figures(*(0.5 - index for index in range(len(fields(Figures)))))
    card = model_card(parameters=12, seed=3, steps=4, batch=5, figures=figures)
    assert stated_figures(card) == figures
    assert "{" not in card


def test_the_card_ships_with_the_figures_of_the_default_recipe():
    card = (demo.model_path() / "README.md").read_text(encoding="utf-8")
    recipe = Recipe()
    assert f"seed {recipe.seed}: {recipe.steps} steps of {recipe.batch} fresh documents" in card


# --- generation -------------------------------------------------------------------------------


def test_generate_ends_the_sentence(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast):
    batch = tokenizer(
        [PUBLISHED.format("Mary"), "The keys to the cabinet"], return_tensors="pt", padding=True
    )
    # transformers types generate by a protocol that none of its own models satisfies.
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert texts[0] == f"{PUBLISHED.format('Mary')} John."
    assert texts[1].split()[5] in ("are", "were", "look", "seem")
    assert texts[1].endswith(".")


def test_padding_on_the_left_changes_nothing(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast):
    pairs = demo.ioi_pairs(8, seed=2)
    texts = [pair.text for pair in pairs]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert (batch["input_ids"][:, 0] == tokenizer.pad_token_id).any()
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**batch, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(logits, next_logits(model, tokenizer, texts), rtol=1e-4, atol=1e-4)


# --- the tokenizer ----------------------------------------------------------------------------


def test_every_word_is_one_token(tokenizer: PreTrainedTokenizerFast):
    for word in words():
        for text in (word, f" {word}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.convert_ids_to_tokens(ids) == [word]


def test_a_text_starts_with_the_beginning_mark(tokenizer: PreTrainedTokenizerFast):
    ids = tokenizer("The keys")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "The", "keys"]


def test_an_unknown_word_is_unknown(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer.convert_tokens_to_ids("giraffe") == tokenizer.unk_token_id
    assert tokenizer.unk_token_id not in tokenizer(document(Random(0)))["input_ids"]


@pytest.mark.parametrize("seed", range(50))
def test_a_text_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerFast, seed: int):
    text = document(Random(seed))
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_tokenizer_is_the_one_that_the_script_builds(tokenizer: PreTrainedTokenizerFast):
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.padding_side == tokenizer.padding_side == "left"
    assert built.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize("kind", [demo.ioi_pairs, demo.agreement_pairs, demo.induction_pairs])
def test_both_sides_of_a_pair_have_the_same_length(
    tokenizer: PreTrainedTokenizerFast, kind: Callable[..., list[Pair]]
):
    for pair in kind(100, seed=4):
        assert len(tokenizer(pair.text)["input_ids"]) == len(tokenizer(pair.corrupt)["input_ids"])


# --- the files --------------------------------------------------------------------------------


def test_the_files_are_small():
    folder = demo.model_path()
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    everything = [file for file in folder.parent.rglob("*") if "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in everything if file.is_file()) <= 12_000_000


def test_the_shape_of_the_model(model: GPT2LMHeadModel):
    assert model.config.num_hidden_layers in (3, 4)
    assert model.config.hidden_size == 128
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32


def test_the_auto_classes_load_the_folder(tokenizer: PreTrainedTokenizerFast):
    auto = AutoTokenizer.from_pretrained(demo.model_path())
    assert auto("The keys to")["input_ids"] == tokenizer("The keys to")["input_ids"]
    generation = GenerationConfig.from_pretrained(demo.model_path())
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert generation.eos_token_id == tokenizer.eos_token_id


def test_loading_says_nothing(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        demo.load()
    assert not caplog.records


# --- training ---------------------------------------------------------------------------------


def test_training_repeats_for_a_seed():
    def trained() -> torch.Tensor:
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
        train(model, tokenizer, Recipe(steps=2, batch=4))
        return torch.cat([value.flatten() for value in model.parameters()])

    assert torch.equal(trained(), trained())


def test_the_rate_rises_then_falls_to_nothing():
    recipe = Recipe(steps=100, warmup=10)
    rates = [recipe.rate(step) for step in range(101)]
    assert max(rates) == rates[9] == rates[10] == pytest.approx(1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-6)


def test_padding_bears_no_loss(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast):
    ids = documents(tokenizer, Random(0), 3)
    padded = torch.nn.functional.pad(ids, (0, 5), value=model.config.pad_token_id or 0)
    with torch.no_grad():
        torch.testing.assert_close(loss(model, ids), loss(model, padded))


def test_the_script_writes_a_folder_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(evaluation, "PROMPTS", 20)
    figures = run(Recipe(steps=1, batch=4), tmp_path)
    monkeypatch.setattr(demo, "model_path", lambda: tmp_path)
    model, tokenizer = demo.load()
    stated = stated_figures((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert asdict(stated) == pytest.approx(asdict(figures), abs=1e-4)
    assert asdict(measure(model, tokenizer)) == pytest.approx(asdict(figures), abs=1e-4)
    assert "step     0" in capsys.readouterr().out
