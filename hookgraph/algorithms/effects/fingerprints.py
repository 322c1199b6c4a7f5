"""Short names of contents: whether the work that is taken up again is the work that was begun."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import cast, final

import numpy as np
import torch
from torch import Tensor, nn

from hookgraph.graph.abstract import AbstractBinding
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location

_LENGTH = 16
_EXACT = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, slice)


def fingerprint(value: object) -> str:
    """A short name of what a value holds, the same in another process.

    Tensors, modules and dataclasses are told by type and contents; functions by name, code and the values
    that they close over; models by name, revision, class, dtype and fingerprint; objects of other kinds by
    their type alone.
    """
    found = _Contents()
    found.add(value)
    return found.name


def parts_of(graph: HookGraph) -> Mapping[str, Sequence[Sequence[str]]]:
    """What a graph adds to its model: the location and a name of each hook, and the same of subgraphs."""
    return {
        "hooks": [[str(place), fingerprint(hook)] for place, hook in graph.registrations],
        "subgraphs": [
            [subgraph.name, *map(str, subgraph.sites), fingerprint(subgraph)] for subgraph in graph.subgraphs
        ],
    }


@final
class _Contents:
    """A hash to which values are added, each with its type."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._within: list[object] = []

    @property
    def name(self) -> str:
        """Of everything added so far."""
        return self._hash.hexdigest()[:_LENGTH]

    def add(self, value: object) -> None:
        """Add a value and, once each, what it holds."""
        if isinstance(value, Tensor):
            self._tensor(value)
            return
        self._note(_type_of(value))
        if isinstance(value, _EXACT):
            self._note(repr(value))
        elif isinstance(value, Location):
            self._note(str(value))
        elif not any(value is x for x in self._within):  # a function may close over itself
            self._within.append(value)
            self._every(_held(value))
            self._within.pop()

    def _every(self, values: Iterable[object]) -> None:
        for value in values:
            self.add(value)
        self._note("end")

    def _tensor(self, value: Tensor) -> None:
        self._note(f"tensor {tuple(value.shape)} {value.dtype}")
        if value.device.type != "meta":
            self._hash.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())

    def _note(self, text: str) -> None:
        self._hash.update(f"{len(text)}:{text}".encode())


def _held(value: object) -> Iterable[object]:
    """What tells a value from others of its type."""
    match value:
        case Mapping():
            named = {str(k): v for k, v in cast("Mapping[object, object]", value).items()}
            return [(name, named[name]) for name in sorted(named)]
        case Set():
            return sorted(map(str, cast("Set[object]", value)))
        case Sequence():
            return cast("Sequence[object]", value)
        case np.ndarray() | np.generic():
            return [value.tolist()]
        case nn.Module():
            return [dict(value.state_dict())]
        case AbstractBinding():
            return [dict(value.metadata), value.fingerprint]
        case partial():
            return [value.func, value.args, value.keywords]
        case MethodType():
            return [value.__func__, value.__self__]
        case FunctionType():
            cells = value.__closure__ or ()
            return [value.__qualname__, value.__code__, value.__defaults__, *map(_content, cells)]
        case CodeType():
            return [value.co_code, value.co_names, value.co_consts]
        case _ if is_dataclass(value) and not isinstance(value, type):
            return [getattr(value, field.name) for field in fields(value)]
        case _:
            return [getattr(value, "__qualname__", "")]


def _content(cell: object) -> object:
    try:
        return getattr(cell, "cell_contents", None)
    except ValueError:  # not filled yet
        return None


def _type_of(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
