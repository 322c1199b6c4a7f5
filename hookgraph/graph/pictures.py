"""Pictures among inputs that lie one after another on one axis: which patches are whose.

A table beside them has a row per picture: how many patches it has in time, height and width. Qwen-VL and its
kin are given pictures so, beside tokens that have a row per example.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Shaped
from torch import Tensor

from hookgraph.errors import InputError
from hookgraph.graph.abstract import Prepared

_TABLE: Final = "grid"
"""What the names of tables have in them."""
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
    """The arguments that lie packed, each table among them, by name."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.ndim}
    found: dict[str, Packed] = {}
    for name, table in tensors.items():
        if _TABLE not in name or table.ndim != _AXES or table.shape[1] not in _SIZES:
            continue
        patches = tuple(int(x) for x in table.prod(-1))
        rows = {k: x for k, x in tensors.items() if x.is_floating_point() and len(x) == sum(patches)}
        if rows:
            found |= {k: Packed(name, patches) for k in rows} | {name: Packed(name, (1,) * len(patches))}
    return found


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
