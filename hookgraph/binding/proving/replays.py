"""Prove that a pass can begin between two layers: the rest, run alone, gives what a whole pass gives.

Two copies of the example enter at once, as algorithms do it: what the clean pass had there, and other values.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from hookgraph.binding.proving.edits import replace_rows, rows_of, unmasked
from hookgraph.binding.proving.precision import tolerated
from hookgraph.graph.conformance import Gap, Proof
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.replay import block_after, can_start
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location

_TOLERANCE: Final = {torch.float64: 1e-5, torch.float32: 1e-3}
REPLAYED: Final = "replayed"


class Replays(NamedTuple):
    """The proofs of the boundaries from which replays are right, and why there are none from others."""

    proofs: list[Proof]
    gaps: list[Gap]


def check_replays(
    graph: HookGraph, example: Mapping[str, Any], clean: Run, locations: Sequence[Location]
) -> Replays:
    """Replay from each boundary between layers among some locations.

    Args:
        graph: the bound model.
        example: keyword arguments of the model, a batch of one.
        clean: a pass over it in which they were saved.
        locations: those to check.
    """
    found = Replays([], [])
    generator = torch.Generator().manual_seed(2)
    for location in locations:
        block = block_after(location)
        if block is None:
            continue
        if not can_start(graph.binding, location):
            reason = graph.binding.why_closed(location.type.stack, block, location)
            found.gaps.append(Gap(location, REPLAYED, reason))
            continue
        tolerance = tolerated(clean[location].dtype, _TOLERANCE)
        try:
            error = _error(graph, example, clean, location, generator)
            note = "" if error <= tolerance else f"a pass that begins here is off by {error:.1g}"
        except Exception as failure:
            error, note = float("inf"), f"no pass begins here: {type(failure).__name__}: {failure}"
        if note:
            found.gaps.append(Gap(location, REPLAYED, note))
        else:
            found.proofs.append(Proof(location, REPLAYED, True, error, tolerance))
    return found


@torch.no_grad()
def _error(
    graph: HookGraph,
    example: Mapping[str, Any],
    clean: Run,
    location: Location,
    generator: torch.Generator,
) -> float:
    """By how much the logits of a replay differ from those of a whole pass, relative to their size."""
    value = clean[location]
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value)
    both = torch.cat([value, value * (0.5 + noise)])
    whole = graph.hook(location, replace_rows(0, both)).run(rows_of(graph, example, 2)).logits
    again = graph.replay(clean, location, value=both).logits
    size = unmasked(whole).abs().max().clamp_min(1e-9)
    return float((unmasked(again) - unmasked(whole)).abs().max() / size)
