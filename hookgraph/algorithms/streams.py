"""What writes to the residual stream of the main stack, in causal order."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from hookgraph.errors import HookGraphError, UnknownLocationError
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
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
    STREAMS_MID,
    STREAMS_POST,
    STREAMS_PRE,
    XATTN_OUT,
)

UPDATES = frozenset({ATTN_OUT, MIXER_OUT, XATTN_OUT, MLP_OUT, EXTRA_OUT})
"""The types of what a layer adds to the stream."""
RESIDUALS = frozenset({RESID_PRE, RESID_MID, RESID_XMID, RESID_POST, STREAMS_PRE, STREAMS_MID, STREAMS_POST})
"""The types of the stream itself."""


def updates(graph: HookGraph) -> tuple[Location, ...]:
    """Everything that is added to the stream after the embeddings."""
    return tuple(x for x in graph.locations if x.site is None and x.type in UPDATES)


def updates_of_all_stacks(graph: HookGraph) -> tuple[Location, ...]:
    """Everything that is added to a stream, the encoder's or that of a vision tower too."""
    names = {kind.name for kind in UPDATES}
    return tuple(x for x in graph.locations if x.site is None and x.type.name in names)


def last_residual(graph: HookGraph) -> Location:
    """The stream after the last layer.

    Raises:
        UnknownLocationError: the model has no such stream.
    """
    return graph.every(RESID_POST)[-1]


def check_sum(graph: HookGraph, inputs: Inputs, purpose: str, instead: str) -> None:
    """Whether the stream after the last layer of the model itself is the sum of what is added to it.

    Args:
        graph: the hooked model; its hooks and subgraphs do not apply.
        inputs: what is run.
        purpose: what takes it to be so.
        instead: what does not.

    Raises:
        HookGraphError: it is not, as where norms or numbers stand in the stream, or it begins anew.
    """
    plain = replace(graph, registrations=(), subgraphs=())
    first, last, written = RESID_PRE[0], last_residual(plain), updates(plain)
    run = plain.run(inputs, save=[first, *written, last])
    stream = run[last]
    total = torch.stack([run[first], *(run[x] for x in written)]).sum(0, dtype=torch.float64)
    gap = float((total - stream).abs().max() / stream.abs().max())
    if gap > len(written) * torch.finfo(stream.dtype).eps ** 0.75:
        raise HookGraphError(
            f"{purpose}: {last} is not {first} and what is added to it, but off by {gap:.0%}: norms or "
            f"numbers stand in the stream of this model, or it begins anew. {instead}"
        )


def own_update(location: Location, among: Iterable[Location]) -> Location | None:
    """The update that a location inside a branch of a layer goes into, or is; None for the stream itself.

    A branch is what lies between two updates: the next one of the layer is the location's own.
    """
    root = location.root
    if root.layer is None or root.type.name in {kind.name for kind in RESIDUALS}:
        return None
    here = [x for x in among if x.layer == root.layer and x.type.stack == root.type.stack]
    later = [x for x in here if x.type.stage >= root.type.stage]
    return min(later, key=lambda x: x.order, default=None)


def if_present(graph: HookGraph, location: Location) -> Location | None:
    """A location if the graph has it, or None."""
    try:
        return graph.check(location)
    except UnknownLocationError:
        return None
