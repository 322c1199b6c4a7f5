"""The formats of dictionaries: which one a folder or file is of, and what its errors say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

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
