"""What a model's cache keeps of keys and values: seen in one short pass with a cache."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from hookgraph.binding.data.anchors import Anchor, Role
from hookgraph.binding.data.findings import Findings
from hookgraph.binding.resolving.examples import one_row
from hookgraph.binding.running.attention import Interior
from hookgraph.binding.running.own_code import OwnCode
from hookgraph.binding.running.passes import PassState
from hookgraph.binding.tracing.trace import evaluating
from hookgraph.hooks.handles import Handle, installed
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location


def see_cache(model: nn.Module, findings: Findings, example: Mapping[str, Any]) -> Findings:
    """Findings that tell of keys and values what a cache keeps of them. Without a cache nothing is told."""
    chosen: dict[str, dict[Role, Anchor]] = {}
    for anchor in findings.anchors.values():
        if anchor.mechanism in ("interior", "own code") and anchor.role in ("key", "value"):
            chosen.setdefault(anchor.module, {})[anchor.role] = anchor
    if not chosen:
        return findings
    watch = _Watch(model, chosen)
    try:
        with evaluating(model), torch.no_grad(), installed(*watch.installers()):
            model(**{**one_row(example, findings.batch), "use_cache": True})
    except Exception:  # a model that cannot be run like this uses no cache like this
        return findings
    kept: dict[Location, Anchor] = {}
    unreached: dict[Location, str] = {}
    for location, anchor in findings.anchors.items():
        if anchor.role not in chosen.get(anchor.module, ()):
            continue
        same = watch.interiors[anchor.module].seen.get(anchor.role)
        if anchor.mechanism == "interior":
            shared = same and watch.is_shared(anchor)
            kept[location] = replace(anchor, kept="shared" if shared else "states" if same else "source")
        elif same:
            kept[location] = replace(anchor, kept="states")
        elif same is False and Dimension.POS in location.type.dims:
            unreached[location] = "the model's own attention code makes them of what a cache keeps"
    return replace(findings, anchors={**findings.anchors, **kept}).without(unreached)


@final
class _Watch:
    """Looks at attention modules without changing anything."""

    def __init__(self, model: nn.Module, chosen: Mapping[str, Mapping[Role, Anchor]]) -> None:
        self.interiors: dict[str, Interior | OwnCode] = {}
        self._model = model
        self._chosen = chosen

    def installers(self) -> list[Callable[[], Handle]]:
        """One for each module."""
        return [partial(self._install, path) for path in self._chosen]

    def is_shared(self, anchor: Anchor) -> bool:
        """Whether the attention of other modules was given the same keys or values."""
        given = {path: self._given(path, anchor.role) for path in self.interiors}
        own = given.pop(anchor.module)
        return own is not None and any(x is own for x in given.values())

    def _given(self, path: str, role: Role) -> Tensor | None:
        interior = self.interiors[path]
        return (interior.given or {}).get(role) if isinstance(interior, Interior) else None

    def _install(self, path: str) -> Handle:
        module, anchors = self._model.get_submodule(path), self._chosen[path]
        kind = Interior if next(iter(anchors.values())).mechanism == "interior" else OwnCode
        interior = kind(module, {}, anchors, PassState(), watch=True)
        self.interiors[path] = interior
        return interior
