"""The command line: what it prints, what it writes, and how it fails."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.utils import logging
from typer.testing import CliRunner, Result

import hookgraph as hg
from hookgraph.algorithms import CausalBasis, Circuit, Counterfactuals, TunedLens
from hookgraph.algorithms.readouts.lenses import Translation
from hookgraph.binding.loading import load_model, load_tokenizer
from hookgraph.cli import app, main
from hookgraph.cli.circuits import dictionaries, spliced
from hookgraph.cli.pairs import chosen_pairs
from hookgraph.demo import dictionaries_path
from hookgraph.demo.train import build_tokenizer
from hookgraph.errors import LoadError
from hookgraph.locations import ATTN_Z, MLP_OUT
from hookgraph.subgraphs import AutoencoderGraph

CLEAN = "After John and Mary went to the store, Mary gave a book of maps to"
CORRUPT = CLEAN.replace(", Mary", ", John")
PAIR = ["--clean", CLEAN, "--corrupt", CORRUPT, "--answer", "John", "--wrong", "Mary"]
BERT = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
)
T5 = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
VIT = ViTConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
)


@pytest.fixture(autouse=True)
def _proven_once(kept_bindings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is proven of the models of these tests is kept from one command to the next."""
    monkeypatch.setenv("HOOKGRAPH_CACHE", str(kept_bindings))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random GPT-2 of two layers, and a word-level tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})


