"""An index along one dimension, as a value and as text."""

import re
from collections.abc import Sequence
from typing import TypeAlias

from hookgraph.errors import LocationError
from hookgraph.ontology.dimensions import Dimension

Index: TypeAlias = int | slice | tuple[int, ...]
"""An index along one dimension: an int removes the axis, a slice or a tuple of ints keeps it."""

_INTEGER = re.compile(r"-?\d+", re.ASCII)


def print_slice(part: slice) -> str:
    """A slice as text: `2:5`."""
    text = ":".join("" if p is None else str(p) for p in (part.start, part.stop))
    return text if part.step is None else f"{text}:{part.step}"


def print_index(index: Index) -> str:
    """An index as text: `3`, `2:5`, `6,9`; a list of one is `6,`."""
    if isinstance(index, int):
        return str(index)
    if isinstance(index, slice):
        return print_slice(index)
    return f"{index[0]}," if len(index) == 1 else ",".join(map(str, index))


def _parse_integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):  # int() would take 1_0 and digits of other scripts, too
        raise ValueError(text)
    return int(text)


def parse_index(text: str, whole: str) -> int | slice | list[int]:
    """The index that `print_index` printed; `whole` is the text that it is a part of.

    Raises:
        LocationError: the text is no index.
    """
    try:
        if ":" in text:
            parts = [_parse_integer(p) if p else None for p in text.split(":")]
            if len(parts) > 3:
                raise ValueError(text)
            return slice(*parts)
        if "," in text:
            return [_parse_integer(p) for p in text.removesuffix(",").split(",")]
        return _parse_integer(text)
    except ValueError:
        raise LocationError(f"cannot parse {whole!r}: {text!r} is no index; write 3, 2:5 or 6,9") from None


def hash_of(key: int, index: Sequence[tuple[Dimension, Index]]) -> int:
    """A hash of an index and of what it is an index of; slices have none of their own."""
    try:
        return hash((key, *index))
    except TypeError:
        return hash((key, *((d, (i.start, i.stop, i.step) if isinstance(i, slice) else i) for d, i in index)))


def paired(dim: Dimension, column: Sequence[int]) -> list[tuple[Dimension, Index]]:
    """Each entry with its axis; those that are alike are one object, so that many take little memory."""
    pairs = {i: (dim, i) for i in set(column)}
    return [pairs[i] for i in column]
