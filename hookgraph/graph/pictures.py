"""Pictures among inputs that lie one after another on one axis: which patches are whose.

A table beside them has a row per picture: how many patches it has in time, height and width. Qwen-VL and its
kin are given pictures so, beside tokens that have a row per example.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Shaped
from torch import Tensor

from hookgraph.errors import InputError
from hookgraph.graph.abstract import Prepared

_TABLE: Final = "grid"
"""What the names of tables have in them."""
_FILM: Final = "video"
"""What the names of arguments have in them that hold films."""
_SIZES: Final = (2, 3)
"""How many sizes of a picture a table may tell."""
_AXES: Final = 2
"""How many axes a table has, and what lies packed at least."""


@final
@dataclass(frozen=True, slots=True)
class Packed:
    """An argument that lies packed, and the rows of its table.

    Args:
        table: the name of the table.
        pictures: how many rows each picture has of it, in order.
    """

    table: str
    pictures: tuple[int, ...]

    def examples(self, count: int) -> list[int]:
        """How many rows each of `count` examples has, which have as many pictures each.

        Raises:
            InputError: there are not as many of each.
        """
        if len(self.pictures) % count:
            raise InputError(
                f"{self.table} tells of {len(self.pictures)} pictures, which {count} examples cannot have "
                "as many of each: which belong to which is not known; run the examples one at a time"
            )
        each = len(self.pictures) // count
        return [sum(self.pictures[i * each : (i + 1) * each]) for i in range(count)]


def packed_in(inputs: Prepared) -> dict[str, Packed]:
    """The arguments that lie packed, each table among them, by name.

    Raises:
        InputError: several tables tell of as many patches, and their names do not say of which.
    """
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.ndim}
    tables = {name: x for name, x in tensors.items() if _is_table(name, x)}
    if not tables:
        return {}
    pictures = {name: tuple(map(int, x.prod(-1).cpu())) for name, x in tables.items()}
    found: dict[str, Packed] = {}
    for name, rows in tensors.items():
        counting = [t for t, sizes in pictures.items() if sum(sizes) == len(rows)]
        if rows.is_floating_point() and counting:
            table = _own_table(name, counting)
            found |= {name: Packed(table, pictures[table]), table: Packed(table, (1,) * len(pictures[table]))}
    return found


def _is_table(name: str, value: Tensor) -> bool:
    return (
        _TABLE in name and value.ndim == _AXES and value.shape[1] in _SIZES and not value.is_floating_point()
    )


def _own_table(name: str, tables: Sequence[str]) -> str:
    """The table of an argument: of several that fit the one that tells of films, or does not, as it does."""
    fitting = [x for x in tables if len(tables) == 1 or (_FILM in x) == (_FILM in name)]
    if len(fitting) != 1:
        raise InputError(
            f"{', '.join(tables)} fit {name} alike, so which of its patches are whose is not known"
        )
    return fitting[0]


def beside_pictures(packed: Mapping[str, Packed], inputs: Prepared, count: int | None) -> dict[str, Packed]:
    """What lies packed, and what else has a row per picture where these are not as many as the examples."""
    rows = {len(x.pictures): x.table for x in packed.values() if len(x.pictures) != count}
    others = {
        name: Packed(rows[len(x)], (1,) * len(x))
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.ndim and len(x) in rows and name not in packed
    }
    return {**packed, **others}


def packed_rows(inputs: Prepared) -> set[int]:
    """How many patches there are, all pictures taken together, of each kind."""
    return {sum(packed.pictures) for name, packed in packed_in(inputs).items() if name != packed.table}


def are_packed(inputs: Prepared) -> bool:
    """Whether there is nothing but pictures that lie packed, as vision towers by themselves take them."""
    packed = packed_in(inputs)
    others = (x for name, x in inputs.items() if name not in packed and isinstance(x, Tensor))
    return bool(packed) and all(x.ndim < _AXES for x in others)


def rearranged(
    packed: Packed, value: Shaped[Tensor, "..."], count: int, change: Callable[[Tensor, int], Tensor]
) -> Shaped[Tensor, "..."]:
    """An argument that lies packed, changed as `change` would the examples if they had an axis.

    Raises:
        InputError: some examples are to be chosen, and it is not known which pictures they have.
    """
    order = [int(i) for i in change(torch.arange(count), 0)]
    whole, rest = divmod(len(order), count)
    if not rest and order == [*range(count)] * whole:
        return torch.cat([value] * whole)
    parts = torch.split(value, packed.examples(count))
    return torch.cat([parts[i] for i in order])


def refuse_uneven(inputs: Mapping[str, object], count: int) -> None:
    """Refuse pictures that do not lie in one tensor with an axis for `count` examples.

    Raises:
        InputError: the examples have other numbers of patches.
    """
    for packed in packed_in(inputs).values():
        sizes = packed.examples(count)
        if len(set(sizes)) > 1:
            raise InputError(
                f"the pictures have {', '.join(map(str, sizes))} patches, by {packed.table}: locations have "
                "one axis for positions, so give each example as many patches"
            )
