"""Brute force on one architecture."""

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.binding import bind
from hookgraph.binding.resolving.examples import example_inputs
from hookgraph.errors import BindingError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location
from hookgraph_tests.sweep.effects.double import doubled, in_double, make_double
from hookgraph_tests.sweep.effects.elsewhere import padded, past
from hookgraph_tests.sweep.effects.exactly import exact, whole
from hookgraph_tests.sweep.effects.findings import Finding, told, tried
from hookgraph_tests.sweep.effects.slopes import attrib, integrals
from hookgraph_tests.sweep.effects.trials import Trial, corrupted, kinds, metrics, nodes_of, special_tokens
from hookgraph_tests.tiny import build, example_of

_MASKED = 1e9
"""Beyond this a score is masked."""
_SECONDS = 5.0
"""How long a plain pass for each node may take together, about."""
_WHOLE = 2
"""Of how many locations every node is patched."""


@final
@dataclass(frozen=True, slots=True)
class Effects:
    """What brute force came to on one architecture.

    Args:
        table: the mapping it is in.
        architecture: its `model_type`.
        findings: by check.
        reason: why nothing was checked.
    """

    table: str
    architecture: str
    findings: tuple[Finding, ...] = ()
    reason: str = ""

    @staticmethod
    def lost(table: str, architecture: str, reason: str) -> "Effects":
        """Of a process that did not end by itself."""
        return Effects(table, architecture, (Finding("all", "raised", reason),))

    @property
    def status(self) -> str:
        """In a word."""
        if self.reason:
            return "not checked"
        return "failed" if any(x.failed for x in self.findings) else "ok"

    def lines(self) -> Iterator[str]:
        """One line, and one more for each check that fails or is refused."""
        passed = sum(x.count for x in self.findings if x.verdict == "ok")
        absent = [f"no {x.check} ({x.detail})" for x in self.findings if x.verdict == "not applicable"]
        summary = self.reason or "; ".join([f"{passed} numbers", *absent])
        yield f"{self.table:<10} {self.architecture:<28} {self.status:<11} {summary}"
        told: dict[str, list[Finding]] = {}
        for x in self.findings:
            if x.failed or x.verdict == "refused":
                told.setdefault(f"{x.verdict}: {x.detail}", []).append(x)
        for what, alike in told.items():
            checks = ", ".join(dict.fromkeys(x.check for x in alike))
            where = sorted({x.where for x in alike if x.where})
            yield f"    {checks} {what}{f' ({len(where)} nodes, such as {where[0]})' if where else ''}"


def effects_of(table: str, architecture: str) -> Effects:
    """Build one architecture in double precision, bind it, compare."""
    try:
        model = build(table, architecture)
        found = example_of(model)
        found = example_inputs(model) if found is None else found
    except Exception as error:
        return Effects(table, architecture, reason=f"not run: {told(error)[1]}")
    try:
        graph = bind(model, example=found, cached=False)
    except BindingError as error:
        return Effects(table, architecture, reason=f"not bound: {told(error)[1]}")
    make_double(model)
    example = {k: in_double(v) for k, v in found.items()}
    trial = Trial(graph, model, example, corrupted(example, special_tokens(model)))
    return Effects(table, architecture, tuple(findings(trial, zlib.crc32(architecture.encode()))))


def findings(trial: Trial, shift: int) -> Iterator[Finding]:
    """Every check.

    Args:
        trial: the model and its inputs.
        shift: which layers, heads and kinds of locations to choose.
    """
    graph = trial.graph
    with doubled():
        began = time.monotonic()
        first, second = (_seen(graph, x) for x in (trial.clean, trial.corrupt))
        seconds = (time.monotonic() - began) / 2
        if not torch.equal(graph.run(trial.clean).logits, graph.run(trial.clean).logits):
            yield Finding("all", "not applicable", "two passes over the same inputs differ")
            return
        places = [x for x in first if first[x].is_floating_point()]
        by_kind = [[x for x in found if x in places] for found in kinds(graph).values()]
        by_kind = [found for found in by_kind if found]
        nodes = [x for i, found in enumerate(by_kind) for x in nodes_of(found, first, shift + i)]
        every = max(1, round(len(nodes) * seconds / _SECONDS))  # of a slow model fewer
        nodes = list(dict.fromkeys(nodes))[::every]
        moving = [x for x in nodes if not torch.equal(first[x], second[x])]
        one_each = [found[(shift + i) % len(found)] for i, found in enumerate(by_kind)][::every]
        one_each = [x for x in one_each if not torch.equal(first[x], second[x])]
        sloping = [x for x in one_each if _slopes(graph, x, second[x] - first[x])]
        some = [one_each[(shift + 7 * i) % len(one_each)] for i in range(min(_WHOLE, len(one_each)))]
        yield from tried("exact", exact(trial, moving, second))
        yield from tried("whole", whole(trial, list(dict.fromkeys(some)), second))
        yield from tried("attrib", attrib(trial, sloping, first, second))
        yield from tried("ig", integrals(trial, [x for x in some if x in sloping], first, second))
        for side in ("left", "right"):
            yield from tried(f"{side} padding", padded(trial, nodes, side))
        yield from tried("past", past(trial, nodes))
    yield from _as_it_is(trial, moving)


def _seen(graph: HookGraph, inputs: Any) -> Run:
    return graph.run(inputs, save=list(graph.locations))


def _slopes(graph: HookGraph, location: Location, delta: Tensor) -> bool:
    """Whether its gradient is what an edit does: it is not where a model cuts it off, and told then."""
    finite = bool(delta.nan_to_num(0.0, torch.inf, torch.inf).abs().max() < _MASKED)
    return finite and graph.report.proves(location, "edit = gradient")


def _as_it_is(trial: Trial, nodes: list[Location]) -> Iterator[Finding]:
    """In the precisions that the model chooses itself, nothing is raised."""
    try:
        rows = len(trial.graph.run(trial.clean, save=[nodes[0].whole])[nodes[0].whole])
        metric = [*metrics(trial.graph.run(trial.clean).logits, rows).values()][-1]
    except Exception as error:
        yield Finding("mixed precision", "not applicable", told(error)[1])
        return
    try:
        found: Tensor = exact_effects(trial.graph, trial.clean, trial.corrupt, metric, nodes, progress=False)
    except Exception as error:
        yield Finding("mixed precision", *told(error))
        return
    ok = bool(found.isfinite().all())
    yield Finding("mixed precision", "ok" if ok else "wrong", "" if ok else "not finite", count=len(nodes))
