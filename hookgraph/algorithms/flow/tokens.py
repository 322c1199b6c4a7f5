"""Shares as edges from token to token."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from jaxtyping import Bool
from torch import Tensor

from hookgraph.algorithms.flow.dividing import Shares
from hookgraph.algorithms.proximity import Number
from hookgraph.errors import HookGraphError
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import (
    ATTN_OUT,
    EXTRA_OUT,
    MIXER_OUT,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    RESID_XMID,
    XATTN_OUT,
)

if TYPE_CHECKING:
    import networkx

_STREAMS: Final = {RESID_MID: "A", RESID_XMID: "C", RESID_POST: "I"}
_UPDATES: Final = {MLP_OUT: "M", ATTN_OUT: "T", MIXER_OUT: "S", XATTN_OUT: "K", EXTRA_OUT: "E"}
"""The letters of nodes; X0, A, M and I are those of the published graph."""


@final
@dataclass(frozen=True, slots=True)
class Flow:
    """An edge: what goes from one node to another, as a share of the sum at its end."""

    source: str
    target: str
    kind: str
    """`residual`, `attention`, `bias`, or the type of an update that is one part, such as `mlp.out`."""
    layer: int
    key: int | None
    """The position that it comes from; None for biases."""
    pos: int
    share: float
    head: int | None = None
    enters: bool = True
    """Whether it ends in the stream. An update that is one part has an edge in and one out, of one share."""


def flows(
    layers: Sequence[Sequence[Shares]],
    real: Bool[Tensor, " pos"],
    example: int,
    threshold: Number,
    *,
    heads: bool,
) -> Iterator[Flow]:
    """The shares of one example above a threshold, between tokens that are no padding, in causal order."""
    kept = set(real.nonzero().flatten().tolist())
    for number, found in enumerate(layers):
        for shares in found:
            for flow in _of_sum(shares, number, example, threshold, heads=heads):
                if flow.pos in kept and (flow.key is None or flow.key in kept):
                    yield flow


def _of_sum(shares: Shares, layer: int, example: int, threshold: Number, *, heads: bool) -> Iterator[Flow]:
    whole, before = _stream(shares.whole, layer), _stream(shares.before, layer)
    for (pos,), share in _above(shares.residual[example], threshold):
        yield Flow(f"{before}_{pos}", f"{whole}_{pos}", "residual", layer, pos, pos, share)
    for update, value in shares.updates.items():
        if update.type == ATTN_OUT and value.ndim == 4:
            yield from _attention(value[example], before, whole, layer, threshold, heads=heads)
            continue
        name, kind = f"{_UPDATES[update.type]}{layer}", update.type.name
        at = value[example].flatten(1).sum(1) if value.ndim > 2 else value[example]
        for (pos,), share in _above(at, threshold):
            yield Flow(f"{before}_{pos}", f"{name}_{pos}", kind, layer, pos, pos, share, enters=False)
            yield Flow(f"{name}_{pos}", f"{whole}_{pos}", kind, layer, pos, pos, share)
    for value in shares.biases.values():
        for (pos,), share in _above(value[example], threshold):
            yield Flow(f"B{layer}", f"{whole}_{pos}", "bias", layer, None, pos, share)


def _attention(
    value: Tensor, before: str, whole: str, layer: int, threshold: Number, *, heads: bool
) -> Iterator[Flow]:
    for (pos, key, *head), share in _above(value if heads else value.sum(-1), threshold):
        chosen = head[0] if head else None
        yield Flow(f"{before}_{key}", f"{whole}_{pos}", "attention", layer, key, pos, share, chosen)


def _above(value: Tensor, threshold: Number) -> Iterator[tuple[list[int], float]]:
    places = (value > threshold).nonzero()
    yield from zip(places.tolist(), value[tuple(places.T)].tolist(), strict=True)


def _stream(location: Location, layer: int) -> str:
    """The name of a stream, less the position."""
    if location.type == RESID_PRE:
        return f"I{layer - 1}" if layer else "X0"
    return f"{_STREAMS[location.type]}{layer}"


def backwards(every: Iterable[Flow], end: str) -> list[Flow]:
    """The edges over which the end can be reached, in causal order."""
    reaching = {end}
    found: list[Flow] = []
    for flow in reversed(list(every)):
        if flow.target in reaching:
            reaching.add(flow.source)
            found.append(flow)
    return found[::-1]


def to_networkx(found: Iterable[Flow], labels: Sequence[str]) -> "networkx.MultiDiGraph[str]":
    """Edges as a graph, whose nodes know their layer, position and token.

    Raises:
        HookGraphError: networkx is not installed.
    """
    try:
        import networkx as nx
    except ImportError as error:
        raise HookGraphError(
            "graphs are made with networkx, which is not installed: pip install 'hookgraph[graph]'"
        ) from error
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    for flow in found:
        for name, pos in ((flow.source, flow.key), (flow.target, flow.pos)):
            graph.add_node(name, pos=pos, token=None if pos is None else labels[pos])
        about = {"kind": flow.kind, "weight": flow.share, "layer": flow.layer}
        key = flow.kind if flow.head is None else f"head {flow.head}"
        graph.add_edge(
            flow.source, flow.target, key, **about, **({} if flow.head is None else {"head": flow.head})
        )
    return graph