def succeed(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments: str) -> str:
    """The one line on which a command fails."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


# --- locations --------------------------------------------------------------------------------


def test_locations_lists_names_axes_and_layers(tiny: str):
    lines = [line.split() for line in succeed("locations", tiny).splitlines()]
    assert ["resid.post", "batch", "pos", "d_model=16", "0-1"] in lines
    assert ["attn.z", "batch", "pos", "head=4", "d_head=4", "0-1"] in lines
    assert ["logits", "batch", "pos", "vocab=155"] in lines
    assert any(line[:2] == ["attn.q_pre", "0-1"] for line in lines)


def test_locations_of_some_layers(tiny: str):
    output = succeed("locations", tiny, "--layers", "1")
    assert ["attn.z", "batch", "pos", "head=4", "d_head=4", "1"] in [x.split() for x in output.splitlines()]
    assert "logits" not in output


@pytest.mark.parametrize(
    ("layers", "message"), [("7-9", "no such layer"), ("0-", "write 0-3"), ("one", "write 0-3")]
)
def test_layers_that_are_not_there_or_no_layers(tiny: str, layers: str, message: str):
    assert message in fail("locations", tiny, "--layers", layers)


@pytest.mark.parametrize(
    ("model", "row"),
    [
        (T5ForConditionalGeneration(T5), ["encoder.attn.z", "batch", "pos", "head=2", "d_head=4", "0-1"]),
        (T5ForConditionalGeneration(T5), ["attn.z", "batch", "pos", "head=2", "d_head=4", "0-1"]),
        (ViTModel(VIT), ["resid.post", "batch", "pos", "d_model=8", "0"]),
    ],
    ids=["encoder", "decoder", "vision"],
)
def test_locations_of_models_that_read_something_else(model: PreTrainedModel, row: list[str], tmp_path: Path):
    model.save_pretrained(tmp_path)
    assert row in [line.split() for line in succeed("locations", str(tmp_path)).splitlines()]


# --- check ------------------------------------------------------------------------------------


def test_check_proves_every_location(tiny: str):
    output = succeed("check", tiny)
    assert output.strip().endswith("all hold")
    assert "edit = gradient" in output
    assert "✗" not in output


def test_check_as_json_holds_the_same(tiny: str):
    report = json.loads(succeed("check", tiny, "--json"))
    assert report["ok"] is True
    assert "attn.z[1]" in report["locations"]
    assert "attn.q_pre[0]" in report["absent"]


def test_check_of_every_layer_on_the_model_itself(tiny: str):
    assert "all hold" in succeed("check", tiny, "--full")


# --- attribute --------------------------------------------------------------------------------


def test_attribute_ranks_heads_and_mlps_with_exact_effects(tiny: str):
    output = succeed("attribute", tiny, *PAIR, "--top", "3")
    assert "total effect" in output
    assert "exact" in output
    rows = [line for line in output.splitlines() if line.startswith(("attn.z[", "mlp.out["))]
    assert len(rows) == 3
    assert all("█" in row for row in rows)


def test_attribute_at_parts_of_locations(tiny: str):
    output = succeed("attribute", tiny, *PAIR, "--at", "attn.z[1]@head=0,2;pos=-1, mlp.out[0],resid.post")
    assert "attn.z[1]@head=2;pos=-1" in output
    assert "attn.z[0]" not in output
    assert "resid.post[1]@pos=16 “to”" in output
    assert "“Mary → John”" in output


def test_attribute_writes_a_page(tiny: str, tmp_path: Path):
    page = tmp_path / "new" / "page.html"
    output = succeed("attribute", tiny, *PAIR, "--at", "attn.z,resid.post", "--report", str(page))
    assert str(page) in output.replace("\n", "")
    text = page.read_text(encoding="utf-8")
    assert "Why John and not Mary?" in text
    assert text.count("<figure>") == 2


def test_attribute_agrees_with_the_library(tiny: str):
    tokenizer = load_tokenizer(tiny)
    graph = hg.bind(load_model(tiny), tokenizer)
    metric = hg.metrics.logit_diff(*(tokenizer.convert_tokens_to_ids(name) for name in ("John", "Mary")))
    effect = hg.patching_effect(graph, CLEAN, CORRUPT, metric, graph.every(hg.locations.MLP_OUT))
    expected = effect.mean("batch").sum("pos", "d_model").check(1)[0]
    row = next(x for x in succeed("attribute", tiny, *PAIR, "--at", "mlp.out").splitlines() if "█" in x)
    assert row.split()[:3] == [str(expected.location), f"{expected.effect:+.3f}", f"{expected.exact:+.3f}"]


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        (["--answer", "milk tea"], ["'milk tea' is several", "milk | tea"]),
        (["--wrong", "giraffe"], ["the tokenizer does not know 'giraffe'"]),
        (["--corrupt", CORRUPT + " John"], ["17 tokens, the corrupt one 18", "<bos> | After | John"]),
        (["--at", "attn.zz"], ["no location type is called 'attn.zz'", "did you mean attn.z"]),
        (["--at", "attn.z[9]"], ["no location attn.z[9]", "2 layers"]),
        (["--at", "attn.q_pre"], ["no location attn.q_pre[0]", "use attn.q"]),
        (["--method", "atrib"], ["unknown method 'atrib'", "did you mean attrib"]),
    ],
)
def test_attribute_says_what_is_wrong(tiny: str, changed: list[str], messages: list[str]):
    error = fail("attribute", tiny, *PAIR, *changed)
    for message in messages:
        assert message in error


# --- models that cannot be loaded -------------------------------------------------------------


@pytest.mark.parametrize("command", ["locations", "check"])
def test_a_model_that_does_not_exist(command: str):
    error = fail(command, "no-such/model")
    assert "cannot load a model from 'no-such/model'" in error
    assert "there is no such folder here" in error


def test_a_folder_that_is_no_model(tmp_path: Path):
    assert f"cannot load a model from '{tmp_path}'" in fail("check", str(tmp_path))


def test_a_folder_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for command in (["locations", "."], ["attribute", ".", *PAIR]):
        assert f"from '{tmp_path}': " in fail(*command)


def test_a_folder_with_damaged_weights(tiny: str, tmp_path: Path):
    for file in Path(tiny).iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[: 200 if file.suffix == ".safetensors" else None]
        )
    assert "cannot load a model" in fail("locations", str(tmp_path))


def test_a_folder_without_a_tokenizer(tiny: str, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(tiny) / name).read_bytes())
    assert "cannot load a tokenizer" in fail("attribute", str(tmp_path), *PAIR)


def test_debug_shows_the_traceback():
    result = run("check", "no-such/model", "--debug")
    assert isinstance(result.exception, LoadError)
    assert result.exit_code == 1


def test_a_command_leaves_the_verbosity_of_transformers_as_it_was(tiny: str):
    before = logging.get_verbosity()
    succeed("locations", tiny)
    assert logging.get_verbosity() == before


# --- what a model is loaded as ----------------------------------------------------------------


def test_a_model_is_loaded_as_what_it_was_saved_as(tmp_path: Path):
    BertForMaskedLM(BERT).save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path), BertForMaskedLM)


def test_a_model_that_was_saved_as_nothing_known_gets_logits(tiny: str, tmp_path: Path):
    config = json.loads((Path(tiny) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
    (tmp_path / "model.safetensors").write_bytes((Path(tiny) / "model.safetensors").read_bytes())
    assert isinstance(load_model(tmp_path), GPT2LMHeadModel)


def test_a_bare_model_is_loaded_bare(tmp_path: Path):
    BertModel(BERT).save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path), BertModel)


def test_the_models_own_mode_is_evaluation(tiny: str):
    assert not load_model(tiny).training


# --- help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "locations", "check", "attribute"])
def test_every_command_has_help(command: str):
    assert "--debug" in succeed(command, "--help")


def test_main_runs_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", ["hookgraph", "--help"])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 0
    assert "attribute" in capsys.readouterr().out


# --- circuit and edges ------------------------------------------------------------------------


def test_a_circuit_of_heads_is_told_kept_and_drawn(tiny: str, tmp_path: Path):
    file, figure, curve = (tmp_path / "new" / x for x in ("circuit.safetensors", "circuit.png", "curve.png"))
    files = ["--save", str(file), "--figure", str(figure), "--curve", str(curve)]
    told = succeed("circuit", tiny, *PAIR, "--method", "attrib", "--random", "1", *files)
    found = Circuit.load(file)
    assert f"Circuit of {len(found.nodes)} of 10 nodes that have an effect, {found.edges.count} edges" in told
    assert str(found.top(1)[0].location) in told
    for drawn in (figure, curve):
        assert drawn.read_bytes().startswith(b"\x89PNG")
        assert str(drawn) in told.replace("\n", "")


def test_the_demo_has_pairs_and_dictionaries_of_its_own(tiny: str):
    pairs = chosen_pairs("demo", None, 3, ("", "", "", ""))
    assert len(pairs) == 3
    assert all(pair.clean != pair.corrupt for pair in pairs)
    coders = dictionaries("demo", [])
    assert len(coders) == 8
    folder = str(dictionaries_path() / "mlp.out.3")
    assert list(dictionaries(tiny, [folder, f"mlp.out[1]={folder}"])) == [MLP_OUT[3], MLP_OUT[1]]
    graph = hg.bind(load_model(tiny), check=False)
    _, (first, second) = spliced(graph, {MLP_OUT[1]: coders[MLP_OUT[3]]}, "mlp.out")
    assert first == MLP_OUT[0]
    assert isinstance(second, AutoencoderGraph)
    assert spliced(graph, {}, "")[1][0] == ATTN_Z[0]


def test_edges_between_pairs_of_several_lengths_are_told_and_kept(tiny: str, tmp_path: Path):
    first = {"clean": CLEAN, "corrupt": CORRUPT, "answer": "John", "wrong": "Mary"}
    second = {**first, "clean": f"Then, {CLEAN}", "corrupt": f"Then, {CORRUPT}"}
    pairs, file = tmp_path / "pairs.jsonl", tmp_path / "circuit.safetensors"
    pairs.write_text(f"{json.dumps(first)}\n\n{json.dumps(second)}\n")
    options = ["--method", "eap", "--edges", "12", "--no-curves", "--save", str(file)]
    told = succeed("edges", tiny, "--pairs", str(pairs), *options)
    found = Circuit.load(file)
    assert found.edges.examples == 2
    assert f"of {found.edges.count} edges that lead to the logits" in told
    assert 0 < found.edges.count <= 12
    assert "CPR" not in told


def test_curves_of_edges_are_told_and_drawn(tiny: str, tmp_path: Path):
    figures = tmp_path / "circuit.png", tmp_path / "curve.png"
    files = ["--figure", str(figures[0]), "--curve", str(figures[1])]
    told = succeed("edges", tiny, *PAIR, "--method", "eap", *files)
    assert "CPR" in told
    assert all(x.read_bytes().startswith(b"\x89PNG") for x in figures)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to compare: give --pairs FILE"),
        ([*PAIR, "--select", "best"], "unknown way to select 'best'"),
        (["--pairs", "lines"], "lines, line 1 is no pair"),
        (["--pairs", "empty"], "empty is empty"),
        ([*PAIR, "--corrupt", CORRUPT + " John"], "17 tokens, the corrupt one 18"),
    ],
)
def test_what_no_edges_are_of_is_told(
    tiny: str, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("lines").write_text('{"clean": "After"}\n')
    Path("empty").write_text("\n")
    assert message in fail("edges", tiny, *options)


# --- contributions ----------------------------------------------------------------------------


def test_contributions_are_told_and_drawn(tiny: str, tmp_path: Path):
    figure = tmp_path / "paths.png"
    told = succeed("contributions", tiny, "--text", CLEAN, "--threshold", "0.2", "--figure", str(figure))
    assert "resid.mid[1]" in told
    assert " to (16)" in told
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_position_that_the_text_lacks_is_named(tiny: str):
    assert "token=99 is no token" in fail("contributions", tiny, "--text", CLEAN, "--token", "99")


# --- profile ----------------------------------------------------------------------------------


def test_profiles_of_every_head_are_told_and_drawn(tiny: str, tmp_path: Path):
    figure = tmp_path / "profiles.png"
    told = succeed("profile", tiny, *PAIR, "--steps", "4", "--figure", str(figure))
    assert "attn.z[1]@head=3" in told
    assert "gradient range" in told
    assert figure.read_bytes().startswith(b"\x89PNG")


# --- basis ------------------------------------------------------------------------------------

BASIS = ["--text", CLEAN, "--at", "resid.post[0]", "--directions", "1"]


def test_a_basis_is_told_kept_and_drawn(tiny: str, tmp_path: Path):
    file, figure = tmp_path / "basis.safetensors", tmp_path / "energies.png"
    told = succeed("basis", tiny, *BASIS, "--save", str(file), "--figure", str(figure))
    found = CausalBasis.load(file)
    assert found.basis.shape == (16, 1)
    assert f"{float(found.energies[0]):.3f}" in told
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_basis_is_found_through_a_lens(tiny: str, tmp_path: Path):
    lens = TunedLens({i: Translation(torch.zeros(16, 16), torch.zeros(16)) for i in range(2)})
    lens.save(tmp_path / "lens")
    first, second = (
        succeed("basis", tiny, *BASIS, "--lens", name) for name in ("logit", str(tmp_path / "lens"))
    )
    assert first == second, "a translation that changes nothing"


def test_what_a_basis_cannot_be_of_is_told(tiny: str):
    assert "unknown ablation 'means'" in fail("basis", tiny, *BASIS, "--ablation", "means")
    assert "resid.post" in fail("basis", tiny, "--text", CLEAN, "--at", "resid.pos[0]")


# --- counterfactuals --------------------------------------------------------------------------

SEARCH = ["--text", CLEAN, "--answer", "John", "--wrong", "Mary", "--tries", "12"]


def test_counterfactuals_are_told_kept_and_drawn(tiny: str, tmp_path: Path):
    file, figure = tmp_path / "pairs.safetensors", tmp_path / "pairs.png"
    options = ["--at", "attn.z[1]@head=3", "--perplexity", "9", "--save", str(file), "--figure", str(figure)]
    told = succeed("counterfactuals", tiny, *SEARCH, *options)
    found = Counterfactuals.load(file)
    assert len(found.seen) == 12
    shown = found.to_frame()["swaps"].tolist() or ["no counterfactual among 12 texts"]
    assert all(swaps.split(",")[0] in told for swaps in shown)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_how_counterfactuals_cannot_be_found_is_told(tiny: str):
    assert "unknown method 'discreet'" in fail("counterfactuals", tiny, *SEARCH, "--method", "discreet")
    assert "no counterfactual among 12" in succeed("counterfactuals", tiny, *SEARCH, "--perplexity", "1e-6")
