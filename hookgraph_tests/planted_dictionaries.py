"""Dictionaries for planted transformers: latents whose edges are known.

Each writer of `planted_circuits` has two latents, active where what it writes along its direction is above or
below zero. Every dictionary has the latents of all writers; those of others are never active at its site.
"""

from collections.abc import Iterator
from typing import Final

import torch

from hookgraph.locations import ATTN_OUT, ATTN_Z, EMBED, LOGITS, MLP_OUT
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs import Autoencoder, AutoencoderGraph
from hookgraph_tests.planted_circuits import EDGES, WRITERS, direction

SITES: Final = (EMBED, *(x for i in (0, 1) for x in (ATTN_OUT[i], MLP_OUT[i])))


def planted_dictionaries() -> list[AutoencoderGraph]:
    """One at each site."""
    rows = torch.stack([sign * direction(w) for w in WRITERS for sign in (1.0, -1.0)])
    return [AutoencoderGraph(Autoencoder(rows.T.clone(), rows), site) for site in SITES]


def writer_of(node: Location) -> Location | None:
    """The writer that a latent is of; None for errors."""
    if node == LOGITS:
        return LOGITS
    latents = [i for axis, i in node.index if axis == Dimension.LATENT and isinstance(i, int)]
    return WRITERS[latents[0] // 2] if latents else None


def edges_between_writers() -> set[tuple[Location, Location]]:
    """Which writer acts on which directly, by the reader that belongs to it."""
    return {(writer, made) for writer, reader in EDGES for made in _made_of(reader)}


def _made_of(reader: Location) -> Iterator[Location]:
    """What is written by what reads."""
    if reader == LOGITS:
        yield LOGITS
    elif reader.type.name == "mlp.in":
        yield MLP_OUT[reader.layer or 0]
    else:
        head = next(i for _, i in reader.index if isinstance(i, int))
        yield ATTN_Z[reader.layer or 0].at(head=head)
