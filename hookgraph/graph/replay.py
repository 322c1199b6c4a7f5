"""Re-execute only what lies after a location of an earlier run."""

from jaxtyping import Shaped
from torch import Tensor

from hookgraph.errors import LocationError, ShapeMismatchError
from hookgraph.graph.abstract import Start
from hookgraph.hooks.taps import Taps
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import RESID_POST, RESID_PRE


def start_at(after: Location, value: Shaped[Tensor, "batch pos ..."], batch: int) -> tuple[Start, int]:
    """Where a replay from `after` enters the model, and how often the batch of inputs is repeated.

    Raises:
        LocationError: the location is not a boundary between blocks.
        ShapeMismatchError: the value's batch is no multiple of the inputs'.
    """
    boundary = {RESID_PRE.name: 0, RESID_POST.name: 1}.get(after.type.name)
    if boundary is None or after.layer is None or after.site is not None or after != after.whole:
        raise LocationError(
            f"a replay starts between blocks, at a whole resid.pre or resid.post, not at {after}: "
            f"save resid.pre[{after.root.layer or 0}] in the first run and start there"
        )
    copies, rest = divmod(value.shape[0], batch)
    if rest or not copies:
        raise ShapeMismatchError(
            f"the value at {after} has batch {value.shape[0]}, the inputs have {batch}: "
            "a replay's batch is a multiple of the inputs', repeated as a whole"
        )
    return Start(after.type.stack, after.layer + boundary, value), copies


def taps_from(after: Location, taps: Taps) -> tuple[Taps, list[Location]]:
    """The taps that a replay from `after` reaches, and the locations of those that it does not."""
    reached = {k: v for k, v in taps.items() if not k.root.precedes(after)}
    return reached, [k for k in taps if k not in reached]
