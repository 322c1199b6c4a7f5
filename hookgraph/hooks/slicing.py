"""Named index -> tensor index: read a part of an activation, write one back."""

from functools import lru_cache

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from hookgraph.errors import LocationError
from hookgraph.ontology.locations import Location


def read(location: Location, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The part of `value` that `location` names; a view where every index is an int or a slice.

    Several lists select their outer product, whatever axes lie between them.

    Raises:
        LocationError: `value` has other axes than the location, or an index is out of range.
    """
    if not location.index:
        return value
    view, lists = _basic(location, value)
    for axis, chosen in lists:
        view = view.index_select(axis, chosen)
    return view


def relative(location: Location, given: Location) -> Location:
    """`location` in the coordinates of `given`: a part of the same activation, by lists, that holds it.

    Raises:
        LocationError: `given` does not hold all of `location`.
    """
    chosen = dict(location.index)
    for dim, held in given.index:
        part = chosen.get(dim)
        asked = (part,) if isinstance(part, int) else part
        if not isinstance(held, tuple) or not isinstance(asked, tuple) or not set(asked) <= set(held):
            raise LocationError(f"{location} was asked for, and only {given} was handed over")
        place = {index: i for i, index in enumerate(held)}
        chosen[dim] = place[part] if isinstance(part, int) else tuple(place[i] for i in asked)
    return location if not given.index else location.at(**{d.value: i for d, i in chosen.items()})


def write(
    location: Location, value: Shaped[Tensor, "..."], part: Shaped[Tensor, "..."]
) -> Shaped[Tensor, "..."]:
    """A copy of `value` in which the part that `location` names is `part`; differentiable in both.

    Raises:
        LocationError: as for `read`.
    """
    if not location.index:
        return part
    result = value.clone()
    view, lists = _basic(location, result)
    view.copy_(_write_lists(view, lists, part))
    return result


def _write_lists(view: Tensor, lists: list[tuple[int, Int[Tensor, "..."]]], part: Tensor) -> Tensor:
    if not lists:
        return part
    (axis, chosen), rest = lists[0], lists[1:]
    inner = _write_lists(view.index_select(axis, chosen), rest, part) if rest else part
    return view.index_copy(axis, chosen, inner)


def _basic(location: Location, value: Tensor) -> tuple[Tensor, list[tuple[int, Int[Tensor, "..."]]]]:
    """The view by ints and slices, and what lists remain, as axes of that view."""
    dims = location.type.dims
    if len(dims) != value.ndim:
        raise LocationError(
            f"{location}: the tensor has shape {tuple(value.shape)}, the location the axes {' '.join(dims)}"
        )
    chosen = dict(location.index)
    basic: list[int | slice] = []
    lists: list[tuple[int, Int[Tensor, "..."]]] = []
    axis = 0
    for dim, size in zip(dims, value.shape, strict=True):
        part = chosen.get(dim, slice(None))
        asked = part if isinstance(part, tuple) else (part,) if isinstance(part, int) else ()
        if any(not -size <= i < size for i in asked):
            raise LocationError(
                f"{location}: {dim}={','.join(map(str, asked))} is out of range, {dim} has size {size}"
            )
        if isinstance(part, tuple):
            lists.append((axis, _positions(part, size, value.device)))
            basic.append(slice(None))
        else:
            basic.append(part)
        axis += not isinstance(part, int)
    return value[tuple(basic)], lists


@lru_cache(maxsize=1024)
def _positions(chosen: tuple[int, ...], size: int, device: torch.device) -> Int[Tensor, "..."]:
    return torch.tensor([i % size for i in chosen], device=device)
