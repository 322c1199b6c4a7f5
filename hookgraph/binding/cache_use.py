"""What a model's cache keeps of keys and values: seen in one short pass with a cache."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import nn

from hookgraph.binding.anchors import Anchor
from hookgraph.binding.attention import Interior
from hookgraph.binding.examples import one_row
from hookgraph.binding.findings import Findings
from hookgraph.binding.mechanisms import PassState
from hookgraph.binding.tracing import evaluating
from hookgraph.hooks.handles import Handle, installed
from hookgraph.ontology.locations import Location


def see_cache(model: nn.Module, findings: Findings, example: Mapping[str, Any]) -> Findings:
    """Findings that tell of keys and values what a cache keeps of them. Without a cache nothing is told."""
    chosen = [
        a for a in findings.anchors.values() if a.mechanism == "interior" and a.role in ("key", "value")
    ]
    if not chosen:
        return findings
    watch = _Watch(model, chosen)
    try:
        with evaluating(model), torch.no_grad(), installed(*watch.installers()):
            model(**{**one_row(example, findings.batch), "use_cache": True})
    except Exception:  # a model that cannot be run like this uses no cache like this
        return findings
    kept: dict[Location, Anchor] = {}
    for anchor in chosen:
        same = watch.interiors[anchor.module].seen.get(anchor.role, False)
        kept[anchor.location] = replace(anchor, kept="states" if same else "source")
    return replace(findings, anchors={**findings.anchors, **kept})


@final
class _Watch:
    """Looks at attention modules without changing anything."""

    def __init__(self, model: nn.Module, chosen: list[Anchor]) -> None:
        self.interiors: dict[str, Interior] = {}
        self._model = model
        self._eager = {a.module: a.eager for a in chosen}

    def installers(self) -> list[Callable[[], Handle]]:
        """One for each module."""
        return [lambda path=path: self._install(path) for path in self._eager]

    def _install(self, path: str) -> Interior:
        module = self._model.get_submodule(path)
        interior = Interior(module, {}, self._eager[path], PassState(), watch=True)
        self.interiors[path] = interior
        return interior
