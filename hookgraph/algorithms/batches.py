"""Pairs of inputs as a stream of batches, each with its metric."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

from torch import Tensor

from hookgraph.errors import InputError, MetricError
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.measuring import Metric

Batch: TypeAlias = tuple[Inputs, Inputs | None] | tuple[Inputs, Inputs | None, Metric]
"""Clean and corrupt inputs; and their own metric, where answers differ from batch to batch."""


@final
@dataclass(frozen=True, eq=False)
class PairBatch:
    """Clean and corrupt inputs, and what is measured."""

    clean: Inputs
    corrupt: Inputs | None
    metric: Metric


def stream_of(data: Iterable[Inputs]) -> Iterable[Inputs]:
    """The batches of a data set.

    Raises:
        InputError: it is a single one, whose letters, names or rows would each be taken for a batch.
    """
    if isinstance(data, str | Mapping | Tensor):
        raise InputError(
            f"the data are a stream of batches, and this is one of them, a {type(data).__name__}: pass a "
            "list of batches, [inputs]"
        )
    return data


def batches(pairs: Iterable[Batch], metric: Metric | None) -> Iterator[PairBatch]:
    """The batches of a stream, each with its own metric or else the one for all.

    Raises:
        InputError: there is none, or one is no pair.
        MetricError: a batch has no metric.
    """
    found = False
    for batch in pairs:
        found = True
        if not isinstance(batch, tuple) or len(batch) not in (2, 3):  # pyright: ignore[reportUnnecessaryIsInstance] (users)
            raise InputError(
                "a batch of pairs is (clean, corrupt) or (clean, corrupt, metric), not "
                f"{type(batch).__name__}: pass a list of batches, [(clean, corrupt)] if there is one"
            )
        own = batch[2] if len(batch) == 3 else metric
        if own is None:
            raise MetricError("nothing is measured: give `metric`, or one with each batch")
        yield PairBatch(batch[0], batch[1], own)
    if not found:
        raise InputError("there are no pairs: pass an iterable of (clean, corrupt) batches")
