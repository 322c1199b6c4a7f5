"""Data classes of the binding as JSON, and back, exactly.

What a field is follows from its annotation. Fields that have their default are left out, locations are
written as they print, one of several data classes is told by its name, and mappings without text for keys
are lists of pairs.
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Final, Literal, TypeAlias, Union, cast, get_args, get_origin, get_type_hints

from hookgraph.errors import LoadError
from hookgraph.ontology.locations import Location

Json: TypeAlias = bool | int | float | str | list[object] | dict[str, object] | None

_CLASS: Final = "is"
"""The key under which one of several data classes is named."""


def encode(value: object, hint: Any) -> Json:
    """A value as JSON, given how it is annotated."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Location):
        return str(value)
    if isinstance(value, Mapping):
        key_hint, item_hint = get_args(hint)
        pairs = [[encode(k, key_hint), encode(v, item_hint)] for k, v in value.items()]
        return {str(k): v for k, v in pairs} if key_hint is str else list[object](pairs)
    if isinstance(value, (tuple, list)):
        return [encode(x, h) for x, h in zip(value, _items(hint, len(value)), strict=True)]
    content: dict[str, object] = {_CLASS: type(value).__name__} if len(_classes(hint)) > 1 else {}
    for name, inner, default in _fields(type(value)):
        item = getattr(value, name)
        if default is MISSING or item != default:
            content[name] = encode(item, inner)
    return content


def decode(data: Any, hint: Any) -> Any:
    """The value that `encode` wrote.

    Raises:
        LoadError: the data are not what the annotation says.
    """
    origin = get_origin(hint)
    if origin is Literal:
        return _expect(data in get_args(hint), data, hint)
    if origin in (Union, types.UnionType):
        return _decode_one_of(data, hint)
    if hint is Location:
        _expect(isinstance(data, str), data, hint)
        return Location.parse(data)
    if is_dataclass(hint):
        return _decode_class(data, cast(type, hint))
    if origin in (tuple, list):
        _expect(isinstance(data, list), data, hint)
        items = [decode(x, h) for x, h in zip(data, _items(hint, len(data)), strict=True)]
        return tuple(items) if origin is tuple else items
    if origin is not None:
        return _decode_mapping(data, hint)
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    kind = type(None) if hint is None else hint
    return _expect(type(data) is kind, data, hint)


def _decode_one_of(data: Any, hint: Any) -> Any:
    if isinstance(data, dict):
        classes: dict[object, type] = {c.__name__: c for c in _classes(hint)}
        name = data.get(_CLASS) if len(classes) > 1 else next(iter(classes), None)
        _expect(name in classes, data, hint)
        return _decode_class({k: v for k, v in data.items() if k != _CLASS}, classes[name])
    for option in get_args(hint):
        if not is_dataclass(option) or option is Location:
            try:
                return decode(data, option)
            except LoadError:
                continue
    return _expect(False, data, hint)


def _decode_class(data: Any, kind: type) -> Any:
    _expect(isinstance(data, dict), data, kind)
    known = {name: hint for name, hint, _ in _fields(kind)}
    needed = {name for name, _, default in _fields(kind) if default is MISSING}
    if not needed <= data.keys() <= known.keys():
        odd = sorted(needed - data.keys()) or sorted(data.keys() - known.keys())
        what = "lacks" if needed - data.keys() else "has unknown"
        raise LoadError(f"{kind.__name__} {what} {', '.join(map(str, odd))}; its fields: {', '.join(known)}")
    return kind(**{name: decode(item, known[name]) for name, item in data.items()})


def _decode_mapping(data: Any, hint: Any) -> dict[Any, Any]:
    key_hint, item_hint = get_args(hint)
    if key_hint is str:
        _expect(isinstance(data, dict), data, hint)
        return {k: decode(v, item_hint) for k, v in data.items()}
    _expect(isinstance(data, list) and all(isinstance(p, list) and len(p) == 2 for p in data), data, hint)
    return {decode(k, key_hint): decode(v, item_hint) for k, v in data}


def _expect(holds: bool, data: Any, hint: Any) -> Any:
    if not holds:
        raise LoadError(f"expected {getattr(hint, '__name__', hint)}, found {str(data)[:60]!r}")
    return data


def _items(hint: Any, count: int) -> tuple[Any, ...]:
    """The annotation of each element of a tuple or a list."""
    inner = get_args(hint)
    each = get_origin(hint) is list or inner[1:] == (...,)
    if not each and len(inner) != count:
        raise LoadError(f"expected {len(inner)} elements, found {count}")
    return inner[:1] * count if each else inner


@cache
def _classes(hint: Any) -> tuple[type, ...]:
    """The data classes that a value may be of."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(x for x in options if isinstance(x, type) and is_dataclass(x) and x is not Location)


@cache
def _fields(kind: type) -> tuple[tuple[str, Any, object], ...]:
    """(name, annotation, default) of what a data class is made from."""
    hints = get_type_hints(kind)
    found: list[tuple[str, Any, object]] = []
    for item in fields(kind):
        if item.init:
            made = item.default_factory
            default = item.default if made is MISSING else made()
            found.append((item.name, hints[item.name], default))
    return tuple(found)
