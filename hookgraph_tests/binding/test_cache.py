"""A model like one that was proven before is bound without a trace; whatever differs is proven anew."""

import importlib.util
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from hookgraph.binding import Family, bind, cache
from hookgraph.binding.proving import proving
from hookgraph.binding.resolving.examples import example_inputs
from hookgraph_tests.families import FAMILIES, Size, tokens
from hookgraph_tests.families import build as build_of

SMALLEST = Size(layers=1)
"""What is kept is the same whatever the size: the proof is short."""


def build(
    family: str, dtype: torch.dtype = torch.float32, size: Size = SMALLEST, seed: int = 0
) -> PreTrainedModel:
    """A model of one layer."""
    return build_of(family, dtype, size, seed)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOOKGRAPH_CACHE", str(tmp_path / "bindings"))
    return tmp_path / "bindings"


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("this model should have been known")

    monkeypatch.setattr("hookgraph.binding.binding.Trace", never)
    monkeypatch.setattr(proving, "Trace", never)


def key(model: PreTrainedModel) -> str | None:
    return cache.key_of(model, example_inputs(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_bind_neither_traces_nor_proves(family: str, monkeypatch: pytest.MonkeyPatch):
    first = bind(build(family))
    forbid(monkeypatch)
    again = build(family, seed=1)
    again.config._name_or_path = "another"
    second = bind(again)
    assert second.locations == first.locations
    assert second.report.proofs == first.report.proofs
    assert second.report.absent == first.report.absent
    assert second.report.metadata == {**first.report.metadata, "model": "another"}


def test_a_cached_binding_reads_the_values_of_its_own_model():
    bind(build("llama"))
    model = build("llama", seed=3)
    second = bind(model)
    third = bind(model, cached=False)
    ids = tokens(1, 4)
    left, right = second.run(ids, save=second.locations), third.run(ids, save=third.locations)
    assert all(torch.equal(left[x], right[x]) for x in third.locations)


def test_nothing_is_kept_where_that_is_not_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch):
    bind(build("gpt2"), cached=False)
    bind(build("gpt2"), check=False)
    monkeypatch.setenv("HOOKGRAPH_CACHE", "off")
    bind(build("gpt2"))
    assert not folder.exists()


def test_what_a_binding_follows_from_is_in_the_key():
    model = build("llama")
    known = {key(model), key(build("llama", size=Size(layers=2))), key(build("llama", torch.bfloat16))}
    assert len(known) == 3
    assert key(build("llama", seed=5)) == key(model)
    example = example_inputs(model)
    assert cache.key_of(model, example) != cache.key_of(model, example, Family("LlamaForCausalLM", ()))
    assert cache.key_of(model, example) != cache.key_of(model, {**example, "attention_mask": None})
    model.set_attn_implementation("eager")
    known.add(key(model))
    model.model.layers[0].mlp = torch.nn.Identity()
    known.add(key(model))
    assert len(known) == 5


def write(path: Path, factor: str) -> ModuleType:
    path.write_text(
        f"from transformers import LlamaForCausalLM\nclass Remote(LlamaForCausalLM):\n    factor = {factor}\n"
    )
    spec = importlib.util.spec_from_file_location("remote_code", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["remote_code"] = module
    spec.loader.exec_module(module)
    return module


def test_changed_code_of_a_model_is_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "remote_code", ModuleType("remote_code"))
    config = build("llama").config
    first = key(write(tmp_path / "remote.py", "1").Remote(config))
    assert first is not None
    assert key(write(tmp_path / "remote.py", "1").Remote(config)) == first
    assert key(write(tmp_path / "remote.py", "2").Remote(config)) != first


def test_a_class_without_a_file_is_not_kept(folder: Path):
    namespace: dict[str, type[LlamaForCausalLM]] = {}
    exec("class Typed(Base): pass", {"Base": LlamaForCausalLM, "__name__": "nowhere"}, namespace)
    model = namespace["Typed"](build("llama").config).eval()
    assert key(model) is None
    assert bind(model).report.ok
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["", "{", "cut", "changed", "[]"])
def test_a_damaged_file_is_as_if_it_were_not_there(folder: Path, damage: str):
    first = bind(build("gpt2"))
    (file,) = folder.iterdir()
    text = file.read_text()
    digest, _, content = text.partition("\n")
    other = {
        "cut": text[: len(text) // 2],
        "changed": f"{digest}\n{content.replace('resid.mid', 'resid.pre')}",
    }
    file.write_text(other.get(damage, damage))
    second = bind(build("gpt2"))
    assert second.locations == first.locations
    assert file.read_text() == text


def test_a_binding_that_does_not_fit_is_not_used(folder: Path):
    model = build("gpt2")
    bind(model)
    (file,) = folder.iterdir()
    name = key(model)
    assert name is not None
    entry = cache.load(name, model)
    assert entry is not None
    assert cache.load(name, build("llama")) is None
    content = file.read_text().partition("\n")[2]
    content = content.replace("eager_attention_forward", "gone_in_this_version")
    file.write_text(f"{cache._digest(content)}\n{content}")
    assert cache.load(name, model) is None


def test_writers_at_the_same_time_leave_a_whole_file(folder: Path):
    model = build("gpt2")
    bind(model)
    name = key(model)
    assert name is not None
    entry = cache.load(name, model)
    assert entry is not None
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.store(name, entry), range(40)))
    assert [f.name for f in folder.iterdir()] == [f"{name}.json"]
    assert cache.load(name, model) is not None


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOOKGRAPH_CACHE", str(tmp_path / "file" / "below"))
    assert bind(build("gpt2")).report.ok


def test_the_oldest_files_go(folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = build("gpt2")
    bind(model)
    (file,) = folder.iterdir()
    monkeypatch.setattr(cache, "_LIMIT", 2)
    entry = cache.load(file.stem, model)
    assert entry is not None
    os.utime(file, (0, 0))
    for name in ("a", "b"):
        cache.store(name, entry)
    assert sorted(f.stem for f in folder.iterdir()) == ["a", "b"]


def test_the_file_is_plain_json(folder: Path):
    bind(build("gpt2"))
    (file,) = folder.iterdir()
    content = json.loads(file.read_text().partition("\n")[2])
    assert content.keys() == {"findings", "report"}


def test_the_folder_is_the_one_for_caches_where_none_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HOOKGRAPH_CACHE")
    place = cache.folder()
    assert place is not None
    assert place.parts[-2:] == ("hookgraph", "bindings")
