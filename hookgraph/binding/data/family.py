"""`Family`: what cannot be discovered of an architecture, as data in the format of anchors."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

from torch import nn

from hookgraph.binding.data.anchors import Anchor
from hookgraph.binding.data.findings import Findings, Layer, StreamStep
from hookgraph.binding.data.records import decode
from hookgraph.errors import BindingError, LoadError, nearest
from hookgraph.graph.conformance import Proof
from hookgraph.ontology.locations import Location, LocationType, declared

_LAYER: Final = "{layer}"

_NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "own code": ("role", "operand"),
    "interior": ("role", "eager"),
    "head result": ("view",),
    "head input": ("view",),
}
"""What an anchor must tell, by its mechanism."""

_EXAMPLES: Final[Mapping[str, str]] = {
    "role": 'a role, such as "query"',
    "operand": 'an operand, such as {"kind": "product", "nth": 0, "of": 2, "place": 0}',
    "eager": 'an eager function, such as "package.module:function"',
    "view": 'a view, such as {"is": "Columns", "start": 0, "count": 4, "stride": 8, "width": 8}',
}


@final
@dataclass(frozen=True, slots=True)
class Family:
    """Anchors of an architecture, which are added to those that are discovered, or replace them.

    Each is a mapping with the fields of `Anchor`: `location` is the name of a location type, which may be one
    of your own, `mechanism` is mostly `output`, `input`, `sum` or `own code`, and `module` is a path in which
    `{layer}` stands for the number of the layer. `layers` lists the layers that have it, if not all do.

    Args:
        model: the name of the class of models.
        anchors: the anchors.
    """

    model: str
    anchors: tuple[Mapping[str, object], ...]

    @staticmethod
    def read(path: str | Path) -> "Family":
        """The record in a JSON file: an object with `model` and `anchors`.

        Raises:
            LoadError: the file is not such a record.
        """
        try:
            content = json.loads(Path(path).read_text())
            return Family(str(content["model"]), tuple(dict(x) for x in content["anchors"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoadError(
                f"{path} is no family record, a JSON object with model and anchors: {error}"
            ) from error

    def without_views(self) -> "Family":
        """The anchors that hold for a model of another size as well."""
        return replace(self, anchors=tuple(x for x in self.anchors if not x.get("view")))

    def to_json(self) -> str:
        """The record as JSON."""
        return json.dumps({"model": self.model, "anchors": [dict(x) for x in self.anchors]}, indent=1)


def apply(family: Family, findings: Findings, model: nn.Module) -> Findings:
    """The findings with the anchors of a record.

    Raises:
        BindingError: the record is for other models, or one of its anchors is malformed or names a module
            that the model lacks.
    """
    names = [kind.__name__ for kind in type(model).__mro__]
    if family.model not in names:
        raise BindingError(f"the family record is for {family.model}, but the model is a {names[0]}")
    modules = dict(model.named_modules())
    added = {a.location: a for record in family.anchors for a in _anchors(record, findings)}
    for location, anchor in added.items():
        if anchor.module not in modules:
            raise BindingError(
                f"family {family.model}: {location} is said to lie at {anchor.module!r}, but there is no "
                f"such module: {nearest(anchor.module, modules)}"
            )
    return replace(
        findings,
        anchors={**findings.anchors, **added},
        reasons={k: v for k, v in findings.reasons.items() if k not in added},
        layers={k: [_told(x, added) for x in layers] for k, layers in findings.layers.items()},
    )


def refuse_wrong(family: Family, proofs: tuple[Proof, ...], findings: Findings) -> None:
    """Raise if an invariant fails at a location of a record.

    Raises:
        BindingError: which invariant fails where, and by how much.
    """
    own = {a.location for record in family.anchors for a in _anchors(record, findings)}
    for proof in proofs:
        if proof.location in own and not proof.holds:
            raise BindingError(
                f"family {family.model}: {proof.location} fails '{proof.invariant}' by {proof.error:.3g} "
                f"(tolerance {proof.tolerance:.3g}){': ' if proof.note else ''}{proof.note}"
            )


def _anchors(record: Mapping[str, object], findings: Findings) -> Iterator[Anchor]:
    """The anchors that one line of a record stands for, one for each layer."""
    kind = _type_of(record)
    content = {k: v for k, v in record.items() if k != "layers"}
    numbers: Any = record.get("layers", range(len(findings.layers.get(kind.stack, ()))))
    for layer in numbers if kind.layered else (None,):
        location = Location(kind, layer)
        module = str(content.get("module", "")).replace(_LAYER, str(layer))
        try:
            anchor = decode({**content, "location": str(location), "module": module}, Anchor)
        except LoadError as error:
            raise BindingError(f"the family record of {kind} is malformed: {error}") from error
        lacks = [x for x in _NEEDED.get(anchor.mechanism, ()) if not getattr(anchor, x)]
        if lacks:
            raise BindingError(
                f"the family record of {kind} is malformed: the mechanism {anchor.mechanism!r} needs "
                f"{' and '.join(_EXAMPLES[x] for x in lacks)}"
            )
        yield anchor


def _type_of(record: Mapping[str, object]) -> LocationType:
    types = {kind.qualified_name: kind for kind in declared()}
    name = str(record.get("location", ""))
    if name not in types:
        raise BindingError(
            f"the family record names the unknown location type {name!r}: {nearest(name, types)}; declare "
            "your own as a LocationType first"
        )
    return types[name]


def _told(layer: Layer, added: Mapping[Location, Anchor]) -> Layer:
    """A layer in whose residual path the added locations are named, in place of those that they replace."""
    by_module = {a.module: x for x, a in added.items() if a.mechanism == "output"}

    def told(step: StreamStep) -> StreamStep:
        known = step.kind == "add" and step.name in by_module
        return replace(step, location=by_module[step.name]) if known and step.location is None else step

    return replace(layer, stream=tuple(told(step) for step in layer.stream))
