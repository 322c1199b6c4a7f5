"""What the program of a benchmark does: each comparison in turn, its time and peak memory, and a table."""

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.harness import Comparison, Measurement, begin, finish, measure
from benchmarks.overhead import Subject

Comparisons = Callable[[str], Iterable[tuple[Subject, Comparison]]]
"""What a benchmark compares, of which model: those whose name contains some text."""


def run(comparisons: Comparisons, *, rounds: int, threads: int, json: Path | None, only: str) -> None:
    """Measure everything, and print it as it comes and as a table.

    Raises:
        DifferentAnswersError: the two sides of a comparison differ.
        typer.Exit: a figure is over its limit.
    """
    begin(threads)
    found: list[Measurement] = []
    for subject, comparison in comparisons(only):
        found.append(measure(subject.name, comparison, rounds))
        print(f"  {subject.name}: {comparison.name}: {found[-1].ratio:.3f}", flush=True)
    finish(found, json)
