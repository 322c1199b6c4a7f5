"""Bindings that were proven, kept as JSON files: the next model like it is bound without a trace or a proof.

The environment variable `HOOKGRAPH_CACHE` names the folder, or is `off`. A file is found by a digest of all
that a binding follows from; whoever finds it damaged acts as if it were not there.
"""

import hashlib
import importlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, final

import platformdirs
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from hookgraph.binding.data.family import Family
from hookgraph.binding.data.findings import Findings
from hookgraph.binding.data.records import decode, encode
from hookgraph.binding.running.others import is_changed
from hookgraph.graph.conformance import ConformanceReport

_LIMIT: Final = 500
"""How many files are kept; the oldest go."""

_VERSIONED: Final = ("torch", "transformers", "hookgraph", "builtins")
"""Packages whose code is known by something other than the files of the classes used."""


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of a binding."""

    findings: Findings
    report: ConformanceReport


def folder() -> Path | None:
    """Where bindings are kept; None if they are not."""
    chosen = os.environ.get("HOOKGRAPH_CACHE", "")
    if chosen.lower() in ("off", "0", "no", "false"):
        return None
    return (
        Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("hookgraph")) / "bindings"
    )


def key_of(model: PreTrainedModel, example: Mapping[str, Any], family: Family | None = None) -> str | None:
    """A digest of all that a binding follows from; None if nothing is kept, if some of the model's code
    cannot be read, or if others have put hooks on its modules.

    That is the class with its code, the configuration, the modules with their settings and the shapes of
    their weights, the layout of the example, the family record, and the versions of torch, transformers and
    hookgraph.
    """
    code = None if folder() is None or any(map(is_changed, model.modules())) else _code_of(model)
    if code is None:
        return None
    parts: dict[str, object] = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "code": code,
        "config": _settings(model.config),
        "modules": [(path, *_made_of(module)) for path, module in model.named_modules()],
        "weights": [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()],
        "buffers": [(name, tuple(b.shape), str(b.dtype)) for name, b in model.named_buffers()],
        "example": sorted((k, _layout(v)) for k, v in example.items()),
        "family": None if family is None else family.to_json(),
        "versions": (torch.__version__, transformers.__version__, _own_code()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def load(key: str, model: nn.Module) -> Entry | None:
    """What is kept under a key, if it is whole and fits the model."""
    place = folder()
    if place is None:
        return None
    try:
        digest, _, text = (place / f"{key}.json").read_text().partition("\n")
        if digest != _digest(text):
            return None
        entry: Entry = decode(json.loads(text), Entry)
    except Exception:  # a damaged file, or none
        return None
    return entry if _fits(entry.findings, model) else None


def store(key: str, entry: Entry) -> None:
    """Keep a binding, in one step: readers and other writers see it whole or not at all."""
    place = folder()
    if place is None:
        return
    text = json.dumps(encode(entry, Entry), separators=(",", ":"))
    # Nothing is lost but time where the folder cannot be written.
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place, suffix=".part", delete=False) as file:
            file.write(f"{_digest(text)}\n{text}")
        os.replace(file.name, place / f"{key}.json")
        _drop_oldest(place)


def _drop_oldest(place: Path) -> None:
    files = sorted(place.iterdir(), key=lambda f: f.stat().st_mtime)
    for file in files[:-_LIMIT]:
        file.unlink(missing_ok=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fits(findings: Findings, model: nn.Module) -> bool:
    """Whether the modules and functions that anchors name exist."""
    modules = dict(model.named_modules())
    paths = {a.module for a in findings.anchors.values()} | {w.module for w in findings.weights.values()}
    functions = {a.eager for a in findings.anchors.values() if a.eager}
    return paths <= modules.keys() and all(map(_exists, functions))


def _exists(function: str) -> bool:
    module, _, name = function.partition(":")
    return callable(getattr(importlib.import_module(module), name, None))


def _made_of(module: nn.Module) -> tuple[object, ...]:
    """The class of a module, and what its attributes say, as of adapters: which are active, or merged."""
    said = {k: v for k, v in vars(module).items() if k not in _OF_A_PASS and _is_plain(v)}
    return type(module).__qualname__, type(module).__module__, said


_OF_A_PASS: Final = ("training", "_is_full_backward_hook", "_is_hf_initialized", "name_or_path")
"""Attributes that say nothing of what a module computes in evaluation."""


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(x, (bool, int, float, str)) for x in value)
    return isinstance(value, (bool, int, float, str))


def _settings(config: Any) -> object:
    """What a configuration says, without where it comes from, and what was chosen for a pass."""
    stated = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    chosen = {k: v for k, v in vars(config).items() if k.endswith("_implementation_internal")}
    inner = {k: _settings(v) for k, v in vars(config).items() if isinstance(v, transformers.PreTrainedConfig)}
    return stated, chosen, inner


def _layout(value: object) -> str:
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _code_of(model: nn.Module) -> list[tuple[str, str]] | None:
    """The files of the classes of a model, and of what is imported beside them, with their digests."""
    classes = {c for kind in {type(m) for m in model.modules()} for c in kind.__mro__}
    files: set[str] = set()
    for kind in classes:
        if kind.__module__.partition(".")[0] in _VERSIONED and not kind.__module__.startswith(_MODELS):
            continue
        try:
            files.add(inspect.getfile(kind))
        except (TypeError, OSError):
            return None
        files |= set(_beside(kind.__module__))
    try:
        return sorted((Path(file).name, _file_digest(file)) for file in files)
    except OSError:
        return None


_MODELS: Final = "transformers.models."


def _beside(module: str) -> Iterator[str]:
    """The files of the other modules of a package that is not a part of transformers."""
    package = module.rpartition(".")[0]
    if package and not module.startswith(_MODELS):
        for name, other in list(sys.modules.items()):
            file = getattr(other, "__file__", None)
            if name.rpartition(".")[0] == package and file:
                yield file


def _file_digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@cache
def _own_code() -> str:
    """A digest of hookgraph itself: its version does not change with every line."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
