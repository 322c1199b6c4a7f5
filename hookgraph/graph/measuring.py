"""Metrics: logits -> one number per example, and what a metric may say of the logits that it reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.errors import MetricError
from hookgraph.hooks.positions import Span

Metric: TypeAlias = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]
"""Logits -> one number per example."""

Reads: TypeAlias = int | Int[Tensor, "..."]
"""Positions whose logits are read: one for all examples, one per example, or several per example."""


@runtime_checkable
class ReadingMetric(Protocol):
    """A metric that says which positions it reads, so that no other logits need be computed.

    `metric(logits)` equals `metric.of(take(logits, metric.reads))`.
    """

    @property
    def reads(self) -> Reads | None:
        """The positions; None for all of them."""
        ...

    def of(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        """The metric, from the logits at those positions alone."""
        ...

    def __call__(self, logits: Float[Tensor, "batch pos vocab"], /) -> Float[Tensor, " batch"]:
        """The metric, from all logits."""
        ...

    def rows(self, chosen: slice) -> "ReadingMetric":
        """The same metric for some examples of the batch only."""
        ...


@runtime_checkable
class TokenMetric(Protocol):
    """A metric that says of which tokens it reads the logits, so that no others need be computed.

    It stays the same when all other logits are 0.
    """

    @property
    def tokens(self) -> Int[Tensor, "..."] | None:
        """The tokens, each once or more often; None for all of them."""
        ...


def take(values: Float[Tensor, "batch pos ..."], reads: Reads) -> Float[Tensor, "batch ..."]:
    """The chosen positions of each example.

    Raises:
        MetricError: a position is out of range, or there is not one row of them per example.
    """
    batch, length = values.shape[:2]
    if isinstance(reads, int):
        if not -length <= reads < length:
            raise MetricError(f"pos={reads} is out of range, the logits have {length} positions")
        return values[:, reads : reads + 1 or None]
    if reads.shape[:1] != (batch,):
        raise MetricError(
            f"pos has shape {tuple(reads.shape)} for a batch of {batch}: give one for all, or one per example"
        )
    chosen = reads.to(values.device).view(batch, -1)
    lowest, highest = int(chosen.min()), int(chosen.max())
    if not -length <= lowest <= highest < length:
        outside = lowest if lowest < -length else highest
        raise MetricError(f"pos={outside} is out of range, the logits have {length} positions")
    return values[torch.arange(batch, device=values.device)[:, None], chosen]


def check_real(reads: Reads, span: Span) -> None:
    """See that no position that is read is padding.

    Raises:
        MetricError: one is.
    """
    rows = max(len(span.padding), len(span.ends))
    if isinstance(reads, Tensor) and len(reads) != rows:
        return  # of one row per example is spoken when the logits are there
    found = torch.full((rows, 1), reads) if isinstance(reads, int) else reads.view(rows, -1)
    first = [x - span.past for x in span.padding] * (rows // len(span.padding))
    last = [x - 1 for x in span.ends or [span.length] * rows]
    for row, columns in enumerate(found):
        for column in map(int, columns):
            if -span.length <= column < span.length and not first[row] <= column % span.length <= last[row]:
                raise MetricError(
                    f"the metric reads pos={column}, which is padding in row {row}: positions of a metric "
                    f"are columns of the logits, and the last tokens of the rows are at pos={last}"
                )


def put(values: Float[Tensor, "batch ..."], reads: Reads, length: int) -> Float[Tensor, "batch pos ..."]:
    """What `take` took, at its positions again among `length` of them; 0 at the others.

    There has to be one position for all examples, or one per example: of positions that are named twice,
    two values would be put in one place.
    """
    whole = values.new_zeros(values.shape[0], length, *values.shape[2:])
    if isinstance(reads, int):
        whole[:, reads : reads + 1 or None] = values
    else:
        rows = torch.arange(len(values), device=values.device)
        whole[rows, reads.to(values.device).view(-1)] = values[:, 0]
    return whole


@final
@dataclass(frozen=True, eq=False)
class Tiled:
    """A metric of `batch` examples, for a batch in which they stand several times, one after the other.

    Row i of the larger batch belongs to example i modulo `batch`, as in a replay.

    Args:
        metric: of one copy.
        batch: how many examples there are.
        copies: how often they stand there.
        columns: how many numbers an example has in one copy alone, where these have no positions. A model
            that compares each example with each gives more in the larger batch: only those count that
            compare a copy with itself.
    """

    metric: Metric
    batch: int
    copies: int
    columns: int | None = None

    @property
    def reads(self) -> Reads | None:
        """The positions that the metric reads, for each copy."""
        if not isinstance(self.metric, ReadingMetric):
            return None
        reads = self.metric.reads
        return reads.repeat(self.copies, *([1] * (reads.ndim - 1))) if isinstance(reads, Tensor) else reads

    @property
    def tokens(self) -> Int[Tensor, "..."] | None:
        """The tokens whose logits the metric reads."""
        return tokens_read(self.metric)

    def __call__(self, logits: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """The metric of each copy."""
        return torch.cat([self.metric(part) for part in self._parts(logits)])

    def of(self, logits: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """The metric of each copy, from the logits at its positions."""
        part = self.metric.of if isinstance(self.metric, ReadingMetric) else self.metric
        return torch.cat([part(logits) for logits in self._parts(logits)])

    def _parts(self, logits: Float[Tensor, "batch ..."]) -> Sequence[Float[Tensor, "..."]]:
        # Slices, one by one, would each have a gradient of the size of all logits.
        parts = torch.split(logits, self.batch)
        if self.columns is None or logits.shape[1:] != (self.columns * self.copies,) or self.copies == 1:
            return parts
        size = self.columns
        return [part[:, i * size : (i + 1) * size] for i, part in enumerate(parts)]

    def rows(self, chosen: slice) -> "ReadingMetric":
        """Not meaningful: copies are not divided.

        Raises:
            MetricError: always.
        """
        raise MetricError("a metric over copies of a batch cannot be divided: divide the metric itself")


def positions_read(metric: Metric | None) -> Reads | None:
    """The positions that a metric says it reads; None where it may read any."""
    return metric.reads if isinstance(metric, ReadingMetric) else None


def tokens_read(metric: Metric | None) -> Int[Tensor, "..."] | None:
    """The tokens whose logits a metric says it reads; None where it may read any."""
    return metric.tokens if isinstance(metric, TokenMetric) else None


def widened(logits: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Logits of half precision in single precision: differences of metrics are small."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def measure(metric: Metric, logits: Float[Tensor, "batch ..."], *, taken: bool) -> Float[Tensor, " batch"]:
    """One number per example. `taken`: the logits are those of the positions that the metric reads.

    Raises:
        MetricError: the metric is something else.
    """
    logits = widened(logits)
    found = metric.of(logits) if taken and isinstance(metric, ReadingMetric) else metric(logits)
    if not isinstance(found, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] (users' code)
        raise MetricError(f"the metric returned {type(found).__name__}; return one number per example")
    if found.shape != logits.shape[:1]:
        raise MetricError(
            f"the metric returned shape {tuple(found.shape)} for a batch of {logits.shape[0]}: "
            "return one number per example, without averaging over the batch"
        )
    return found if found.is_floating_point() else found.float()  # counts and hits have means, too
