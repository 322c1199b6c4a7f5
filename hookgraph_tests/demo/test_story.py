"""The demo tells what is so: the pair is answered, heads carry the answer, a vector changes it."""

import inspect
from collections.abc import Generator
from io import StringIO
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from typer.testing import CliRunner

from hookgraph import algorithms, demo
from hookgraph.binding import bind
from hookgraph.cli import app
from hookgraph.demo import story
from hookgraph.demo.grammar import NAMES
from hookgraph.demo.story import Speaker
from hookgraph.demo.telling import card_line
from hookgraph.demo.tour import STOPS, Guide, tour
from hookgraph.ontology.transformer import RESID_POST
from hookgraph.report.breakdown import places, units


@pytest.fixture(scope="module", autouse=True)
def _proven_once(kept_bindings: Path) -> Generator[None]:
    """What is proven of the embedded model is kept from one test to the next."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HOOKGRAPH_CACHE", str(kept_bindings))
        yield


@pytest.fixture(scope="module")
def speaker(_proven_once: None) -> Speaker:
    model, tokenizer = demo.load()
    return Speaker(bind(model, tokenizer), model, tokenizer)


@pytest.fixture(scope="module")
def told(_proven_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo prints, and the folder it writes."""
    out = tmp_path_factory.mktemp("demo") / "new"
    result = CliRunner().invoke(app, ["demo", "--out", str(out)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.stdout, out


# --- the steps --------------------------------------------------------------------------------


def test_the_pair_is_answered_both_ways(speaker: Speaker):
    pair = story.prompts(speaker)
    assert pair.clean.answer > 0.9
    assert pair.corrupt.wrong > 0.9
    assert [i for i in range(len(pair.labels)) if pair.differs(i)] == [10]
    assert pair.labels[10] == "Mary → John"


def test_held_out_pairs_are_never_the_story_and_never_alike():
    pairs = story.held_out()
    assert len(pairs) == story.HELD_OUT
    assert story.STORY.text not in {p.text for p in pairs}
    assert len({p.template for p in pairs}) > 5


def test_the_estimate_ranks_nodes_as_patching_does(speaker: Speaker):
    effect = story.effect_of_nodes(speaker, story.held_out())
    nodes = units(effect)
    assert nodes is not None
    ranking = nodes.check(36)
    assert ranking.correlation > 0.5
    assert min(n.exact or 0.0 for n in ranking) < -1
    assert effect.total_effect is not None
    assert float(effect.total_effect.mean()) < -4


def test_nothing_happens_before_the_name_and_the_answer_ends_at_the_last_position(speaker: Speaker):
    by_place = places(story.effect_of_places(speaker))
    assert by_place is not None
    *_, last = by_place.effects.values()
    assert all(not bool(x[:10].any()) for x in by_place.effects.values())
    assert last.abs().argmax() == len(last) - 1


def test_retold_pairs_are_about_the_two_people_only():
    pairs = story.retold(story.STORY, 20, 0)
    for pair in pairs:
        assert {pair.answer, pair.wrong} == {"John", "Mary"}
        assert pair.text.count(pair.wrong) == 2
        assert pair.text.count(pair.answer) == 1
        assert pair.corrupt.count(pair.answer) == 2
        assert not set(NAMES) - {"John", "Mary"} & set(pair.text.split())


def test_a_vector_steers_the_model_to_the_other_name(speaker: Speaker):
    found = story.steer(speaker)
    assert found.plain_words.startswith("John")
    assert found.steered_words.startswith("Mary")
    assert found.steered.wrong > found.steered.answer
    assert found.flipped > 0.8


def test_steering_by_nothing_changes_nothing(speaker: Speaker):
    found = story.steer(speaker, strength=0.0)
    assert found.steered == found.plain
    assert found.steered_words == found.plain_words
    assert found.flipped < 0.05


def test_the_model_is_itself_after_steering(speaker: Speaker):
    before = speaker.graph.run(story.STORY.text).logits
    story.steer(speaker, layer=1)
    assert torch.equal(speaker.graph.run(story.STORY.text).logits, before)


# --- the telling ------------------------------------------------------------------------------


def test_every_step_is_told(told: tuple[str, Path]):
    printed, _ = told
    for part in (
        "right on",
        "resid.post",
        "all hold",
        "John or Mary?",
        "estimate",
        "exact",
        "Rank correlation",
    ):
        assert part in printed, part
    assert printed.index("What can be hooked") < printed.index("What carries the answer")
    assert printed.index("What carries the answer") < printed.index("Steering") < printed.index("Written")


def test_the_files_are_where_it_says(told: tuple[str, Path]):
    printed, out = told
    for name in ("report.html", "heads.png"):
        assert str(out / name) in printed
    pixels = imread(out / "heads.png")
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 500
    assert pixels[..., :3].std() > 0.05


def test_the_page_tells_the_same(told: tuple[str, Path]):
    text = (told[1] / "report.html").read_text(encoding="utf-8")
    for part in ("John or Mary?", "Steering", "Conformance", "Conventions", "Rank correlation"):
        assert part in text, part
    assert text.count("<figure>") == 2
    assert str(demo.model_path()) not in text
    assert "conserved: holds; conserved: holds" not in text
    assert "https:" not in text


def test_the_card_is_quoted(speaker: Speaker):
    assert card_line(speaker.model).startswith("Embedded model: GPT2LMHeadModel, 4 layers, 8 heads")


def test_the_embedded_model_has_a_name_on_the_command_line():
    result = CliRunner().invoke(app, ["locations", "demo", "--layers", "3"])
    assert result.exit_code == 0
    assert RESID_POST.name in result.output


# --- every algorithm --------------------------------------------------------------------------

SHOWN_BY_OTHERS = {
    "ablate": "means",
    "ablate_layer": "basis",
    "ablate_subspace": "basis",
    "edges": "circuit",
    "exact_effects": "attribution",
    "lens_logits": "lens",
    "mean_patching_effect": "attribution",
    "optimal_constants": "means",
    "random_circuit": "sizes",
    "remove_subspace": "basis",
    "sample_activations": "means",
    "steering_vector": "the demo itself",
}


def test_every_algorithm_has_a_stop():
    functions = {name for name in algorithms.__all__ if inspect.isfunction(getattr(algorithms, name))}
    shown = [name for stop in STOPS for name in stop.shows]
    assert len({stop.name for stop in STOPS}) == len(STOPS)
    assert functions - {*shown} == set(SHOWN_BY_OTHERS)


def test_every_stop_answers_and_draws(speaker: Speaker, tmp_path: Path):
    file = StringIO()
    console = Console(file=file, width=200)
    path = tour(console, Guide(speaker, count=3, effort=0.05), tmp_path, "a small model")
    page = path.read_text(encoding="utf-8")
    assert page.count("<figure>") == len(STOPS)
    for stop in STOPS:
        assert (tmp_path / f"{stop.name}.png").read_bytes().startswith(b"\x89PNG")
        assert stop.question in page
        assert stop.shows[0] in file.getvalue()
