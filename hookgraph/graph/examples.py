"""Prepared inputs by their examples: how many there are, some of them, all of them several times."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, cast

from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map

from hookgraph.errors import InputError
from hookgraph.graph.abstract import OfExamples, Prepared
from hookgraph.graph.pictures import beside_pictures, packed_in, rearranged

_TOKENS: Final = ("input_ids", "inputs_embeds")
"""Arguments with a row per example, whatever stands before them."""


def count_examples(inputs: Prepared) -> int | None:
    """How many examples there are, by the tokens or else the first tensor; None where there is none.

    Of pictures that lie packed, the table tells, if there is nothing beside them.
    """
    tokens = next((v for k in _TOKENS if isinstance(v := inputs.get(k), Tensor) and v.ndim), None)
    if tokens is not None:
        return len(tokens)
    packed = packed_in(inputs)
    apart = {name: v for name, v in inputs.items() if name not in packed}
    pictures = (len(x.pictures) for x in packed.values())
    return next((len(v) for v in tensors_in(apart) if v.ndim), next(pictures, None))


def batch_size(inputs: Prepared) -> int:
    """How many examples an earlier run had.

    Raises:
        InputError: it holds no inputs.
    """
    found = count_examples(inputs)
    if found is None:
        raise InputError("this run holds no inputs, as when it was loaded from a file: run them again")
    return found


def rows_of(inputs: Prepared, chosen: slice | Int[Tensor, " batch"], count: int) -> Prepared:
    """Some of `count` examples, in an order."""
    return changed_rows(inputs, count, partial(_chosen, chosen), partial(_own_rows, chosen))


def changed_rows(
    inputs: Prepared,
    count: int | None,
    change: Callable[[Tensor, int], Tensor],
    divides: Callable[[OfExamples], object],
) -> dict[str, object]:
    """Inputs of which everything is changed that has a row for each of `count` examples, or several.

    Args:
        inputs: prepared inputs.
        count: how many examples there are.
        change: a tensor and the axis of its examples -> another tensor.
        divides: what divides itself -> what takes its place.
    """
    packed = beside_pictures(packed_in(inputs), inputs, count) if count else {}
    result: dict[str, object] = {}
    for name, value in inputs.items():
        if count and name in packed and isinstance(value, Tensor):
            result[name] = rearranged(packed[name], value, count, change)
        else:
            rows = partial(_changed_rows, name, count, change, divides)
            result[name] = tree_map(rows, value, is_leaf=_is_leaf)
    return result


def _changed_rows(
    name: str,
    count: int | None,
    change: Callable[[Tensor, int], Tensor],
    divides: Callable[[OfExamples], object],
    value: object,
) -> object:
    if isinstance(value, Tensor):
        axis = rows_axis(name, value, count)
        return value if axis is None else change(value, axis)
    return divides(value) if isinstance(value, OfExamples) else value


def rows_axis(name: str, value: Shaped[Tensor, "..."], count: int | None) -> int | None:
    """The axis of a tensor that `count` examples lie on, if there is one: the first.

    Positions in time and space (Qwen-VL) have an axis for these before it, which may be as long as the batch.
    """
    spatial = name == "position_ids" and value.ndim == 3 and value.shape[1] == count
    axis = 1 if spatial else 0
    return axis if value.ndim and value.shape[axis] == count else None


def _chosen(chosen: slice | Int[Tensor, " batch"], value: Tensor, axis: int) -> Tensor:
    return value[(slice(None),) * axis + (chosen,)]


def _own_rows(chosen: slice | Int[Tensor, " batch"], value: OfExamples) -> object:
    return value.rows(chosen)


def changed(inputs: Prepared, change: Callable[[object], object]) -> dict[str, object]:
    """Inputs of which everything is changed that is no container: tensors in dicts (masks by kind of layer),
    in tuples, lists and the outputs of an encoder, too.
    """
    return {name: tree_map(change, v, is_leaf=_is_leaf) for name, v in inputs.items()}


def tensors_in(inputs: Prepared) -> Iterator[Tensor]:
    """The tensors among inputs, those in containers as well: first of all those that are in none."""
    apart = [v for v in inputs.values() if isinstance(v, Tensor)]
    yield from apart
    for value in inputs.values():
        if not isinstance(value, Tensor):
            yield from (x for x in tree_iter(value, is_leaf=_is_leaf) if isinstance(x, Tensor))


def has_features(inputs: Prepared) -> bool:
    """Whether pictures or sounds are given, which a stack beside that of the tokens reads."""
    given = (v for name, v in inputs.items() if not name.endswith(("mask", "embeds")))
    shaped = any(isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 2 for v in given)
    return shaped or bool(packed_in(inputs))


def named_tensors(inputs: Prepared) -> dict[str, Tensor]:
    """The tensors among inputs by name, as `encoder_outputs.last_hidden_state`."""
    found: dict[str, Tensor] = {}
    for name, value in inputs.items():
        inner: Mapping[str, object] = {}
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, Mapping):
            inner = cast("Mapping[str, object]", value)
        elif isinstance(value, list | tuple):
            inner = {str(i): v for i, v in enumerate(cast("Sequence[object]", value))}
        found |= {f"{name}.{k}": v for k, v in named_tensors(inner).items()}
    return found


def _is_leaf(value: object) -> bool:
    """What divides itself: what a cache holds."""
    return isinstance(value, OfExamples)
