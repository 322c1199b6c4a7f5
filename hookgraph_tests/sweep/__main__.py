"""The command line of the sweep."""

import argparse
import os
from collections import Counter
from collections.abc import Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hookgraph_tests.sweep.effects.trying import Effects, effects_of
from hookgraph_tests.sweep.outcomes import Outcome
from hookgraph_tests.sweep.page import read, write
from hookgraph_tests.sweep.processes import Work, outcomes, results
from hookgraph_tests.tiny import TABLES, swept


def main(arguments: Sequence[str] | None = None) -> None:
    """Try the architectures that were asked for, tell what became of each, write the page if asked."""
    parser = argparse.ArgumentParser(prog="python -m hookgraph_tests.sweep", description=__doc__)
    parser.add_argument("--table", choices=TABLES, action="append", help="a mapping; by default all")
    parser.add_argument("--only", default="", help="architectures, separated by commas; by default all")
    parser.add_argument("--jobs", type=int, default=2, help="how many processes at a time")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long one architecture may take")
    parser.add_argument("--gaps", action="store_true", help="print why locations are absent")
    parser.add_argument("--effects", action="store_true", help="compare effects with brute force instead")
    parser.add_argument("--write", action="store_true", help="write docs/reference/architectures.md")
    options = parser.parse_args(arguments)
    only = {name for name in options.only.split(",") if name}
    names = [(t, a) for t in options.table or TABLES for a in swept(t) if not only or a in only]
    if options.effects:
        _effects(names, jobs=options.jobs, seconds=options.seconds)
        return
    found: list[Outcome] = []
    for outcome in outcomes(names, jobs=options.jobs, seconds=options.seconds):
        found.append(outcome)
        _tell(outcome, gaps=options.gaps)
    print(*(f"{n} {status}" for status, n in Counter(o.status for o in found).most_common()), sep=", ")
    if options.write:
        kept = {(o.table, o.architecture): o for o in (read() if only or options.table else ())}
        write([*{**kept, **{(o.table, o.architecture): o for o in found}}.values()])


def _effects(names: Sequence[tuple[str, str]], *, jobs: int, seconds: float) -> None:
    """Compare what the algorithms give with brute force; exit with 1 where a number is wrong."""
    statuses = Counter[str]()
    for effects in results(Work(effects_of, Effects.lost), names, jobs=jobs, seconds=seconds):
        statuses[effects.status] += 1
        print(*effects.lines(), sep="\n", flush=True)
    print(*(f"{n} {status}" for status, n in statuses.most_common()), sep=", ")
    if statuses["failed"]:
        raise SystemExit(1)


def _tell(outcome: Outcome, *, gaps: bool) -> None:
    detail = outcome.reason or f"{outcome.locations} locations, layers {dict(outcome.layers)}"
    print(f"{outcome.table:<10} {outcome.architecture:<28} {outcome.status:<9} {detail}", flush=True)
    if gaps:
        for kind, reason in outcome.gaps.items():
            print(f"    {kind}: {reason}")


if __name__ == "__main__":
    main()
