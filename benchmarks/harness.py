"""Time the same work done twice: by hookgraph, and written plainly with raw PyTorch.

Both run in one process and in turn, the order reversed every other round, so that whatever else the
machine does falls on both alike. The figure is the median of the paired ratios of processor time: on a
machine with other work, time on the wall is mostly spent waiting for a turn; its ratio is reported beside
it. Before anything is timed, the answers of both are compared.
"""

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hookgraph.algorithms.effects.footprint import Footprint

Work = Callable[[], Sequence[Tensor]]
"""One repetition of some work. Returns its answers."""

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_TOP_PAD_": "67108864",
}
"""Keeps large tensors on the heap: glibc would map and unmap them at each use, and page faults would be
most of the time."""

WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait for others sleep. By default they spin, which counts as processor time: on a machine with
other work, five times what the work itself takes."""

_ROUNDS_PER_WARM_UP = 10


class DifferentAnswersError(Exception):
    """The two ways of doing the same work disagree: there is nothing to time."""


@dataclass(frozen=True)
class Comparison:
    """The same work in two ways.

    Args:
        name: what the work is.
        plain: the work, written with raw PyTorch.
        ours: the work, through hookgraph.
        limit: the largest ratio that is required; None for a figure that is only reported.
        exact: whether the answers have to be equal bit for bit; otherwise within float32 rounding.
        effort: how often to time it, relative to the other comparisons.
        within: by how much answers that are not exact may differ.
    """

    name: str
    plain: Work
    ours: Work
    limit: float | None = None
    exact: bool = True
    effort: float = 1.0
    within: float = 1e-5


@dataclass(frozen=True)
class Peak:
    """The most that tensors took at one time, in MiB: those that each side made, its answers included.

    What the system counts would depend on the allocator, and on what else the machine is short of.
    """

    plain: float
    ours: float

    @property
    def holds(self) -> bool:
        """Whether hookgraph takes no more."""
        return self.ours <= self.plain


@dataclass(frozen=True)
class Measurement:
    """What came out: processor times in milliseconds, ratios of hookgraph to plain.

    Args:
        ratio: the median of the paired ratios of processor time, `low` and `high` their quartiles.
        wall: the same median for time on the wall.
        peak: memory.
    """

    model: str
    name: str
    plain_ms: float
    ours_ms: float
    ratio: float
    low: float
    high: float
    wall: float
    limit: float | None
    rounds: int
    peak: Peak

    @property
    def holds(self) -> bool:
        """Whether the ratio is within what is required."""
        return self.limit is None or self.ratio <= self.limit


@dataclass(frozen=True)
class _Time:
    """Seconds of the processor and on the wall."""

    cpu: float
    wall: float


def settle(threads: int) -> None:
    """Pin the number of threads, what they do while they wait and the allocator's settings, and stay off the
    network.

    The settings are read when the process starts: where they are missing, the process is replaced by the same
    one with them.
    """
    wanted = {**ALLOCATOR, **WAITING, "HF_HUB_OFFLINE": "1"}
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    if missing:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})
    torch.set_num_threads(threads)


def begin(threads: int) -> None:
    """Settle, and say under which conditions."""
    settle(threads)
    print(", ".join(f"{k} {v}" for k, v in conditions().items()), flush=True)


def conditions() -> Mapping[str, str]:
    """What the figures depend on: versions, machine and settings."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{os.cpu_count()} cores {platform.machine()}, CPU",
        "threads": str(torch.get_num_threads()),
        **{name: os.environ.get(name, "unset") for name in (*ALLOCATOR, *WAITING)},
    }


