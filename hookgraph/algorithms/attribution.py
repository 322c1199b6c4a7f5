"""`Attribution`: a number for every node of some locations, with named axes and an algebra."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hookgraph.algorithms.arguments import whole_number
from hookgraph.algorithms.parts import index_columns, part_of, parts_of
from hookgraph.algorithms.ranking import Node, Ranking
from hookgraph.errors import HookGraphError, LocationError, nearest
from hookgraph.graph.storage import Tensors
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import pandas

Number: TypeAlias = float | int

_SPARSE = 0.25
"""Tensors with a smaller share of numbers other than zero are stored as indices and values."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Mapping[Location, Tensor]):
    """A number for every node of some locations: latents and errors, heads, neurons, positions.

    Arithmetic and comparisons, `==` too, are by location, with another attribution of the very same
    locations and axes, or with a number. Nothing is dropped and nothing broadcast: what does not match is an
    error.

    >>> from hookgraph.locations import ATTN_Z
    >>> effect = Attribution({ATTN_Z[0]: torch.tensor([[[[1.0, -3.0]]]])})
    >>> (abs(effect) > 2).nonzero()
    (Location('attn.z[0]@batch=0;d_head=1;head=0;pos=0'),)

    Args:
        values: by location, over its axes less those that were reduced.
        reduced: what was done to an axis that is gone: `sum` or `mean`.
    """

    values_by_location: Mapping[Location, Shaped[Tensor, "..."]]
    reduced: Mapping[Dimension, str] = field(default_factory=dict[Dimension, str])

    def __getitem__(self, location: Location) -> Shaped[Tensor, "..."]:
        if not isinstance(location, Location):  # pyright: ignore[reportUnnecessaryIsInstance] (users)
            raise LocationError(
                f"effects are by Location, and {location!r} is {type(location).__name__}: use "
                f"Location.parse({str(location)!r})"
            )
        found = self.values_by_location.get(location)
        if found is None:
            near = nearest(str(location), map(str, self))
            raise LocationError(f"nothing was attributed to {location}: {near}")
        return found

    def __contains__(self, location: object) -> bool:
        return location in self.values_by_location

    def __iter__(self) -> Iterator[Location]:
        return iter(self.values_by_location)

    def __len__(self) -> int:
        return len(self.values_by_location)

    def dims(self, location: Location) -> tuple[Dimension, ...]:
        """The axes that the numbers at a location still have."""
        return tuple(d for d in location.dims if d not in self.reduced)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Attribution":
        """Another attribution of the same shape, made location by location."""
        return replace(self, values_by_location={k: change(v) for k, v in self.items()})

    def sum(self, *dims: str) -> "Attribution":
        """Summed over axes, by name: `.sum("pos", "d_head")`."""
        return self._reduce("sum", dims)

    def mean(self, *dims: str) -> "Attribution":
        """Averaged over axes, by name: `.mean("batch")`."""
        return self._reduce("mean", dims)

    def _reduce(self, how: str, dims: Sequence[str]) -> "Attribution":
        known = {d for location in self for d in self.dims(location)}
        for dim in dims:
            if not isinstance(dim, str):  # pyright: ignore[reportUnnecessaryIsInstance] (users)
                raise LocationError(f"name axes one by one, as in .{how}('pos', 'd_head'), not as {dim!r}")
            if dim not in known:
                raise LocationError(f"these effects have no axis {dim!r}: {nearest(dim, known)}")
        chosen = [Dimension(d) for d in dims]
        values: dict[Location, Tensor] = {}
        for location, value in self.items():
            axes = [i for i, d in enumerate(self.dims(location)) if d in chosen]
            if axes and how == "mean" and not value.is_floating_point():
                value = value.to(torch.get_default_dtype())  # of a mask, the share of nodes where it holds
            reduce = torch.sum if how == "sum" else torch.mean
            values[location] = reduce(value, dim=axes) if axes else value
        return Attribution(values, {**self.reduced, **dict.fromkeys(chosen, how)})

    def __add__(self, other: "Attribution | Number") -> "Attribution":
        return self._with(other, operator.add)

    def __radd__(self, other: Number) -> "Attribution":
        return self._with(other, operator.add)

    def __sub__(self, other: "Attribution | Number") -> "Attribution":
        if self.is_mask and isinstance(other, Attribution) and other.is_mask:
            raise HookGraphError("masks have no difference: those nodes of one without the other are a & ~b")
        return self._with(other, operator.sub)

    def __rsub__(self, other: Number) -> "Attribution":
        return self._with(other, lambda value, number: number - value)

    def __mul__(self, other: "Attribution | Number") -> "Attribution":
        return self._with(other, operator.mul)

    def __rmul__(self, other: Number) -> "Attribution":
        return self._with(other, operator.mul)

    def __truediv__(self, other: "Attribution | Number") -> "Attribution":
        return self._with(other, operator.truediv)

    def __rtruediv__(self, other: Number) -> "Attribution":
        return self._with(other, lambda value, number: number / value)

    def __neg__(self) -> "Attribution":
        if self.is_mask:
            raise HookGraphError("a mask has no negative: the other nodes are ~mask")
        return self.map(torch.neg)

    def __abs__(self) -> "Attribution":
        return self.map(torch.abs)

    def __gt__(self, other: "Attribution | Number") -> "Attribution":
        return self._with(other, operator.gt)

    def __ge__(self, other: "Attribution | Number") -> "Attribution":
        return self._with(other, operator.ge)

    def __lt__(self, other: "Attribution | Number") -> "Attribution":
        return self._with(other, operator.lt)

    def __le__(self, other: "Attribution | Number") -> "Attribution":
        return self._with(other, operator.le)

    def __eq__(self, other: object) -> "Attribution":  # pyright: ignore[reportIncompatibleMethodOverride] (as tensors do)
        known = isinstance(other, Attribution | int | float)
        return self._with(other, operator.eq) if known else NotImplemented

    def __ne__(self, other: object) -> "Attribution":  # pyright: ignore[reportIncompatibleMethodOverride]
        known = isinstance(other, Attribution | int | float)
        return self._with(other, operator.ne) if known else NotImplemented

    __hash__ = None  # pyright: ignore[reportAssignmentType] (as of any mapping)

    def __bool__(self) -> bool:
        """Whether there are locations.

        Raises:
            HookGraphError: it is a mask, which holds at some nodes and not at others.
        """
        if self.is_mask:
            raise HookGraphError(
                "a mask is neither true nor false: `.count()` says at how many nodes it holds, and "
                "`(~mask).count() == 0` whether at all of them"
            )
        return len(self) > 0

    def __and__(self, other: "Attribution") -> "Attribution":
        _check_masks("&", self, other)
        return self._with(other, operator.and_)

    def __or__(self, other: "Attribution") -> "Attribution":
        _check_masks("|", self, other)
        return self._with(other, operator.or_)

    def __invert__(self) -> "Attribution":
        _check_masks("~", self)
        return self.map(torch.logical_not)

    @property
    def is_mask(self) -> bool:
        """Whether it says where something holds, as comparisons do."""
        return len(self) > 0 and all(v.dtype == torch.bool for v in self.values())

    def where(self, mask: "Attribution") -> "Attribution":
        """These numbers where a mask holds, zero elsewhere: `effect.where(abs(effect) > 0.1)`."""
        _check_masks("where", mask)
        return self._with(mask, lambda value, chosen: torch.where(chosen, value, torch.zeros_like(value)))

    def dot(self, other: "Attribution") -> Float[Tensor, "..."]:
        """Σ over all locations and nodes of the products: per example if there is a batch axis, 0 of none."""
        products = self * other
        per_example = all(products.dims(x)[:1] == (Dimension.BATCH,) for x in products)
        parts = [v.reshape(len(v), -1).sum(1) if per_example else v.sum() for v in products.values()]
        return torch.stack(parts).sum(0) if parts else torch.zeros(())

    def norm(self) -> Float[Tensor, "..."]:
        """The Euclidean norm over all locations and nodes: per example if there is a batch axis."""
        return self.dot(self).sqrt()

    def _with(self, other: "Attribution | Number", combine: Callable[..., Any]) -> "Attribution":
        if not isinstance(other, Attribution):
            number = _number(other)
            return self.map(lambda value: combine(value, number))
        lacking = [str(x) for x in (*self, *other) if x not in self or x not in other]
        if lacking:
            raise HookGraphError(
                f"only one of the two attributions has {', '.join(lacking[:4])}: compare the same locations"
            )
        if dict(self.reduced) != dict(other.reduced):
            raise HookGraphError(
                f"the axes of the two attributions differ: {_told(self.reduced)} against "
                f"{_told(other.reduced)}; reduce both alike"
            )
        for location in self:
            if self[location].shape != other[location].shape:
                shapes = f"{tuple(self[location].shape)} and {tuple(other[location].shape)}"
                raise HookGraphError(f"{location}: the shapes {shapes} differ")
        return self.__class__({k: combine(v, other[k]) for k, v in self.items()}, self.reduced)

    def nonzero(self) -> tuple[Location, ...]:
        """The nodes whose number is not zero (or, of a comparison, where it holds), as parts of locations."""
        found: list[Location] = []
        for location, value in self.items():
            found += parts_of(location, self.dims(location), value.shape, value.nonzero())
        return tuple(found)

    def count(self) -> int:
        """How many nodes there are whose number is not zero."""
        return sum(int(v.count_nonzero()) for v in self.values())

    def nodes(self) -> Iterator[Node]:
        """Every node: each location, indexed along the axes that are left."""
        for location, value in self.items():
            points = torch.ones_like(value, dtype=torch.bool).nonzero()
            parts = parts_of(location, self.dims(location), value.shape, points)
            yield from map(Node, parts, value.flatten().tolist())

    def top(self, k: int = 10) -> Ranking:
        """The k nodes with the largest |number|. Reduce axes first to say what a node is.

        Raises:
            HookGraphError: k is no number of nodes.
        """
        k = whole_number("k", k, least=0)
        ranked: list[tuple[float, Location, int]] = []
        for location, value in self.items():
            flat = value.flatten().to(torch.uint8) if value.dtype == torch.bool else value.flatten()
            best = flat.abs().topk(min(k, flat.numel())).indices.tolist()
            ranked += [(float(flat[place]), location, place) for place in best]
        ranked.sort(key=lambda item: -abs(item[0]))
        return Ranking(
            tuple(
                Node(
                    self._node(loc, [int(i) for i in torch.unravel_index(torch.tensor(at), self[loc].shape)]),
                    number,
                )
                for number, loc, at in ranked[:k]
            )
        )

    def to_frame(self) -> "pandas.DataFrame":
        """One row per node: location, its indices, and the number."""
        import pandas as pd

        tables: list[pd.DataFrame] = []
        for location, value in ((x, v) for x, v in self.items() if v.numel()):
            indices = index_columns(location, self.dims(location), value.shape)
            numbers = value.detach().cpu().flatten()
            effect = (numbers.double() if numbers.is_floating_point() else numbers).numpy()
            name = [str(location.whole)] * len(numbers)
            tables.append(pd.DataFrame({"location": name, **indices, "effect": effect}))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def _nth(self, location: Location, number: int) -> Location:
        """The node of the n-th number at a location."""
        place = torch.unravel_index(torch.tensor(number), self[location].shape)
        return self._node(location, [int(i) for i in place])

    def _node(self, location: Location, place: Sequence[int]) -> Location:
        dims = self.dims(location)
        index = {d: i for d, i in zip(dims, place, strict=True) if d not in location.type.joint}
        return part_of(location, index, dict(zip(dims, self[location].shape, strict=True)))

    def __repr__(self) -> str:
        lines = [f"Attribution over {len(self)} locations, {self.count()} nodes other than zero"]
        lines += [
            f"  {k}: {' '.join(self.dims(k)) or 'one number'} {tuple(v.shape)}" for k, v in self.items()
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        if not self.is_mask:
            return self.top(20).to_html()
        held, nodes = self.count(), sum(v.numel() for v in self.values())
        shown = self.top(min(20, held)).to_html()
        return f"<p>mask over {len(self)} locations, holds at {held} of {nodes} nodes</p>{shown}"

    def pack(self, prefix: str) -> tuple[dict[str, Shaped[Tensor, "..."]], list[str]]:
        """Tensors to store, those with few numbers other than zero as indices and values; and the order."""
        tensors: dict[str, Tensor] = {}
        for location, value in self.items():
            name = f"{prefix}/{location}"
            if value.is_floating_point() and value.count_nonzero() < _SPARSE * value.numel():
                indices = value.nonzero().mT
                tensors[f"{name}#indices"], tensors[f"{name}#values"] = indices, value[tuple(indices)]
                tensors[f"{name}#shape"] = torch.tensor(value.shape)
            else:
                tensors[name] = value
        return tensors, [str(x) for x in self]

    @staticmethod
    def unpack(
        tensors: Tensors, prefix: str, order: Sequence[str], reduced: Mapping[Dimension, str]
    ) -> "Attribution":
        """What `pack` stored."""
        values: dict[Location, Tensor] = {}
        for text in order:
            name = f"{prefix}/{text}"
            if name in tensors:
                values[Location.parse(text)] = tensors[name]
                continue
            indices, kept, shape = (tensors[f"{name}#{part}"] for part in ("indices", "values", "shape"))
            whole = kept.new_zeros(shape.tolist())
            whole[tuple(indices)] = kept
            values[Location.parse(text)] = whole
        return Attribution(values, reduced)


Values: TypeAlias = Mapping[Location, Shaped[Tensor, "..."]]


def _told(reduced: Mapping[Dimension, str]) -> str:
    return ", ".join(f"{how} over {dim}" for dim, how in reduced.items()) or "nothing reduced"


def _number(value: object) -> Number:
    """What all numbers of an attribution may be combined with.

    Raises:
        HookGraphError: it is not one number.
    """
    if isinstance(value, int | float):
        return value
    shape = tuple(getattr(value, "shape", (None,)))
    item = getattr(value, "item", None)
    if shape or item is None:
        told = f"{type(value).__name__} of shape {shape}" if item else type(value).__name__
        raise HookGraphError(
            f"an attribution is combined with another of the same locations, or with one number, not with "
            f"{told}: nothing is broadcast; `.map` changes the numbers of each location"
        )
    return item()


def _check_masks(what: str, *masks: object) -> None:
    """Refuse numbers where masks are combined or used.

    Raises:
        HookGraphError: one of them is no mask.
    """
    for mask in masks:
        if not isinstance(mask, Attribution) or (len(mask) and not mask.is_mask):
            raise HookGraphError(f"{what} takes a mask, such as `abs(effect) > 0.1`, not numbers")
