"""`LocationType` and `Location`: values that name a tensor of a model, or a part of it."""

import dataclasses
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, SupportsIndex, cast, final, overload

from hookgraph.errors import LocationError, SubgraphError, nearest
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.indices import Index, hash_of, paired, parse_index, print_index, print_slice
from hookgraph.ontology.passes import PassType

STACKS: Final[tuple[str, ...]] = ("vision", "stem", "encoder", "decoder")
"""The stacks of layers of a model, in the order in which they run."""

MAIN_STACK: Final = "decoder"
"""The stack whose name is left out when a location is printed."""

_NAME = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*")
_LOCATION = re.compile(
    r"(?P<name>[A-Za-z_][\w.]*?)(\[(?P<layer>-?\d+)\])?(?P<grad>\.grad)?(@(?P<index>[^/]*))?", re.ASCII
)
_declared: dict[str, "LocationType"] = {}
_reserved: dict[str, "LocationType"] = {}


@final
@dataclass(frozen=True, slots=True)
class LocationType:
    """A kind of activation: `RESID_POST`, `ATTN_Z`, or one of your own.

    Declaring a type makes its name parseable; declaring it again replaces the former one, unless that is
    one of the standard vocabulary.

    Args:
        name: dotted lower-case name, such as `attn.z`.
        dims: the axes of the tensor, in order.
        stage: place in the causal order within a layer: a smaller stage comes before a larger one;
            two types of one stage do not depend on each other.
        layered: whether there is one such location per layer. A type without layers and with a
            negative stage comes before all layers of its stack, otherwise after them.
        stack: which stack of layers it belongs to.
        joint: axes along which the values are one node of an analysis, not one each: an error is a whole
            vector per position.

    Raises:
        LocationError: a malformed name, or one of the standard vocabulary for something else, an unknown
            stack, repeated dimensions, or a joint one it lacks.
    """

    name: str
    dims: tuple[Dimension, ...]
    stage: int
    layered: bool = True
    stack: str = MAIN_STACK
    joint: tuple[Dimension, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name.endswith(".grad"):
            raise LocationError(
                f"{self.name!r} cannot name a location type: use dotted lower-case words such as "
                "'attn.z', not ending in '.grad'"
            )
        if self.stack not in STACKS:
            raise LocationError(f"unknown stack {self.stack!r}: {nearest(self.stack, STACKS)}")
        if len(set(self.dims)) != len(self.dims):
            raise LocationError(f"{self.name} repeats a dimension: {' '.join(self.dims)}")
        if not set(self.joint) <= set(self.dims):
            raise LocationError(f"{self.name} has no {' '.join(self.joint)} to be joint along")
        standard = _reserved.get(self.qualified_name, self)
        if standard != self:
            raise LocationError(
                f"{self.qualified_name} is a location type of the standard vocabulary, with the axes "
                f"{' '.join(standard.dims)} at stage {standard.stage}: give yours another name, such as "
                f"'my.{self.name}'"
            )
        _declared[self.qualified_name] = self

    def __hash__(self) -> int:
        return hash((self.name, self.stack))

    @property
    def qualified_name(self) -> str:
        """The name, with the stack before it unless it is the decoder: `encoder.attn.z`."""
        return self.name if self.stack == MAIN_STACK else f"{self.stack}.{self.name}"

    @overload
    def __getitem__(self, layer: SupportsIndex) -> "Location": ...
    @overload
    def __getitem__(self, layer: slice | Sequence[int]) -> "tuple[Location, ...]": ...
    def __getitem__(
        self, layer: SupportsIndex | slice | Iterable[SupportsIndex]
    ) -> "Location | tuple[Location, ...]":
        """`RESID_POST[6]` is a location; `RESID_POST[2:5]` and `RESID_POST[[0, 3]]` are tuples."""
        if isinstance(layer, slice):
            if layer.stop is None or layer.stop < 0 or (layer.start or 0) < 0:
                raise LocationError(
                    f"{self.qualified_name}[{print_slice(layer)}] needs the number of layers: "
                    "give a stop that is not negative, or use graph.every(...), which knows the model"
                )
            return tuple(Location(self, i) for i in range(layer.stop)[layer])
        try:
            if isinstance(layer, SupportsIndex) and not getattr(layer, "ndim", 0):
                return Location(self, _integer(layer))
            return tuple(Location(self, _integer(i)) for i in cast("Iterable[SupportsIndex]", layer))
        except TypeError:
            raise LocationError(
                f"{self.qualified_name}[{layer!r}]: a layer is an int, a slice or a list of ints"
            ) from None

    def __iter__(self) -> Iterator["Location"]:
        """A type does not know how many layers a model has.

        Raises:
            LocationError: always; without this method Python would count layers without end.
        """
        raise LocationError(
            f"{self.qualified_name} is a kind of location, in as many layers as a model has: "
            f"use graph.every(...), or one layer, as in {self.qualified_name}[0]"
        )

    def __contains__(self, location: object) -> bool:
        """Whether a location is of this type."""
        return isinstance(location, Location) and location.type == self

    def __call__(self) -> "Location":
        """The location of a type without layers."""
        return Location(self)

    def __str__(self) -> str:
        return self.qualified_name


@final
@dataclass(frozen=True, slots=True, repr=False)
class Location:
    """One tensor of a model, or a part of it, in the forward or the backward pass.

    Prints and parses: `attn.z[9]@head=6,9;pos=-1`, `mlp.out[8]/sae/latents.grad`.

    Args:
        type: what kind of activation.
        layer: which layer, counted from 0; None for types without layers and inside subgraphs.
        site: the location at which the subgraph that owns this one is injected, or None.
        subgraph: the name of that subgraph.
        pass_type: the activation, or its gradient.
        index: the part, as pairs of dimension and index sorted by dimension; see `at`.
    """

    type: LocationType
    layer: int | None = None
    site: "Location | None" = None
    subgraph: str = ""
    pass_type: PassType = PassType.FORWARD
    index: tuple[tuple[Dimension, Index], ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "_hash", hash_of(_key(self), self.index))

    def __hash__(self) -> int:
        return self._hash

    @property
    def dims(self) -> tuple[Dimension, ...]:
        """The axes of the tensor that this names: those of the type, less those indexed by an int."""
        gone = {d for d, i in self.index if isinstance(i, int)}
        return tuple(d for d in self.type.dims if d not in gone)

    @property
    def grad(self) -> "Location":
        """The gradient of the metric with respect to this location."""
        if self.pass_type is PassType.BACKWARD:
            raise LocationError(f"{self} is a gradient already")
        return dataclasses.replace(self, pass_type=PassType.BACKWARD)

    @property
    def activation(self) -> "Location":
        """The same location in the forward pass."""
        return dataclasses.replace(self, pass_type=PassType.FORWARD)

    @property
    def whole(self) -> "Location":
        """The whole activation that this names a part or the gradient of."""
        if not self.index and self.pass_type is PassType.FORWARD:
            return self
        return dataclasses.replace(self, pass_type=PassType.FORWARD, index=())

    @property
    def scope(self) -> tuple[str, ...]:
        """Names of the subgraphs around this location, outermost first."""
        return (*self.site.scope, self.subgraph) if self.site is not None else ()

    @property
    def root(self) -> "Location":
        """The location of the model at which the outermost subgraph around this one is injected."""
        return self.site.root if self.site is not None else self.whole

    def at(self, **index: SupportsIndex | slice | Iterable[SupportsIndex]) -> "Location":
        """A part of this location, by dimension: `.at(head=[6, 9], pos=-1)`.

        An int removes the axis; a slice or a list keeps it. Several lists select their outer
        product. Negative numbers count from the end. Indexing a dimension twice replaces the index.

        `pos` counts the tokens of a row's sequence, padding before the first one left out, also where a
        pass holds only the newest of them. `step`, which every location has, chooses the passes of a
        generation: 0 is the prefill.

        Raises:
            LocationError: the location has no such dimension, or the index is empty, not integral, or a
                negative step.
        """
        known = {d.value: d for d in (*self.type.dims, Dimension.STEP)}
        chosen = dict(self.index)
        for name, value in index.items():
            if name not in known:
                raise LocationError(
                    f"{self.type.qualified_name} has no dimension {name!r}: {nearest(name, known)}"
                )
            chosen[known[name]] = _normal_index(name, value)
        _check_steps(chosen.get(Dimension.STEP, 0))
        ordered = tuple(sorted(chosen.items(), key=lambda pair: pair[0].value))
        return dataclasses.replace(self, index=ordered)

    def entries(
        self, dims: Sequence[Dimension], columns: Sequence[Sequence[int]], count: int
    ) -> Iterator["Location"]:
        """Parts at single entries along some axes, which `at` gives one by one: many, checked once.

        Args:
            dims: the axes.
            columns: the entries along each of them, one per part.
            count: how many parts there are.
        """
        names = ("type", "layer", "site", "subgraph", "pass_type")
        same = [(name, getattr(self, name)) for name in names]
        key, put = _key(self), object.__setattr__
        told = [
            paired(d, columns[dims.index(d)]) if d in dims else [(d, i)] * count
            for d, i in self.at(**{d.value: 0 for d in dims}).index
        ]
        for index in zip(*told, strict=True) if told else [()] * count:
            part = object.__new__(Location)
            for name, value in same:
                put(part, name, value)
            put(part, "index", index)
            put(part, "_hash", hash_of(key, index))
            yield part

    def within(self, site: "Location", subgraph: str) -> "Location":
        """This location as one of the subgraph `subgraph` that is injected at `site`, a whole location."""
        if site != site.whole:
            told = f"inject at {site.whole}, and take the part, or the gradient, of its {self}"
            raise SubgraphError(f"a site is a whole location, not {site}: {told}")
        return dataclasses.replace(self, site=site, subgraph=subgraph)

    @property
    def order(self) -> tuple[int, ...]:
        """The key by which locations are sorted causally: stack, phase, layer, stage, then inside."""
        if self.site is not None:
            return (*self.site.order, self.type.stage)
        kind = self.type
        phase = 1 if kind.layered else (0 if kind.stage < 0 else 2)
        return (STACKS.index(kind.stack), phase, self.layer or 0, kind.stage)

    def precedes(self, other: "Location") -> bool:
        """Whether this location comes before `other` in the forward pass; parts do not matter."""
        return self.order < other.order

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"[{self.layer}]"
        grad = ".grad" if self.pass_type is PassType.BACKWARD else ""
        index = ";".join(f"{d.value}={print_index(i)}" for d, i in self.index)
        inner = f"{self.type.qualified_name}{layer}{grad}{'@' if index else ''}{index}"
        return inner if self.site is None else f"{self.site}/{self.subgraph}/{inner}"

    @staticmethod
    def parse(text: str) -> "Location":
        """The location that `str` printed.

        Raises:
            LocationError: the text names no declared type, or is malformed; near names are given.
        """
        parts = text.strip().split("/")
        if len(parts) % 2 == 0:
            raise LocationError(
                f"cannot parse {text!r}: inside a subgraph a location reads site/subgraph/location"
            )
        location = _parse_part(parts[0], text)
        for subgraph, inner in zip(parts[1::2], parts[2::2], strict=True):
            if location.index or location.pass_type is PassType.BACKWARD:
                raise LocationError(f"cannot parse {text!r}: a subgraph stands at a whole activation")
            location = _parse_part(inner, text).within(location, subgraph)
        return location


def declared() -> tuple[LocationType, ...]:
    """Every location type declared so far."""
    return tuple(_declared.values())


def reserve_declared() -> None:
    """From now on no type may take the name of another one that is declared already."""
    _reserved.update(_declared)


def _key(location: Location) -> int:
    """A hash of everything that is compared but the index."""
    return hash((location.type, location.layer, location.site, location.subgraph, location.pass_type))


def _check(location: Location) -> None:
    kind, inside = location.type, location.site is not None
    if inside != bool(location.subgraph):
        raise LocationError(f"{kind.qualified_name}: a site and a subgraph name go together")
    if not re.fullmatch(r"[\w.\-]*", location.subgraph):
        raise LocationError(
            f"{location.subgraph!r} cannot name a subgraph: use letters, digits, '_', '-' and '.'"
        )
    if location.layer is None:
        if kind.layered:
            raise LocationError(f"{kind.qualified_name} needs a layer: {kind.qualified_name}[0]")
    elif not kind.layered:
        raise LocationError(f"{kind.qualified_name} has no layers: write it without [{location.layer}]")
    elif location.layer < 0:
        raise LocationError(
            f"{kind.qualified_name}[{location.layer}]: layers count from 0; "
            "for the last ones use graph.every(...)[-1]"
        )


def _normal_index(name: str, value: SupportsIndex | slice | Iterable[SupportsIndex]) -> Index:
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        if any(p is not None and not isinstance(p, int) for p in parts) or value.step == 0:
            raise LocationError(f"{name}={value!r}: a slice takes ints, and a step that is not 0")
        if value.step is not None and value.step < 0:
            raise LocationError(f"{name}={value!r}: tensors have no negative steps; give a list")
        return value
    try:
        if isinstance(value, SupportsIndex) and not getattr(value, "ndim", 0):
            return _integer(value)
        chosen = tuple(_integer(i) for i in cast("Iterable[SupportsIndex]", value))
    except TypeError:
        raise LocationError(f"{name}={value!r}: an index is an int, a slice or a list of ints") from None
    if not chosen:
        raise LocationError(f"{name}=[] selects nothing")
    return chosen


def _check_steps(steps: Index) -> None:
    bounds = (steps.start, steps.stop) if isinstance(steps, slice) else steps
    numbers = (bounds,) if isinstance(bounds, int) else bounds
    if any(n is not None and n < 0 for n in numbers):
        raise LocationError(
            f"step={print_index(steps)}: steps count from the prefill, 0; which will be the last is unknown"
        )


def _integer(number: SupportsIndex) -> int:
    """`number` as an int; masks and fractions, which would select something else, are refused."""
    if isinstance(number, bool) or "bool" in str(getattr(number, "dtype", "")):
        raise TypeError(number)
    return operator.index(number)


def _near_names(name: str) -> str:
    """A clause naming the types near to a name; the name of a constant, `ATTN_Z`, means its type."""
    meant = [known for known in _declared if known.replace(".", "_") == name.lower().replace(".", "_")]
    return f"did you mean {' or '.join(meant)}?" if meant else nearest(name, _declared)


def _parse_part(part: str, whole: str) -> Location:
    match = _LOCATION.fullmatch(part)
    if match is None:
        raise LocationError(f"cannot parse {whole!r}: a location reads like attn.z[9]@head=6,9;pos=-1")
    kind = _declared.get(match["name"])
    if kind is None:
        raise LocationError(f"no location type is called {match['name']!r}: {_near_names(match['name'])}")
    location = Location(kind, int(match["layer"]) if match["layer"] is not None else None)
    if match["grad"]:
        location = location.grad
    indexed: set[str] = set()
    for pair in (match["index"] or "").split(";"):
        if not pair:
            if match["index"] is not None:
                raise LocationError(f"cannot parse {whole!r}: after @ comes dimension=index")
            continue
        name, _, value = pair.partition("=")
        if name in indexed:
            raise LocationError(f"cannot parse {whole!r}: {name} is indexed twice")
        indexed.add(name)
        location = location.at(**{name: parse_index(value, whole)})
    return location
