"""Read what dictionaries are stored in: tensors and settings, and nothing that could execute code."""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hookgraph.errors import HookGraphError, LoadError, LocationError, ShapeMismatchError, nearest
from hookgraph.ontology.aliases import from_transformer_lens
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs.dictionary import Autoencoder

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True)
class Format:
    """A format of dictionaries.

    Args:
        name: the tool that writes it.
        expects: the files that it consists of, for messages.
        recognises: whether a folder or file is of this format.
        read: the dictionary.
    """

    name: str
    expects: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path], Autoencoder]


@final
class Weights(Mapping[str, Tensor]):
    """The tensors of a file; what is missing is told together with what is there."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self.others = {k: v for k, v in content.items() if not isinstance(v, Tensor)}
        self._tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}

    def __getitem__(self, name: str) -> Tensor:
        found = self._tensors.get(name)
        if found is None:
            raise LoadError(
                f"{self.path}: expected a tensor {name!r}, found {', '.join(sorted(self)) or 'no tensors'}"
            )
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def first(self, *names: str) -> Tensor:
        """The first of several names that is there."""
        return self[next((name for name in names if name in self), names[0])]

    def optional(self, name: str) -> Tensor | None:
        """A tensor that need not be there."""
        return self._tensors.get(name)

    def oriented(self, name: str, rows: int, columns: int) -> Tensor:
        """A matrix (rows, columns), stored like that or transposed."""
        found = self[name]
        if tuple(found.shape) == (rows, columns):
            return found
        if tuple(found.shape) == (columns, rows):
            return found.T
        raise LoadError(
            f"{self.path}: expected {name} of shape {(rows, columns)} or {(columns, rows)}, found "
            f"{tuple(found.shape)}"
        )


def read_weights(path: Path) -> Weights:
    """The tensors of a `.safetensors`, `.npz` or `.pt` file; of the last, only what is no code.

    Raises:
        LoadError: the file is missing, damaged, or holds other things.
    """
    readers: dict[str, Callable[[Path], Mapping[str, Any]]] = {".safetensors": load_file, ".npz": _read_npz}
    try:
        content = readers.get(path.suffix, _read_torch)(path)
    except (OSError, SafetensorError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise LoadError(f"{path}: expected tensors in a {path.suffix} file, found: {error}") from error
    except pickle.UnpicklingError as error:
        raise LoadError(f"{path}: expected tensors, found something that could be code: {error}") from error
    if not isinstance(content, Mapping):
        raise LoadError(f"{path}: expected a dictionary of tensors, found a {type(content).__name__}")
    return Weights(path, content)


def _read_torch(path: Path) -> Mapping[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_npz(path: Path) -> Mapping[str, Any]:
    with np.load(path, allow_pickle=False) as content:
        return {name: torch.from_numpy(content[name]) for name in content.files}


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a JSON or YAML file.

    Raises:
        LoadError: the file is missing or damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LoadError(f"{path}: expected settings, found: {error}") from error
    if not isinstance(found, dict):
        raise LoadError(f"{path}: expected settings by name, found a {type(found).__name__}")
    return found


def choose(path: Path, what: str, value: object, known: Mapping[str, T]) -> T:
    """One of several known kinds.

    Raises:
        LoadError: it is none of them.
    """
    found = known.get(str(value))
    if found is None:
        raise LoadError(f"{path}: expected {what} to be one of {', '.join(known)}, found {value!r}")
    return found


def assembled(path: Path, make: Callable[[], Autoencoder]) -> Autoencoder:
    """What `make` returns; shapes or settings that do not fit are told as an error of the file.

    Raises:
        LoadError: they do not fit.
    """
    try:
        return make()
    except ShapeMismatchError as error:
        raise LoadError(f"{path}: expected weights that fit each other, found: {error}") from error
    except (TypeError, ValueError) as error:
        raise LoadError(f"{path}: expected settings that are numbers, found: {error}") from error
    except LoadError:
        raise
    except HookGraphError as error:
        raise LoadError(f"{path}: expected settings that make a dictionary, found: {error}") from error


def located(hook_name: object) -> Location | None:
    """The location of a TransformerLens hook name; None where there is none."""
    name = str(hook_name).replace(".mlp.hook_in", ".ln2.hook_normalized")
    try:
        return from_transformer_lens(name)
    except LocationError:
        return None


def read_with(formats: tuple[Format, ...], path: Path) -> Autoencoder:
    """The dictionary at a path, by the first format that recognises it.

    Raises:
        LoadError: none does: what each expects, and what is there.
    """
    if not path.exists():
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise LoadError(f"{path}: expected a dictionary, found no such file or folder; {near}")
    for one in formats:
        if one.recognises(path):
            return one.read(path)
    there = ", ".join(sorted(p.name for p in path.iterdir())[:12]) if path.is_dir() else "another file"
    expected = "; ".join(f"{one.name}: {one.expects}" for one in formats)
    raise LoadError(f"{path}: expected one of ({expected}), found: {there or 'an empty folder'}")
