"""Results as tables for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from rich.table import Table
from rich.text import Text

from hookgraph.algorithms.flow.tokens import Flow
from hookgraph.algorithms.ranking import Ranking
from hookgraph.graph.conformance import INVARIANTS, OF_SOME, ConformanceReport, Proof
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.report.breakdown import node_name
from hookgraph.report.prompts import Prompt, PromptPair

if TYPE_CHECKING:
    import pandas

NEGATIVE: Final = "dodger_blue2"
POSITIVE: Final = "dark_orange"
_BAR: Final = 12
_NAMED: Final = 4
"""Up to this many kinds of locations are named in one cell."""
_FREE: Final = (Dimension.BATCH, Dimension.POS, Dimension.KEY_POS)
"""Axes whose size the inputs decide."""


def locations_table(sizes: Mapping[Location, Sequence[int]]) -> Table:
    """One row per kind of location: its axes with their sizes, and the layers that have it.

    Args:
        sizes: the shape of each location in some run.
    """
    table = _table("location", "axes", "layers")
    rows: dict[tuple[str, str], list[int]] = {}
    for location, shape in sizes.items():
        axes = " ".join(
            d.value if d in _FREE else f"{d.value}={n}"
            for d, n in zip(location.type.dims, shape, strict=True)
        )
        layers = rows.setdefault((_unlayered(location), axes), [])
        layers += [] if location.layer is None else [location.layer]
    for (name, axes), layers in rows.items():
        table.add_row(name, Text(axes), ranges(layers))
    return table


def conformance_table(report: ConformanceReport) -> Table:
    """One row per kind of location: the largest error over the layers of each invariant that was checked, and
    which of those hold that are of some locations only.
    """
    checked = [i for i in INVARIANTS if any(p.invariant == i for p in report.proofs)]
    columns = [i for i in checked if i not in OF_SOME]
    table = _table("location", "layers", *columns, *(["also"] if len(columns) < len(checked) else []), gap=1)
    kinds: dict[str, list[Location]] = {}
    for location in report.mechanisms:
        kinds.setdefault(_unlayered(location), []).append(location)
    for proof in report.failures:
        kinds.setdefault(_unlayered(proof.location), [])
    for kind, locations in kinds.items():
        proofs = [p for p in report.proofs if _unlayered(p.location) == kind]
        cells = [_verdict([p for p in proofs if p.invariant == i]) for i in columns]
        also = [i for i in OF_SOME if any(p.invariant == i and p.holds for p in proofs)]
        layers = ranges(x.layer for x in locations if x.layer is not None)
        table.add_row(kind, layers, *cells, *([", ".join(also)] if len(columns) < len(checked) else []))
    return table


def failures_table(report: ConformanceReport) -> Table:
    """One row per invariant that does not hold: where, by how much, within what it had to be."""
    table = _table("fails", "invariant", "off by", "tolerance", "")
    for proof in report.failures:
        numbers = f"{proof.error:.1e}", f"{proof.tolerance:.0e}"
        table.add_row(str(proof.location), proof.invariant, *numbers, Text(proof.note))
    return table


def unchecked_table(report: ConformanceReport) -> Table:
    """One row per invariant and reason for which it could not be checked: where."""
    table = _table("not checked", "at", "why")
    reasons: dict[tuple[str, str], list[str]] = {}
    for gap in report.gaps:
        reasons.setdefault((gap.invariant, gap.reason), []).append(_unlayered(gap.location))
    for (invariant, reason), kinds in reasons.items():
        names = list(dict.fromkeys(kinds))
        where = ", ".join(names) if len(names) <= _NAMED else f"{len(names)} kinds of locations"
        table.add_row(invariant, Text(where), Text(reason))
    return table


def mechanisms_table(report: ConformanceReport) -> Table:
    """One row per kind of location and way to reach it: the layers, and where, `*` for their numbers."""
    table = _table("location", "layers", "reached as")
    ways: dict[tuple[str, str], list[int]] = {}
    for location, mechanism in report.mechanisms.items():
        general = mechanism.replace(f".{location.layer}.", ".*.").replace(f".{location.layer}[", ".*[")
        layers = ways.setdefault((_unlayered(location), general), [])
        layers += [] if location.layer is None else [location.layer]
    for (kind, mechanism), layers in ways.items():
        table.add_row(kind, ranges(layers), Text(mechanism))
    return table


def absent_table(report: ConformanceReport) -> Table:
    """One row per kind of location that the model lacks: the layers, and why."""
    table = _table("absent", "layers", "why")
    reasons: dict[tuple[str, str], list[int]] = {}
    for location, reason in report.absent.items():
        layers = reasons.setdefault((_unlayered(location), reason), [])
        layers += [] if location.layer is None else [location.layer]
    for (kind, reason), layers in reasons.items():
        table.add_row(kind, ranges(layers), Text(reason))
    return table


def ranking_table(ranking: Ranking, *, node: str = "node", tokens: Sequence[str] = ()) -> Table:
    """One row per node: the estimate, the exact effect where it was measured, and a bar."""
    measured = any(n.exact is not None for n in ranking)
    table = _table(node, "estimate", *(["exact"] if measured else []), "", right=(1, 2) if measured else (1,))
    scale = max((abs(x) for n in ranking for x in (n.effect, n.exact) if x is not None), default=1.0) or 1.0
    for n in ranking:
        numbers = [n.effect, n.exact] if measured else [n.effect]
        cells = [Text("–") if x is None else Text(f"{x:+.3f}", style=_colour(x)) for x in numbers]
        shown = n.effect if n.exact is None else n.exact
        bar = "█" * max(1, round(_BAR * abs(shown) / scale))
        table.add_row(Text(node_name(n.location, tokens)), *cells, Text(bar, style=_colour(shown)))
    return table


def answers_table(pair: PromptPair) -> Table:
    """Both prompts, and how likely either answer is after each."""
    table = _table("", "prompt", pair.answer, pair.wrong, "logit difference", right=(2, 3, 4))
    for name, prompt in (("clean", pair.clean), ("corrupt", pair.corrupt)):
        table.add_row(name, _marked(pair, prompt), *_answers(prompt))
    return table


def frame_table(frame: "pandas.DataFrame", first: str = "") -> Table:
    """A data frame: numbers with three decimals, nothing where there is none.

    Args:
        frame: the rows, named by its index.
        first: the heading of their names.
    """
    table = _table(first, *map(str, frame.columns), right=range(1, len(frame.columns) + 1))
    for name, row in zip(frame.index, frame.itertuples(index=False), strict=True):
        table.add_row(Text(str(name)), *(Text(_cell(x)) for x in row))
    return table


def flows_table(flows: Iterable[Flow], tokens: Sequence[str]) -> Table:
    """One row per edge between tokens that ends in the stream, the last layer first.

    Args:
        flows: the edges, in causal order.
        tokens: what the positions are called.
    """
    table = _table("layer", "to", "share", "from", "", right=(2,))
    for flow in reversed([x for x in flows if x.enters]):
        source = "" if flow.key is None else f"{tokens[flow.key]} ({flow.key})"
        cells = [f"{tokens[flow.pos]} ({flow.pos})", f"{flow.share:.3f}", source, flow.kind]
        table.add_row(str(flow.layer), *map(Text, cells))
    return table


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3f}"
    return str(value)


def ranges(layers: Iterable[int]) -> str:
    """Layer numbers in few characters.

    >>> ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _table(*columns: str, right: Sequence[int] = (), gap: int = 2) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
    for i, name in enumerate(columns):
        numeric = i in right
        table.add_column(Text(name), justify="right" if numeric else "left", no_wrap=numeric or i == 0)
    return table


