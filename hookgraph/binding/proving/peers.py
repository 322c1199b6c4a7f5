"""Locations that are reached alike: proven for one of them, proven for its peers in other layers.

Two locations are peers if they are of one type and their layers are built alike, and if their anchors are
equal up to the number of the layer and the sizes of tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, final

from torch import nn

from hookgraph.binding.data.findings import Findings
from hookgraph.binding.data.views import Columns, Span, View
from hookgraph.binding.running.others import is_changed
from hookgraph.ontology.locations import Location

Place: TypeAlias = tuple[str, int | None]
"""A stack, and a layer of it, or None for what lies outside the layers."""
Kind: TypeAlias = tuple[object, ...]
"""What a layer is made of: its class, and the paths of the modules in it."""


def place_of(location: Location) -> Place:
    """The layer that a location belongs to."""
    return location.type.stack, location.layer


def kinds(model: nn.Module, findings: Findings) -> dict[Place, Kind]:
    """What each layer of a model is made of; and outside of them, which modules have hooks of others."""
    known: dict[str, Kind] = {}
    result: dict[Place, Kind] = {}
    for stack, layers in findings.layers.items():
        for number, layer in enumerate(layers):
            if layer.module not in known:
                parts = model.get_submodule(layer.module).named_modules()
                # Single projections and norms are told by what they do: they may be quantised.
                known[layer.module] = tuple(_part(path, part) for path, part in parts)
            result[stack, number] = known[layer.module]
        inside = {m for layer in layers for m in model.get_submodule(layer.module).modules()}
        outside = ((path, m) for path, m in model.named_modules() if m not in inside)
        result[stack, None] = tuple(path for path, m in outside if is_changed(m))
    return result


def _part(path: str, module: nn.Module) -> object:
    """What counts of one module in a layer; hooks of others may change what it returns."""
    return path, bool(module._modules) if path else type(module), is_changed(module)


def shape_of(findings: Findings, location: Location) -> Kind:
    """An anchor without the number of its layer and without sizes: equal for peers."""
    anchor = findings.anchors[location]
    # What a norm adds is a number that is fitted, and what a cache keeps is seen in a pass: of the twin.
    somewhere = location if location.layer is None else Location(location.type, 0)
    plain = replace(anchor, location=somewhere, view=None, epsilon=0.0, call=0, kept="", other=None)
    plain = replace(plain, module=_inside(findings, location, anchor.module), calls=min(anchor.calls, 2))
    return plain, _layout(anchor.view)


def first_of_each(model: nn.Module, findings: Findings) -> dict[Place, Place]:
    """For each layer the first one of its kind whose locations are reached alike."""
    shapes: dict[Place, set[Kind]] = {}
    for location in findings.anchors:
        shapes.setdefault(place_of(location), set()).add(shape_of(findings, location))
    made = kinds(model, findings)
    first: dict[tuple[object, ...], Place] = {}
    result: dict[Place, Place] = {}
    for place in sorted(shapes, key=lambda p: (p[0], p[1] is not None, p[1] or 0)):
        kind = (place[0], place[1] is None, made.get(place), frozenset(shapes[place]))
        result[place] = first.setdefault(kind, place)
    return result


@final
@dataclass(frozen=True, slots=True)
class Agreement:
    """What of a model its twin speaks for."""

    peers: dict[Location, tuple[Location, ...]] = field(default_factory=dict[Location, tuple[Location, ...]])
    """For each location of the model those of the twin that are reached alike."""

    def alone(self, findings: Findings) -> list[Location]:
        """The locations of the model for which the twin does not speak."""
        return [x for x in findings.anchors if x not in self.peers]


def agreement(model: nn.Module, findings: Findings, twin: nn.Module, found: Findings) -> Agreement:
    """Compare a model with its twin, layer by layer.

    Args:
        model: the large model.
        findings: what was found in it.
        twin: the small one.
        found: what was found in that.
    """
    made, small = kinds(model, findings), kinds(twin, found)
    known, own = _shapes_by_place(found), _shapes_by_place(findings)
    result = Agreement()
    for place, shapes in own.items():
        same = [p for p in known if _may_speak(p, place) and small.get(p) == made.get(place)]
        likeness = {p: len(known[p].keys() & shapes.keys()) for p in same}
        best = [p for p in same if likeness[p] == max(likeness.values())]
        for kind, location in shapes.items():
            alike = tuple(known[p][kind] for p in best if kind in known[p])
            if alike:
                result.peers[location] = alike
    return result


def _shapes_by_place(findings: Findings) -> dict[Place, dict[Kind, Location]]:
    result: dict[Place, dict[Kind, Location]] = {}
    for location in findings.anchors:
        result.setdefault(place_of(location), {})[shape_of(findings, location)] = location
    return result


def peers_among(locations: Sequence[Location], first: Mapping[Place, Place]) -> dict[Location, Location]:
    """For each location the one of the same type in the first layer that is like its own."""
    return {x: Location(x.type, first[place_of(x)][1]) for x in locations}


def _may_speak(small: Place, large: Place) -> bool:
    return small[0] == large[0] and (small[1] is None) == (large[1] is None)


def _layer_path(findings: Findings, location: Location) -> str:
    layers = findings.layers.get(location.type.stack, ())
    return "" if location.layer is None or location.layer >= len(layers) else layers[location.layer].module


def _inside(findings: Findings, location: Location, path: str) -> str:
    """The path of a module inside its layer; elsewhere without the number of the layer."""
    layer = _layer_path(findings, location)
    if layer and _within(path, layer):
        return path[len(layer) :]
    layers = findings.layers.get(location.type.stack, ())
    for back, other in enumerate(reversed(layers), start=1):
        if location.layer is None and _within(path, other.module):
            return f"{-back}/{path[len(other.module) :]}"
    return f"/{'.'.join('*' if layer and part.isdigit() else part for part in path.split('.'))}"


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _layout(view: View) -> object:
    """A view without sizes."""
    if isinstance(view, Columns):
        return "columns", view.start == 0, view.stride == view.width
    if isinstance(view, Span):
        return "span", view.start == 0
    return type(view).__name__
