"""Prove a binding where it is cheap: a small model whole, of a large one a tiny twin, or some layers."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, final

import torch
from transformers import PreTrainedModel

from hookgraph.binding.data.family import Family, apply, refuse_wrong
from hookgraph.binding.data.findings import Boundary, Findings
from hookgraph.binding.proving import conformance
from hookgraph.binding.proving.circumstances import Subject
from hookgraph.binding.proving.peers import (
    Agreement,
    Place,
    agreement,
    first_of_each,
    peers_among,
    place_of,
)
from hookgraph.binding.proving.replays import REPLAYED
from hookgraph.binding.proving.slopes import CHOSEN_ANEW, DEAD
from hookgraph.binding.proving.twins import in_precision, make_excerpt, make_twin, tiny_twins
from hookgraph.binding.resolving.cache_use import see_cache
from hookgraph.binding.resolving.discovery import discover
from hookgraph.binding.resolving.examples import candidates, example_inputs, one_row
from hookgraph.binding.running.huggingface import HuggingFaceBinding
from hookgraph.binding.tracing.trace import Trace, evaluating
from hookgraph.errors import BindingError
from hookgraph.graph.conformance import ConformanceReport, Gap, Proof
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.replay import block_after
from hookgraph.ontology.locations import Location

_STREAMS: Final = ("resid.", "streams.")
"""How the names of the points of residual streams begin."""

_SMALL: Final = 30_000_000
"""Models up to this many parameters are proven whole, on a copy in double precision."""

_EXCERPT: Final = 2_000_000_000
"""Layers of a large model are copied up to this many parameters, together with what is outside of them."""

_FEW: Final = 150
"""Up to this many locations of a twin are proven each, above that only those of one layer of each kind."""

_OF_EXAMPLE: Final = (DEAD, CHOSEN_ANEW, "shape fails: two examples", "fires once fails")
"""What is said of failures that another example may not lead to."""


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """What proving a model led to: what is left of what was found in it, and what was proven."""

    findings: Findings
    report: ConformanceReport


@final
@dataclass(frozen=True, slots=True)
class _Proven:
    """Proofs on some model, for which locations of the one to bind they stand, and what the model is."""

    proofs: tuple[Proof, ...] = ()
    peers: Mapping[Location, tuple[Location, ...]] = field(
        default_factory=dict[Location, tuple[Location, ...]]
    )
    text: str = ""
    gaps: tuple[Gap, ...] = ()
    draws: str = ""
    """How many random draws there were in a pass, if any."""


def prove(binding: HuggingFaceBinding, family: Family | None = None) -> Outcome:
    """Prove every location, or one of each kind; what fails is left out, its peers too.

    A small model is proven whole, on a copy in double precision. Of a large one, or one whose weights lie
    elsewhere or are quantised, a tiny twin is made, of the same class and with the same kinds of layers; it
    is resolved and proven whole, and speaks for those locations of the model that are reached like its own.
    For the others copies of layers of the model are taken, one of each kind.

    Raises:
        BindingError: what a family record says does not hold; or nothing of the residual stream does.
    """
    if is_small(binding.model):
        part = _on_copy(binding.model, binding.findings, binding.example)
        return _sound(_concluded(binding, binding.findings, [part], family), binding)
    findings, parts = binding.findings, list[_Proven]()
    twin = _best_twin(binding, family)
    rest = list(findings.anchors)
    if twin is not None:
        model, found, example, agreed = twin
        part = _without_silent(_on_twin(model, found, example, agreed))
        findings = _told_by_twin(binding.findings, found, agreed)
        parts += [part] if part.peers else []
        rest = [x for x in findings.anchors if x not in part.peers]
    if rest:
        findings = see_cache(binding.model, findings, binding.example)
        whole = HuggingFaceBinding(binding.model, findings, example=binding.example)
        parts.append(_on_layers(whole, rest))
    return _sound(_concluded(binding, findings, parts, family), binding)


def _sound(outcome: Outcome, binding: HuggingFaceBinding) -> Outcome:
    """The outcome, if some point of a residual stream is left of what was found.

    Raises:
        BindingError: none is.
    """
    found = binding.findings
    streams = [x for x in found.anchors if x.type.name.startswith(_STREAMS)]
    if not streams or any(x in outcome.findings.anchors for x in streams):
        return outcome
    last = max(streams, key=_order)
    reason = outcome.findings.reasons[last]
    other = any(told in reason for told in _OF_EXAMPLE)
    raise BindingError(
        f"{type(binding.model).__name__} cannot be bound: its layers were found, but no point of its "
        f"residual stream passes the proof; of {last}: {reason}. "
        + (f"The stream is lost where {found.rewritten}. " if found.rewritten else "")
        + ("Another example may do: give it to bind(model, example=...). " if other else "")
        + "bind(model, check=False) lists the locations unproven"
    )


def conclude(binding: HuggingFaceBinding, proofs: Sequence[Proof], family: Family | None = None) -> Outcome:
    """What proofs of every location by itself lead to."""
    return _concluded(binding, binding.findings, [_Proven(tuple(proofs), {}, "the model itself")], family)


def is_small(model: PreTrainedModel) -> bool:
    """Whether a copy of a model can be made and cast."""
    parameters = list(model.parameters())
    whole = all(p.is_floating_point() and p.device.type != "meta" for p in parameters)
    return whole and sum(p.numel() for p in parameters) <= _SMALL


def _best_twin(
    binding: HuggingFaceBinding, family: Family | None
) -> tuple[PreTrainedModel, Findings, Mapping[str, Any], Agreement] | None:
    """A tiny twin that resolves like the model, or the one that is most like it."""
    first = first_of_each(binding.model, binding.findings)
    best: tuple[PreTrainedModel, Findings, Mapping[str, Any], Agreement] | None = None
    for twin in tiny_twins(binding.model, _depths(binding.findings, first), _SMALL):
        try:
            example = _like(binding.example, twin)
            found = see_cache(twin, discover(Trace(twin, example)), example)
            found = found if family is None else apply(family.without_views(), found, twin)
        except Exception:
            continue  # It cannot be run, or has no residual stream: these numbers are too small.
        agreed = agreement(binding.model, binding.findings, twin, found)
        if best is None or len(agreed.peers) > len(best[3].peers):
            best = twin, found, example, agreed
        if not agreed.alone(binding.findings):
            break
    return best if best is not None and best[3].peers else None


def _like(example: Mapping[str, Any], twin: PreTrainedModel) -> dict[str, Any]:
    """An example for a twin with the arguments that its model was traced on."""
    for candidate in candidates(twin):
        if candidate.keys() == example.keys():
            with torch.no_grad(), suppress(Exception):
                twin(**candidate)
                return candidate
    return example_inputs(twin)


def _depths(findings: Findings, first: Mapping[Place, Place]) -> dict[int, int]:
    """How many layers a stack must keep to have one of each kind, by how many it has."""
    depths: dict[int, int] = {}
    for stack, layers in findings.layers.items():
        last = max((layer for s, layer in first.values() if s == stack and layer is not None), default=0)
        depths[len(layers)] = min(len(layers), max(2, last + 1, depths.get(len(layers), 0)))
    return depths


def _on_twin(
    model: PreTrainedModel, found: Findings, example: Mapping[str, Any], agreed: Agreement
) -> _Proven:
    first = first_of_each(model, found)
    stands = peers_among(list(found.anchors), first)
    chosen = list(found.anchors) if len(found.anchors) <= _FEW else sorted(set(stands.values()), key=_order)
    size = sum(p.numel() for p in model.parameters())
    layers = ", ".join(f"{len(x)} layers" for x in found.layers.values())
    part = _on_copy(model, found, example, chosen, f"a tiny twin ({layers}, {size:,} parameters)")
    known = set(chosen)
    peers = {
        x: tuple(dict.fromkeys(t if t in known else stands[t] for t in alike))
        for x, alike in agreed.peers.items()
    }
    return replace(part, peers=peers)


def _without_silent(part: _Proven) -> _Proven:
    """Without the locations that have no effect in a twin: in its model, on another example, they may."""
    silent = {p.location for p in part.proofs if p.note == DEAD}
    peers = {x: tuple(t for t in alike if t not in silent) for x, alike in part.peers.items()}
    return replace(
        part,
        proofs=tuple(p for p in part.proofs if p.location not in silent),
        peers={x: alike for x, alike in peers.items() if alike},
    )


def _order(location: Location) -> tuple[object, ...]:
    return location.order


def _told_by_twin(findings: Findings, found: Findings, agreed: Agreement) -> Findings:
    """The findings with what the twin tells better, or more cheaply: numbers that were fitted in double
    precision, and what a cache keeps. Which layers share keys with later ones depends on how many there are:
    if some do, all are reached so that those would see an edit.
    """
    shared = any(anchor.kept == "shared" for anchor in found.anchors.values())
    better = {
        x: replace(
            anchor, epsilon=twin.epsilon, kept="shared" if shared and twin.kept == "states" else twin.kept
        )
        for x, anchor in findings.anchors.items()
        if x in agreed.peers and (twin := found.anchors[agreed.peers[x][0]])
    }
    return replace(findings, anchors={**findings.anchors, **better})


def _on_layers(binding: HuggingFaceBinding, rest: Sequence[Location]) -> _Proven:
    """Prove locations on copies of layers, one of each kind; on the model itself if it cannot be copied."""
    findings = binding.findings
    stands = peers_among(rest, first_of_each(binding.model, findings))
    chosen = sorted(set(stands.values()), key=_order)
    peers = {x: (stand,) for x, stand in stands.items()}
    places = {place_of(x) for x in chosen}
    kept = {findings.layers[s][n].module for s, n in places if n is not None}
    paths = [x.module for stack in findings.layers.values() for x in stack]
    kept |= {p for p in paths for x in chosen if findings.anchors[x].module.startswith(f"{p}.")}
    example = one_row(binding.example, findings.batch)
    # An equation is between all the locations of a layer, so all of them are looked at.
    inside = {x: a for x, a in findings.anchors.items() if x.layer is None or place_of(x) in places}
    copyable = _can_be_copied(binding.model, findings, kept)
    excerpt = make_excerpt(binding.model, findings, kept, torch.float32) if copyable else None
    if excerpt is None or not _runs(excerpt, in_precision(example, torch.float32)):
        with evaluating(binding.model):
            report = conformance.check(binding, example, list(inside))
        return _about(chosen, report, peers, f"{len(kept)} layers of the model itself")
    modules = dict(excerpt.named_modules())
    weights = {k: w for k, w in findings.weights.items() if w.module in modules}
    experts = {k: e for k, e in findings.experts.items() if e.experts in modules}
    there = replace(findings, anchors=inside, weights=weights, experts=experts)
    candidate = HuggingFaceBinding(excerpt, there, example=example)
    report = conformance.check(candidate, in_precision(example, torch.float32))
    return _about(chosen, report, peers, f"{len(kept)} layers of the model, copied, in float32")


def _runs(model: PreTrainedModel, example: Mapping[str, Any]) -> bool:
    """Whether a model runs: without some of its layers others may miss what these hand on to them."""
    try:
        with torch.no_grad():
            model(**example)
    except Exception:
        return False
    return True


def _about(
    locations: Sequence[Location],
    report: ConformanceReport,
    peers: Mapping[Location, tuple[Location, ...]],
    text: str,
) -> _Proven:
    """What a report says of some locations."""
    wanted = set(locations)
    proofs = tuple(p for p in report.proofs if p.location in wanted)
    return _Proven(proofs, peers, text, tuple(g for g in report.gaps if g.location in wanted))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _can_be_copied(model: PreTrainedModel, findings: Findings, kept: Collection[str]) -> bool:
    """Whether what is outside the layers, and the layers kept, have plain weights, and not too many."""
    layers = {x.module for stack in findings.layers.values() for x in stack} - set(kept)
    skipped = {id(p) for path in layers for p in model.get_submodule(path).parameters()}
    copied = [p for p in model.parameters() if id(p) not in skipped]
    plain = all(p.is_floating_point() and p.device.type != "meta" for p in copied)
    return plain and sum(p.numel() for p in copied) <= _EXCERPT


def _on_copy(
    model: PreTrainedModel,
    findings: Findings,
    example: Mapping[str, Any],
    chosen: Sequence[Location] | None = None,
    text: str = "the whole model, copied",
) -> _Proven:
    """Prove on a copy in double precision, or in single where the model mixes precisions inside."""
    row = one_row(example, findings.batch)

    def copied(dtype: torch.dtype) -> Subject:
        twin, precise = make_twin(model, row, dtype)
        return Subject(HuggingFaceBinding(twin, findings, example=precise), precise)

    failure: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        candidate, precise = copied(dtype)
        try:
            if dtype != torch.float32 and not HookGraph(candidate).run(precise).logits.isfinite().all():
                continue
            single = partial(copied, torch.float32) if dtype != torch.float32 else None
            report = conformance.check(candidate, precise, chosen, single)
            drawn = report.metadata.get("draws", "")
            held = conformance.DRAWN.format(drawn) if drawn else ""
            return _Proven(report.proofs, {}, f"{text}, in {_name(dtype)}{held}", report.gaps, drawn)
        except BindingError:
            raise
        except Exception as error:  # whatever a model raises
            # The model cannot be run, or replayed, in double precision; or an edit leads it elsewhere.
            failure = error
    raise BindingError(
        f"{type(model).__name__} could not be proven: run with edits it fails with {type(failure).__name__}: "
        f"{failure}"
    ) from failure


def _closed(findings: Findings, parts: Sequence[_Proven]) -> Findings:
    """The findings without the entries between layers that replays, there or at peers, showed to be none."""
    closed: dict[Boundary, str] = {}
    for part in parts:
        reasons = {g.location: g.reason for g in part.gaps if g.invariant == REPLAYED}
        for location in findings.anchors:
            block = block_after(location)
            peers = part.peers.get(location, ()) if part.peers else (location,)
            found = [reasons[x] for x in peers if x in reasons]
            if block is not None and found and not findings.why_closed(location.type.stack, block):
                closed.setdefault((location.type.stack, block), found[0])
    return replace(findings, closed={**findings.closed, **closed})


def _told(proof: Proof) -> str:
    """What is said of a failure, if only by how much something is off."""
    return proof.note or f"it is off by {proof.error:.2g}, of at most {proof.tolerance:.2g}"


def _concluded(
    binding: HuggingFaceBinding, findings: Findings, parts: Sequence[_Proven], family: Family | None
) -> Outcome:
    """Leave out what failed, in its peers too, and write the report."""
    if family is not None:
        refuse_wrong(family, tuple(p for part in parts for p in part.proofs), findings)
    failed: dict[Location, str] = {}
    stands: dict[Location, Location] = {}
    for part in parts:
        reasons = {p.location: f"{p.invariant} fails: {_told(p)}" for p in part.proofs if not p.holds}
        for location in findings.anchors:
            peers = part.peers.get(location, ()) if part.peers else (location,)
            bad = next((x for x in peers if x in reasons), None)
            if bad is not None:
                failed.setdefault(location, reasons[bad] if bad == location else f"{reasons[bad]} ({bad})")
            elif peers and location not in peers:
                stands.setdefault(location, peers[0])
    left = _closed(findings.without(failed), parts)
    proofs = [p for part in parts for p in part.proofs]
    drawn = [("draws", part.draws) for part in parts if part.draws]
    report = ConformanceReport(
        tuple(proofs),
        {k: str(a) for k, a in sorted(left.anchors.items(), key=lambda pair: pair[0].order)},
        dict(sorted(left.reasons.items(), key=lambda pair: pair[0].order)),
        {**binding.metadata, "proven on": "; ".join(part.text for part in parts), **dict(drawn)},
        {k: v for k, v in stands.items() if k in left.anchors},
        tuple(g for part in parts for g in part.gaps),
    )
    return Outcome(left, report)
