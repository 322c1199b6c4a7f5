"""The dictionaries of the embedded model do what their card says."""

from pathlib import Path

import pytest
import torch

from hookgraph import demo
from hookgraph.binding import bind
from hookgraph.demo.dictionaries import Quality, Recipe, card, measure, save, stated, train
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import LOGITS, MLP_OUT, RESID_POST
from hookgraph.subgraphs import AutoencoderGraph, load_autoencoder

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def graph() -> HookGraph:
    model, tokenizer = demo.load()
    return bind(model, tokenizer=tokenizer, check=False)


def test_there_is_one_at_every_update_of_an_mlp_and_after_every_layer():
    found = demo.load_dictionaries()
    assert set(found) == {kind[layer] for kind in (MLP_OUT, RESID_POST) for layer in range(4)}
    assert {(c.d_in, c.n_latents, c.W_dec.dtype) for c in found.values()} == {(128, 1024, torch.float32)}


def test_the_card_states_what_is_measured(graph: HookGraph):
    claimed = stated((demo.dictionaries_path() / "README.md").read_text(encoding="utf-8"))
    _, tokenizer = demo.load()
    found = measure(graph, tokenizer, demo.load_dictionaries())
    assert set(claimed) == set(found)
    for at, quality in found.items():
        assert claimed[at].fve == pytest.approx(quality.fve, abs=0.002), at
        assert claimed[at].l0 == pytest.approx(quality.l0, abs=0.1)
        assert claimed[at].dead == pytest.approx(quality.dead, abs=5)
        assert quality.fve > 0.9


def test_with_reconstructions_alone_the_model_still_knows_the_answer(graph: HookGraph):
    text = "After John and Mary went to the store, Mary gave a bottle of milk to"
    dictionaries = demo.load_dictionaries()
    kept = [AutoencoderGraph(dictionaries[MLP_OUT[layer]]) for layer in range(4)]
    dropped = [AutoencoderGraph(dictionaries[MLP_OUT[layer]], error="dropped") for layer in range(4)]
    answer = graph.run(text, save=[LOGITS])[LOGITS]
    assert torch.equal(graph.inject(*kept).run(text).logits, answer)
    assert graph.inject(*dropped).run(text).logits[0, -1].argmax() == answer[0, -1].argmax()


def test_the_whole_folder_stays_small():
    files = [path for path in demo.model_path().parent.rglob("*") if path.is_file()]
    assert sum(p.stat().st_size for p in files if p.suffix != ".pyc") < 12 * MEGABYTE


def test_training_writes_dictionaries_that_load(graph: HookGraph, tmp_path: Path):
    _, tokenizer = demo.load()
    recipe = Recipe(steps=2, batch=64, expansion=2)
    coders = train(graph, tokenizer, recipe)
    save(coders[MLP_OUT[1]], MLP_OUT[1], tmp_path / "sae")
    loaded = load_autoencoder(tmp_path / "sae", dtype=torch.float32)
    x = torch.randn(5, 128)
    torch.testing.assert_close(loaded(x), coders[MLP_OUT[1]](x), rtol=1e-2, atol=2e-2)
    assert loaded.origin.reads == MLP_OUT[1]


def test_a_card_reads_back_as_it_was_written():
    figures = {MLP_OUT[1]: Quality(0.5, 16.0, 3), RESID_POST[0]: Quality(0.25, 15.5, 0)}
    text = card(Recipe(), 128, figures)
    assert stated(text) == figures
    assert "{" not in text
