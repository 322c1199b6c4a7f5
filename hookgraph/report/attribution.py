"""The page of an attribution: what was asked, what carries the answer, and how far to trust it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, final

from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.ranking import Ranking
from hookgraph.graph.conformance import ConformanceReport, Proof
from hookgraph.ontology.locations import Location
from hookgraph.report import page
from hookgraph.report.breakdown import total, verdict
from hookgraph.report.figures import Picture
from hookgraph.report.page import Page, Section
from hookgraph.report.prompts import PromptPair

SIGN: Final = (
    "An effect is the change of the metric, logit(answer) − logit(wrong), when the node takes its value from "
    "the corrupt prompt. Negative (blue): without this node the answer is weaker, so the node carries it. "
    "Positive (orange): the node speaks against it."
)


@final
@dataclass(frozen=True, slots=True)
class Attribution:
    """Everything that the page of an attribution shows.

    Args:
        title: what the page is about.
        model: one line about the model.
        pair: the prompts that were compared.
        effect: the effects that the rankings are taken from.
        rankings: nodes under a heading each, the most important first.
        maps: figures with their captions.
        conformance: what was proven of the locations.
        more: sections to add before the conventions.
        top: how many nodes of a ranking are listed.
    """

    title: str
    model: str
    pair: PromptPair
    effect: PatchingEffect
    rankings: Mapping[str, Ranking]
    maps: Sequence[tuple[Picture, str]]
    conformance: ConformanceReport
    more: tuple[Section, ...] = ()
    top: int = 10


def attribution_page(found: Attribution) -> Page:
    """The page: prompts, rankings with estimate and exact effect, maps, conventions, conformance."""
    sections = [_question(found)]
    sections += [_ranking(name, ranking, found) for name, ranking in found.rankings.items()]
    if found.maps:
        maps = tuple(page.picture(image, caption) for image, caption in found.maps)
        sections.append(Section("Where it happens", maps))
    sections += found.more
    sections += [_conventions(found), _conformance(found.conformance)]
    return Page(found.title, found.model, tuple(sections))


def _question(found: Attribution) -> Section:
    pair = found.pair
    examples = 1 if found.effect.total_effect is None else len(found.effect.total_effect)
    one = "this pair: " if examples > 1 else ""
    numbers = [
        (f"{one}logit difference, clean", f"{pair.clean.difference:+.2f}"),
        (f"{one}logit difference, corrupt", f"{pair.corrupt.difference:+.2f}"),
    ]
    if examples > 1:
        change = pair.corrupt.difference - pair.clean.difference
        numbers.append((f"{one}corrupt − clean", f"{change:+.2f}"))
    of = f"mean of {examples} pairs: " if examples > 1 else ""
    numbers.append((f"{of}total effect", f"{total(found.effect):+.2f}"))
    return Section(
        f"{pair.answer} or {pair.wrong}?", (page.prompts(pair), page.facts(numbers), page.paragraph(SIGN))
    )


def _ranking(name: str, ranking: Ranking, found: Attribution) -> Section:
    measured = sum(n.exact is not None for n in ranking)
    pieces = [page.ranking(ranking[: found.top], tokens=found.pair.labels)]
    if measured:
        agreement = ranking.correlation if measured > 1 else math.nan
        rank = "" if math.isnan(agreement) else f" Rank correlation over {measured} nodes: {agreement:.2f}."
        text = f"The estimate is a first-order one; exact is measured by patching each node alone.{rank}"
        pieces.append(
            page.paragraph(f"{text} Largest gap: {ranking.spread:.3f}.", css="note"),
        )
    return Section(name, tuple(pieces))


def _conventions(found: Attribution) -> Section:
    rows = [
        (k.replace("_", " "), str(v)) for k, v in asdict(found.effect.convention).items() if v not in ("", 0)
    ]
    rows += [(k, _public(k, v)) for k, v in found.effect.metadata.items() if v]
    return Section("Conventions", (page.table(("what", "value"), rows),))


def _public(key: str, value: str) -> str:
    """What a page says of a model: of one that was loaded from a folder its name, not where it lay."""
    return Path(value).name if key == "model" and Path(value).is_absolute() else value


def _conformance(report: ConformanceReport) -> Section:
    """What was proven, and on demand each location."""
    worst: dict[Location, dict[str, Proof]] = {}
    for proof in report.proofs:
        known = worst.setdefault(proof.location, {})
        other = known.get(proof.invariant, proof)
        known[proof.invariant] = max(other, proof, key=lambda p: (not p.holds, p.error))
    rows = [(str(x), "; ".join(map(_outcome, proofs.values()))) for x, proofs in worst.items()]
    rows += [(str(location), f"absent: {reason}") for location, reason in report.absent.items()]
    unchecked = dict.fromkeys((g.invariant, g.reason) for g in report.gaps)
    rows += [("some locations", f"{name} not checked: {reason}") for name, reason in unchecked]
    everything = page.folded("Each location", page.table(("location", "invariants"), rows))
    return Section("Conformance", (page.paragraph(f"{verdict(report)}."), everything))


def _outcome(proof: Proof) -> str:
    return f"{proof.invariant}: {'holds' if proof.holds else f'off by {proof.error:.1e}'}"
