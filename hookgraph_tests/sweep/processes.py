"""Each architecture in a process of its own, with a time limit: one that hangs or dies harms no other."""

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Final, Generic, TypeVar, final

import torch
import transformers

from hookgraph_tests.sweep.outcomes import Outcome, outcome_of
from hookgraph_tests.tiny import architectures

_FORK: Final = multiprocessing.get_context("fork")
"""A forked process has torch and transformers imported already."""


Result = TypeVar("Result")


@final
@dataclass(frozen=True, slots=True)
class Work(Generic[Result]):
    """What is done with each architecture.

    Args:
        attempt: done in a process of its own, with the table and the architecture.
        lost: what takes its place, with a reason too, where that process takes too long or dies.
    """

    attempt: Callable[[str, str], Result]
    lost: Callable[[str, str, str], Result]


@final
@dataclass(frozen=True, slots=True)
class _Running:
    table: str
    architecture: str
    process: BaseProcess
    deadline: float


def outcomes(names: Iterable[tuple[str, str]], *, jobs: int, seconds: float) -> Iterator[Outcome]:
    """The outcome of each (table, architecture), in the order in which they end; see `results`."""
    return results(Work(outcome_of, _not_bound), names, jobs=jobs, seconds=seconds)


def results(
    work: Work[Result], names: Iterable[tuple[str, str]], *, jobs: int, seconds: float
) -> Iterator[Result]:
    """What becomes of each (table, architecture), in the order in which they end.

    Args:
        work: what is done.
        names: what to try.
        jobs: how many at a time.
        seconds: how long one may take.
    """
    waiting = iter(names)
    running: dict[Connection, _Running] = {}
    while True:
        while len(running) < jobs and (name := next(waiting, None)) is not None:
            running.update([_start(work, *name, seconds)])
        if not running:
            return
        soonest = min(r.deadline for r in running.values())
        ready = wait(list(running), max(0.0, soonest - time.monotonic()))
        late = [pipe for pipe, r in running.items() if r.deadline <= time.monotonic()]
        for pipe in {p for p in (*ready, *late) if isinstance(p, Connection)}:
            yield _end(work, pipe, running.pop(pipe))


def _start(work: Work[Result], table: str, architecture: str, seconds: float) -> tuple[Connection, _Running]:
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_work, args=(theirs, work, table, architecture), daemon=True)
    process.start()
    theirs.close()
    return ours, _Running(table, architecture, process, time.monotonic() + seconds)


def _work(pipe: Connection, work: Work[Result], table: str, architecture: str) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    pipe.send(work.attempt(table, architecture))


def _end(work: Work[Result], pipe: Connection, running: _Running) -> Result:
    """What a process sent; if it sent nothing, that it died or took too long."""
    reason = "takes too long"
    try:
        if pipe.poll():
            return pipe.recv()
    except EOFError:
        running.process.join()
        reason = f"the process ended with code {running.process.exitcode}"
    finally:
        running.process.kill()
        running.process.join()
        pipe.close()
    return work.lost(running.table, running.architecture, reason)


def _not_bound(table: str, architecture: str, reason: str) -> Outcome:
    return Outcome(table, architecture, architectures(table)[architecture], "not bound", reason)