def check(comparison: Comparison) -> Peak:
    """Compare the answers of both sides, and count the memory that each takes.

    Raises:
        DifferentAnswersError: they differ, with the first place where they do.
    """
    with Footprint() as by_hand:
        plain = comparison.plain()
    with Footprint() as through_graph:
        ours = comparison.ours()
    if len(plain) != len(ours):
        raise DifferentAnswersError(f"{comparison.name}: {len(plain)} answers against {len(ours)}")
    for place, (a, b) in enumerate(zip(plain, ours, strict=True)):
        same = a.shape == b.shape and (
            torch.equal(a, b) if comparison.exact else torch.allclose(a, b, rtol=1e-4, atol=comparison.within)
        )
        if not same:
            raise DifferentAnswersError(f"{comparison.name}: answer {place} differs: {_difference(a, b)}")
    return Peak(by_hand.peak / 2**20, through_graph.peak / 2**20)


def measure(model: str, comparison: Comparison, rounds: int) -> Measurement:
    """Time both sides `rounds` times, in turn, after comparing their answers.

    Raises:
        DifferentAnswersError: the answers differ.
    """
    peak = check(comparison)
    rounds = max(2, round(rounds * comparison.effort))
    for _ in range(rounds // _ROUNDS_PER_WARM_UP):
        comparison.plain()
        comparison.ours()
    # What exists by now is no garbage: the collector is to look at what the work itself leaves behind.
    gc.collect()
    gc.freeze()
    pairs = [_pair(comparison, reverse=bool(i % 2)) for i in range(rounds)]
    gc.unfreeze()
    low, ratio, high = statistics.quantiles([b.cpu / a.cpu for a, b in pairs], n=4, method="inclusive")
    return Measurement(
        model,
        comparison.name,
        plain_ms=1000 * statistics.median(a.cpu for a, _ in pairs),
        ours_ms=1000 * statistics.median(b.cpu for _, b in pairs),
        ratio=ratio,
        low=low,
        high=high,
        wall=statistics.median(b.wall / a.wall for a, b in pairs),
        limit=comparison.limit,
        rounds=rounds,
        peak=peak,
    )


def finish(measurements: Sequence[Measurement], path: Path | None) -> None:
    """Show the figures, write them if a file is named, and end the program.

    Raises:
        typer.Exit: a figure is over its limit.
    """
    show(measurements)
    if path is not None:
        write(path, measurements)
    if not all(m.holds for m in measurements):
        raise typer.Exit(1)


def show(measurements: Iterable[Measurement]) -> None:
    """Print a table: ratio with its quartiles, and what is required."""
    table = Table(title="hookgraph / plain")
    table.add_column("model")
    table.add_column("work", overflow="fold")
    for name in (
        "plain ms",
        "ours ms",
        "ratio",
        "quartiles",
        "limit",
        "wall ratio",
        "rounds",
        "plain MiB",
        "ours MiB",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for found in measurements:
        table.add_row(
            found.model,
            found.name,
            f"{found.plain_ms:.2f}",
            f"{found.ours_ms:.2f}",
            f"[{'green' if found.holds else 'red'}]{found.ratio:.3f}[/]",
            f"{found.low:.3f} to {found.high:.3f}",
            "" if found.limit is None else f"{found.limit:.3f}",
            f"{found.wall:.3f}",
            str(found.rounds),
            f"{found.peak.plain:.0f}",
            f"[{'green' if found.peak.holds else 'red'}]{found.peak.ours:.0f}[/]",
        )
    # Off a terminal a table would be folded to 80 columns.
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def write(path: Path, measurements: Iterable[Measurement]) -> None:
    """Write the figures, and the conditions they were taken under, as JSON."""
    content = {"conditions": conditions(), "measurements": [asdict(m) for m in measurements]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _pair(comparison: Comparison, *, reverse: bool) -> tuple[_Time, _Time]:
    """The time of the plain side and of ours, one after the other."""
    if reverse:
        ours = _timed(comparison.ours)
        return _timed(comparison.plain), ours
    return _timed(comparison.plain), _timed(comparison.ours)


def _timed(work: Work) -> _Time:
    wall, cpu = time.perf_counter(), time.process_time()
    answers = work()
    spent = _Time(time.process_time() - cpu, time.perf_counter() - wall)
    # Freed outside of the timed part: the next work does not pay for it.
    del answers
    return spent


def _difference(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return f"by up to {(a.double() - b.double()).abs().max().item():.2e}"
