"""What writes to the stream and what reads from it: heads, MLPs, the embedding, the logits.

A writer adds to the stream: the embedding, each head's result, each MLP. A reader takes a norm of the stream:
the queries, keys and values of each head, each MLP, the logits. A writer acts on the readers behind it whose
stream holds it: so says the causal order, and in a parallel block no head acts on the MLP beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from hookgraph.algorithms.streams import if_present, last_residual, updates
from hookgraph.errors import HookGraphError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import (
    ATTN_IN,
    ATTN_K,
    ATTN_K_IN,
    ATTN_OUT,
    ATTN_Q,
    ATTN_Q_IN,
    ATTN_V,
    ATTN_V_IN,
    ATTN_Z,
    EMBED,
    LOGITS,
    MIXER_IN,
    MIXER_OUT,
    MLP_IN,
    MLP_OUT,
    RESID_MID,
    RESID_PRE,
)

_SPLIT = ((ATTN_Q, ATTN_Q_IN), (ATTN_K, ATTN_K_IN), (ATTN_V, ATTN_V_IN))
"""What heads make of the stream, and what each reads for it."""
_READ: dict[LocationType, LocationType] = {ATTN_OUT: ATTN_IN, MLP_OUT: MLP_IN, MIXER_OUT: MIXER_IN}


@final
@dataclass(frozen=True)
class Writer:
    """Something that adds to the stream.

    Args:
        place: how its nodes are called: `attn.z` by head, `mlp.out`, `embed`.
        update: what it is a part of, where it enters the stream: the stream itself, of the embedding.
    """

    place: Location
    update: Location

    @property
    def dims(self) -> tuple[Dimension, ...]:
        """The axes that tell its nodes apart."""
        return (Dimension.HEAD,) if Dimension.HEAD in self.place.type.dims else ()


@final
@dataclass(frozen=True)
class Reader:
    """Something that reads the stream.

    Args:
        place: how its nodes are called: `attn.q`, `attn.k` or `attn.v` by head, `mlp.in`, `logits`.
        stream: the stream that it reads.
        whole: what it reads, after the norm; None for the logits.
        copies: the same once per head; None where there is one.
    """

    place: Location
    stream: Location
    whole: Location | None
    copies: Location | None = None

    @property
    def dims(self) -> tuple[Dimension, ...]:
        """The axes that tell its nodes apart."""
        axes = (Dimension.HEAD, Dimension.KV_HEAD)
        return tuple(d for d in self.place.type.dims if d in axes) if self.copies is not None else ()

    def is_reached_by(self, writer: Writer) -> bool:
        """Whether the stream that it reads holds what the writer adds."""
        return writer.update == self.stream or writer.update.precedes(self.stream)


def writers_of(graph: HookGraph) -> list[Writer]:
    """Every writer, in causal order.

    Raises:
        UnknownLocationError: the model has no embedding.
        HookGraphError: something adds to the stream of which no location tells what it reads.
    """
    found = [Writer(graph.check(EMBED), graph.check(RESID_PRE[0]))]
    for update in updates(graph):
        if update.type not in _READ:
            raise HookGraphError(f"edges between components: no location tells what {update} reads")
        heads = if_present(graph, ATTN_Z[update.layer or 0]) if update.type == ATTN_OUT else None
        found.append(Writer(heads or update, update))
    return found


def readers_of(graph: HookGraph) -> list[Reader]:
    """Every reader, in causal order; the logits read the stream after the last layer."""
    found: list[Reader] = []
    for update in updates(graph):
        layer = update.layer or 0
        reads = graph.check(_READ[update.type][layer])
        middle = if_present(graph, RESID_MID[layer])
        before = [x for x in (RESID_PRE[layer], middle) if x is not None and x.precedes(reads)]
        stream = graph.check(before[-1])
        split = _heads(graph, layer) if update.type == ATTN_OUT else []
        if split:
            found += [Reader(place, stream, reads, copies) for place, copies in split]
        else:
            found.append(Reader(reads, stream, reads))
    return [*found, Reader(LOGITS, last_residual(graph), None)]


def _heads(graph: HookGraph, layer: int) -> list[tuple[Location, Location]]:
    """Queries, keys and values, with what each head reads for them; none unless all are there."""
    pairs = [(if_present(graph, a[layer]), if_present(graph, b[layer])) for a, b in _SPLIT]
    found = [(a, b) for a, b in pairs if a is not None and b is not None]
    return found if len(found) == len(_SPLIT) else []


def connections(writers: Sequence[Writer], readers: Sequence[Reader]) -> Iterator[tuple[Writer, Reader]]:
    """Every writer with every reader that it reaches."""
    for reader in readers:
        for writer in writers:
            if reader.is_reached_by(writer):
                yield writer, reader
