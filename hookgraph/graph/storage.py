# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Results on disk: tensors in a safetensors file, everything else as JSON in its header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hookgraph.errors import LoadError, LocationError
from hookgraph.ontology.locations import Location

Tensors = Mapping[str, Shaped[Tensor, "..."]]


def write(path: str | Path, kind: str, tensors: Tensors, header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header. `kind` names what it is, and is checked on reading.

    Raises:
        LoadError: the folder does not exist, or the file cannot be written, with the reason.
    """
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise LoadError(
            f"cannot save a {kind} to {str(path)!r}: there is no folder {str(folder)!r}, make it first"
        )
    content = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(content, str(path), metadata={"kind": kind, "header": json.dumps(header)})
    except (OSError, SafetensorError) as error:
        raise LoadError(f"cannot save a {kind} to {str(path)!r}: {error}") from error


def read(path: str | Path, kind: str) -> tuple[dict[str, Shaped[Tensor, "..."]], dict[str, Any]]:
    """The tensors and the header that `write` wrote.

    Raises:
        LoadError: no such file, a file that is damaged, or one of another kind.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            about = cast("dict[str, str]", file.metadata() or {})
            names = cast("list[str]", list(file.keys()))
            tensors = {name: cast("Tensor", file.get_tensor(name)) for name in names}
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{path}: expected a {kind} saved by hookgraph, found: {error}") from error
    if about.get("kind") != kind:
        raise LoadError(
            f"{path}: expected a {kind} saved by hookgraph, found {about.get('kind', 'other tensors')!r}"
        )
    return tensors, json.loads(about["header"])


def parse(path: str | Path, name: str) -> Location:
    """The location that a file names.

    Raises:
        LoadError: its type is not declared.
    """
    try:
        return Location.parse(name)
    except LocationError as error:
        raise LoadError(f"{path} holds a location that is not declared here: {error}") from error