def _unlayered(location: Location) -> str:
    """The name of a location without its layer."""
    name = str(location)
    return name if location.root.layer is None else name.replace(f"[{location.root.layer}]", "", 1)


def _verdict(proofs: Sequence[Proof]) -> Text:
    """Whether an invariant holds in every layer, and by how much it is off at most."""
    if not proofs:
        return Text("–", style="dim")
    worst = max(proofs, key=lambda p: (not p.holds, p.error))
    off = f" {worst.error:.0e}" if worst.error else ""
    return Text(f"✓{off}", style="green") if worst.holds else Text(f"✗{off}", style="bold red")


def _marked(pair: PromptPair, prompt: Prompt) -> Text:
    """The prompt, its words that the other prompt has not at the same place in bold."""
    words, others = prompt.text.split(" "), [p.text.split(" ") for p in (pair.clean, pair.corrupt)]
    if len(others[0]) != len(others[1]):
        return Text(prompt.text)
    differ = [a != b for a, b in zip(*others, strict=True)]
    styled = [Text(w, style="bold" if bold else "") for w, bold in zip(words, differ, strict=True)]
    return Text(" ").join(styled)


def _answers(prompt: Prompt) -> tuple[str, str, str]:
    return f"{prompt.answer:.1%}", f"{prompt.wrong:.1%}", f"{prompt.difference:+.2f}"


def _colour(value: float) -> str:
    return POSITIVE if value > 0 else NEGATIVE
