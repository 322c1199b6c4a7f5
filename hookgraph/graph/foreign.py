# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What other tools store: tensors and settings by name, read without executing any of it."""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hookgraph.errors import LoadError


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
    readers: dict[str, Callable[[Path], object]] = {".safetensors": load_file, ".npz": _read_npz}
    try:
        content = readers.get(path.suffix, _read_torch)(path)
    except (OSError, SafetensorError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise LoadError(f"{path}: expected tensors in a {path.suffix} file, found: {error}") from error
    except pickle.UnpicklingError as error:
        raise LoadError(f"{path}: expected tensors, found something that could be code: {error}") from error
    if not isinstance(content, Mapping):
        raise LoadError(f"{path}: expected a dictionary of tensors, found a {type(content).__name__}")
    return Weights(path, cast("Mapping[str, Any]", content))


def _read_torch(path: Path) -> object:
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
