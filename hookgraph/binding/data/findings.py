"""What discovery found in a model: anchors, reasons for what is absent, layers, weights. All of it data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias, final

from hookgraph.binding.data.anchors import Anchor, Way
from hookgraph.binding.data.layouts import Layout
from hookgraph.binding.data.views import View
from hookgraph.binding.tracing.values import Slot
from hookgraph.ontology.locations import Location, LocationType

_PARTS: Final[Mapping[str, str]] = {
    "attn": "attention",
    "xattn": "cross-attention",
    "mixer": "a mixer other than attention",
    "mlp": "an MLP",
    "moe": "experts",
    "extra": "a branch other than mixing and MLP",
}
"""What the locations of a layer belong to, by the first word of their names."""

StepKind: TypeAlias = Literal["anew", "add", "share", "norm", "scale", "parameter", "here"]


@final
@dataclass(frozen=True, slots=True)
class StreamStep:
    """One operation of a layer's residual path.

    Args:
        kind: `add` a location's value, or to each of several streams its `share` of it, pass through a
            `norm`, `scale` by a number or by a `parameter`, or `here`: at this point of the path the stream
            is what `location` names. A path that begins `anew` leads from nothing.
        location: for `add`, `share` and `here`; None where what is added cannot be reached.
        name: the path of the norm, or of the module that returns what is added, or the parameter's name.
        factor: the number.
        layout: how what the norm is given lies.
    """

    kind: StepKind
    location: Location | None = None
    name: str = ""
    factor: float = 1.0
    layout: Layout = ""


@final
@dataclass(frozen=True, slots=True)
class Resumption:
    """What it takes to begin a pass after a layer."""

    needed: tuple[int, ...] = ()
    """The layers up to it that run all the same: what they hand on does not depend on the stream."""
    lost: int | None = None
    """The first layer up to it that hands on what does: no pass can begin after it."""


FREE: Final = Resumption()
"""Nothing but the stream is handed on."""


@final
@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a stack, as a binding needs it to skip it and to prove it."""

    module: str
    """Its path; of a layer that consists of several modules the first one's."""
    input_slot: Slot
    output_slot: Slot
    output_size: int
    """How many elements its output has, if it is a tuple; 0 if it is a tensor."""
    stream: tuple[StreamStep, ...] = ()
    shared: bool = False
    """Whether it is no module of its own: others are the same one, or it consists of several."""
    layout: Layout = ""
    """How what enters and leaves it lies."""
    joined: bool = False
    """Whether several streams lie one after another on the last axis."""
    after: Resumption = FREE
    """What it takes to begin a pass after it."""
    stage: int = 0
    """How often the width of the stream changed on the way to it."""
    overwritten: bool = False
    """Whether what it is given, or what it returns, is changed in place later on."""


@final
@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The modules of a mixture: the routed experts, and what returns these with what is added to them."""

    experts: str
    whole: str


Side: TypeAlias = Literal["output", "input", "table"]
"""Which side of a projection the view is of; `table` for an embedding."""


@final
@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where a weight lies: a projection, and which of its inputs or outputs belong to it."""

    module: str
    side: Side
    view: View = None


Boundary: TypeAlias = tuple[str, int]
"""A stack, and how many of its layers lie before a point between layers."""

WeightKey: TypeAlias = tuple[str, str, int | None]
"""Stack, name and layer."""


@final
@dataclass(slots=True)
class Findings:
    """Everything known of a model after discovery, as data."""

    anchors: dict[Location, Anchor] = field(default_factory=dict[Location, Anchor])
    reasons: dict[Location, str] = field(default_factory=dict[Location, str])
    layers: dict[str, list[Layer]] = field(default_factory=dict[str, list[Layer]])
    weights: dict[WeightKey, WeightSource] = field(default_factory=dict[WeightKey, WeightSource])
    experts: dict[tuple[str, int], ExpertLayer] = field(default_factory=dict[tuple[str, int], ExpertLayer])
    """By stack and layer."""
    closed: dict[Boundary, str] = field(default_factory=dict[Boundary, str])
    """Where passes were seen not to begin as they should, and what came of them."""
    overtaken: dict[str, tuple[Slot, ...]] = field(default_factory=dict[str, tuple[Slot, ...]])
    """Modules that are given a stream which is then changed in place, and where among what they are given."""
    batch: int = 0
    """How many examples the traced pass had."""
    packed: list[str] = field(default_factory=list[str])
    """The stacks whose positions are patches of pictures that lie one after another on one axis."""

    rewritten: str = ""
    """Where a layer writes into a stream in place, so that the path found may not be what it computes."""

    def weigh(self, name: str, at: Location, source: WeightSource) -> None:
        """Keep where a weight lies, unless it is known, by the stack and the layer of a location."""
        self.weights.setdefault((at.type.stack, name, at.layer), source)

    def add(self, anchor: Anchor) -> None:
        """Keep an anchor."""
        self.anchors[anchor.location] = anchor

    def add_ways(self, other: "Findings") -> None:
        """Keep how the same model, using the other kernel, has what its own code computes."""
        for location, anchor in self.anchors.items():
            found = other.anchors.get(location)
            if anchor.operand is None or found is None or found.operand is None:
                continue
            if found.module == anchor.module and found.operand.kind != anchor.operand.kind:
                self.anchors[location] = replace(anchor, other=Way(found.operand, found.view))

    def absent(self, reason: str, *locations: Location | LocationType, layer: int | None = None) -> None:
        """Keep the reason for which locations are absent, unless one is known."""
        for location in locations:
            place = location if isinstance(location, Location) else Location(location, layer)
            self.reasons.setdefault(place, reason)

    def stage(self, location: Location) -> int:
        """The stage of a location's layer, or of the last layer: layers of one stage have one width."""
        layers = self.layers.get(location.type.stack)
        return layers[-1 if location.layer is None else location.layer].stage if layers else 0

    def why_closed(self, stack: str, block: int) -> str:
        """Why no pass can begin before a layer, or, with their number, after all; empty if one can."""
        layers = self.layers.get(stack, ())
        if not layers:
            return "its layers were not found"
        if any(layer.shared for layer in layers):
            return "its layers are no modules of their own"
        lost = layers[block - 1].after.lost if block else None
        if lost is not None:
            return f"later layers read what layer {lost} computed beside the stream"
        return self.closed.get((stack, block), "")

    def missing(self, kind: LocationType, unfed: str = "") -> str:
        """What no layer has, if that is why no location of a type exists; empty if another one of it does.

        `unfed` is said of a stack that was not found: what the model was not given.
        """
        if kind.layered and not self.layers.get(kind.stack):
            return f"it has no {kind.stack} of which the layers were found{unfed}"
        family = kind.name.partition(".")[0]
        if family == "streams":
            return f"its {kind.stack} keeps one residual stream: see resid{kind.name.removeprefix(family)}"
        known = (*self.anchors, *self.reasons)  # what is absent for a reason of its own is known to be there
        found = {x.type.name.partition(".")[0] for x in known if x.type.stack == kind.stack}
        if family in found or family not in _PARTS:
            return ""
        return f"no layer of its {kind.stack} is known to have {_PARTS[family]}"

    def without(self, failed: Mapping[Location, str]) -> "Findings":
        """The same without some locations, for these reasons."""
        anchors = {k: v for k, v in self.anchors.items() if k not in failed}
        return replace(self, anchors=anchors, reasons={**self.reasons, **failed})
