"""The page of architectures says what is so: a few of its rows are repeated, others each week."""

import datetime
import random
from collections.abc import Iterator

import pytest
import transformers
from transformers import LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hookgraph.binding.resolving.examples import example_inputs
from hookgraph.binding.tracing.trace import Trace
from hookgraph_tests.sweep import page, processes
from hookgraph_tests.sweep.outcomes import Outcome, general, is_convolutional, outcome_of
from hookgraph_tests.tiny import TABLES, architectures, build, swept
from hookgraph_tests.tiny.configs import tiny_config
from hookgraph_tests.tiny.inputs import EXAMPLES
from hookgraph_tests.tiny.overrides import OVERRIDES
from hookgraph_tests.tiny.rules import rule_for
from hookgraph_tests.unchecked import unchecked

EACH = 2
"""How many bound architectures of each mapping are repeated, beside one that is not bound."""


def of_this_week() -> Iterator[Outcome]:
    """The rows that are repeated: the same ones for a week, so that a failure can be looked into."""
    week = datetime.datetime.now(tz=datetime.UTC).isocalendar()
    chance = random.Random(f"{week.year}-{week.week}")
    recorded = page.read()
    for table in TABLES:
        bound = [o for o in recorded if o.table == table and o.status == "bound"]
        yield from chance.sample(bound, min(EACH, len(bound)))
    refused = [o for o in recorded if o.status == "not bound" and "too long" not in o.reason]
    yield from chance.sample(refused, min(1, len(refused)))


@pytest.mark.parametrize("recorded", [*of_this_week()], ids=lambda o: f"{o.table}-{o.architecture}")
def test_a_row_of_the_page_is_repeated(recorded: Outcome):
    with unchecked():
        found = outcome_of(recorded.table, recorded.architecture)
    assert found.status == recorded.status, found.reason
    assert set(found.types) == set(recorded.types)
    assert found.layers == recorded.layers


def test_the_page_is_the_record_in_words():
    assert page.PAGE.read_text(encoding="utf-8") == page.rendered(page.read(), page.version())


def test_a_mapping_on_the_page_has_every_architecture_of_this_version_of_transformers():
    assert page.version() == transformers.__version__, "run `make sweep`"
    recorded = page.read()
    for table in {o.table for o in recorded}:
        assert {o.architecture: o.model for o in recorded if o.table == table} == swept(table)


def test_a_record_is_read_as_it_was_written(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "RECORD", tmp_path / "page.json")
    bound = Outcome(
        "causal",
        "llama",
        "LlamaForCausalLM",
        "bound",
        layers={"decoder": 2},
        types={"resid.pre": 2, "logits": 1},
        gaps={"mlp.pre": "no single projection", "resid.pre": "in one layer | only"},
    )
    failed = Outcome("causal", "gemma3n", "Gemma3nForConditionalGeneration", "not built", "timm | natten")
    page.write([bound, failed])
    assert sorted(page.read(), key=lambda o: o.architecture) == [failed, bound]
    text = page.PAGE.read_text(encoding="utf-8")
    assert (
        "| `llama` | `LlamaForCausalLM` | 2 | 3 | mlp.pre [2](#reasons); (resid.pre) [1](#reasons) |" in text
    )
    assert "| `gemma3n` | `Gemma3nForConditionalGeneration` | not built | timm \\| natten |" in text


def test_reasons_of_layers_and_measurements_are_one():
    slopes = "edit = gradient fails: finite difference {}, gradient {}"
    measured = {general(slopes.format(*x)) for x in [(0.1, -2), ("-4.745e-05", "inf")]}
    assert measured == {slopes.format("n", "n")}
    sizes = "shape fails: 3 axes, of sizes 1 8 16, for batch pos (attn.q[1])"
    assert general(sizes) == "shape fails: n axes, of sizes n n n, for batch pos (attn.q[l])"
    same = "fires once fails: TypeError: stack2 got float64"
    assert general(same) == same
    assert general("the norm is the one of attn.ln_scale[3]") == "the norm is the one of attn.ln_scale[l]"
    assert general("layer 3 adds 2 updates of this kind") == "the layer adds 2 updates of this kind"


def test_an_architecture_that_hangs_or_dies_is_told_from_others(monkeypatch: pytest.MonkeyPatch):
    def work(pipe, _, table: str, architecture: str) -> None:
        if architecture == "gpt2":
            while True:
                pass
        if architecture == "llama":
            raise SystemExit(3)
        pipe.send(Outcome(table, architecture, "", "bound"))

    monkeypatch.setattr(processes, "_work", work)
    names = [("causal", name) for name in ("gpt2", "llama", "bert", "gemma2")]
    found = {o.architecture: o for o in processes.outcomes(names, jobs=2, seconds=2.0)}
    assert found["gpt2"].reason == "takes too long"
    assert found["llama"].reason == "the process ended with code 3"
    assert found["bert"].status == found["gemma2"].status == "bound"


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("convnext", True), ("resnet", True), ("vit", False), ("wav2vec2", False), ("mamba", False)],
)
def test_a_net_of_convolutions_is_told_by_what_it_computes(architecture: str, expected: bool):
    model = build("base", architecture)
    assert is_convolutional(Trace(model, example_inputs(model))) is expected


def test_the_share_that_is_bound_leaves_nets_without_a_stream_out():
    outcomes = [
        Outcome("base", "vit", "ViTModel", "bound"),
        Outcome("base", "cvt", "CvtModel", "not bound", "widths"),
        Outcome("base", "resnet", "ResNetModel", "no stream", "convolutions"),
    ]
    assert "`AutoModel` | 3 | 3 | 1 | 1 | 50% |" in page.rendered(outcomes, "1")


def test_encoders_are_swept_and_bodies_of_generators_are_not():
    assert {"vit", "clip", "siglip", "whisper", "wav2vec2", "swin", "glm4v_vision"} <= set(swept("base"))
    assert not {"llama", "gpt2", "llava", "t5", "bert", "glm4v_text"} & set(swept("base"))
    assert swept("causal") == architectures("causal")


def test_fields_shrink_by_their_name():
    assert rule_for("num_hidden_layers", 32) == 2
    assert rule_for("hidden_dropout", 0.1) is None
    assert rule_for("num_experts_per_tok", 1) is None, "one stays one"
    assert rule_for("head_dim", None) == 8, "left open by default"
    assert rule_for("image_size", [224, 448]) == [32, 32]
    config = tiny_config(LlamaConfig)
    assert config.hidden_size == config.num_attention_heads * config.head_dim


def test_what_is_written_for_an_architecture_is_written_for_one_that_there_is():
    assert set(OVERRIDES) <= set(CONFIG_MAPPING)
    assert {name for name in EXAMPLES if not hasattr(transformers, name)} <= set(CONFIG_MAPPING)


def test_a_made_up_sound_stays_within_bounds():
    model = build("base", "pe_audio_encoder")
    heard = model.get_submodule("embedder")(**example_inputs(model))[0]
    assert float(heard.detach().abs().max()) < 1e3
