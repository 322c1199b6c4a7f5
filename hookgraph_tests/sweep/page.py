"""The page of architectures, and the record beside it that says the same for programs."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import transformers

from hookgraph_tests.sweep.outcomes import Outcome
from hookgraph_tests.tiny import TABLES, swept

PAGE: Final = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
RECORD: Final = PAGE.with_suffix(".json")

_TITLES: Final = {
    "causal": ("Causal language models", "AutoModelForCausalLM"),
    "masked": ("Masked language models", "AutoModelForMaskedLM"),
    "seq2seq": ("Encoder-decoder language models", "AutoModelForSeq2SeqLM"),
    "image-text": ("Image-text models", "AutoModelForImageTextToText"),
    "base": ("Encoders", "AutoModel"),
}

_NOTES: Final = {
    "base": """\
Those architectures of `AutoModel` that have no class in the tables above, or one for speech. What `AutoModel`
makes of the others, as of BERT and RoBERTa, are the same layers without their head.
""",
}
"""What is said of a table beside its title."""

_HEADER: Final = """\
---
hide: [toc]
---

<!-- Written by `make sweep`; do not edit. -->

# Architectures

Every architecture of the automatic classes of transformers {version}: which ones `bind` binds, with how many
locations, and why others are absent. Each was built tiny and with random weights, offline, and every location
counted here is [proven](../explanation/conformance.md). What holds of your own model, `graph.report` tells.

A number after what is absent stands for the [reason](#reasons); what stands in brackets is absent in some of
the layers only. `not built` and `not run` mean that no tiny instance could be made, or run, for the sweep.
`no stream` is a net of convolutions: it neither looks tokens up nor attends to positions, and is refused. The
share that is bound is of the models that run here, without such nets.
"""


def read() -> list[Outcome]:
    """The outcomes of the sweep that wrote the page."""
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    reasons, kinds = record.get("reasons", ()), record.get("types", ())
    return [
        Outcome(
            **{k: v for k, v in row.items() if k not in ("types", "gaps")},
            types=dict(zip(kinds[row["types"][0]], row["types"][1], strict=True)) if "types" in row else {},
            gaps={kind: reasons[number] for kind, number in row.get("gaps", {}).items()},
        )
        for row in record.get("outcomes", ())
    ]


def version() -> str:
    """The version of transformers that the page is about."""
    return json.loads(RECORD.read_text(encoding="utf-8"))["transformers"]


def write(outcomes: Iterable[Outcome]) -> None:
    """Write the page and the record."""
    found = _ordered(outcomes)
    PAGE.write_text(rendered(found, transformers.__version__), encoding="utf-8")
    RECORD.write_text(_record(found, transformers.__version__), encoding="utf-8")


def rendered(outcomes: Sequence[Outcome], of_version: str) -> str:
    """The page."""
    parts = [_HEADER.format(version=of_version), _summary(outcomes)]
    numbers = _numbered(reason for o in outcomes for reason in o.gaps.values())
    for table, (title, automatic) in _TITLES.items():
        rows = [o for o in outcomes if o.table == table]
        if rows:
            parts.append(f"## {title}\n\nWhat `{automatic}` makes.\n")
            parts.append(_NOTES.get(table, ""))
            parts += [_bound(rows, numbers), _failed(rows)]
    parts.append("## Reasons\n\nThe numbers in the tables above.\n")
    parts.append("\n".join(f"{number}. {reason}" for reason, number in numbers.items()) + "\n")
    return "\n".join(part for part in parts if part)


def _ordered(outcomes: Iterable[Outcome]) -> list[Outcome]:
    places = {(t, a): i for i, (t, a) in enumerate((t, a) for t in TABLES for a in swept(t))}
    return sorted(outcomes, key=lambda o: places[o.table, o.architecture])


def _summary(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| classes of | architectures | run here | no stream | bound | bound of those with a stream |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for table, (title, automatic) in _TITLES.items():
        count = Counter(o.status for o in outcomes if o.table == table)
        if not count:
            continue
        others = count["bound"] + count["not bound"]
        share = f"{count['bound'] / others:.0%}" if others else ""
        lines.append(
            f"| [{title}](#{title.lower().replace(' ', '-')}): `{automatic}` | {count.total()} "
            f"| {others + count['no stream']} | {count['no stream']} | {count['bound']} | {share} |"
        )
    return "\n".join(lines) + "\n"


def _bound(outcomes: Sequence[Outcome], numbers: Mapping[str, int]) -> str:
    """A row per bound architecture."""
    rows = [o for o in outcomes if o.status == "bound"]
    if not rows:
        return ""
    lines = ["| architecture | class | layers | locations | absent |", "|---|---|---|--:|---|"]
    lines += [
        f"| `{o.architecture}` | `{o.model}` | {_layers(o)} | {o.locations} | {_gaps(o, numbers)} |"
        for o in rows
    ]
    return "\n".join(lines) + "\n"


def _failed(outcomes: Sequence[Outcome]) -> str:
    """A row per architecture that is not bound, or could not be run here."""
    rows = [o for o in outcomes if o.status != "bound"]
    if not rows:
        return ""
    lines = ["| architecture | class | | reason |", "|---|---|---|---|"]
    lines += [f"| `{o.architecture}` | `{o.model}` | {o.status} | {_cell(o.reason)} |" for o in rows]
    return "\n".join(lines) + "\n"


def _layers(outcome: Outcome) -> str:
    if set(outcome.layers) == {"decoder"}:
        return str(outcome.layers["decoder"])
    return ", ".join(f"{stack} {n}" for stack, n in outcome.layers.items())


def _gaps(outcome: Outcome, numbers: Mapping[str, int]) -> str:
    """What is absent by reason; in brackets what other layers have."""
    by_reason: dict[str, list[str]] = {}
    for kind, reason in outcome.gaps.items():
        name = f"({kind})" if kind in outcome.types else kind
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(
        f"{' '.join(kinds)} [{numbers[reason]}](#reasons)" for reason, kinds in by_reason.items()
    )


def _numbered(reasons: Iterable[str]) -> dict[str, int]:
    """Reasons with a number each, the most frequent first."""
    counts = Counter(reasons)
    ordered = sorted(counts, key=lambda reason: (-counts[reason], reason))
    return {reason: number for number, reason in enumerate(ordered, 1)}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _record(outcomes: Sequence[Outcome], of_version: str) -> str:
    """One line per architecture; sets of types and reasons, which recur, are listed once."""
    kinds: dict[tuple[str, ...], int] = {}
    reasons = list(_numbered(reason for o in outcomes for reason in o.gaps.values()))
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        row = {k: v for k, v in asdict(outcome).items() if v}
        if outcome.types:
            row["types"] = [kinds.setdefault(tuple(outcome.types), len(kinds)), [*outcome.types.values()]]
        if outcome.gaps:
            row["gaps"] = {kind: reasons.index(reason) for kind, reason in outcome.gaps.items()}
        rows.append(row)
    lists = {"transformers": of_version, "types": list(kinds), "reasons": reasons}
    head = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in lists.items())
    listed = ",\n".join(map(json.dumps, rows))
    return f'{{{head},\n"outcomes": [\n{listed}\n]}}\n'
