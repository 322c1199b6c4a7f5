"""What is handed to a graph: locations, and what is mistaken for one."""

from collections.abc import Sequence

from hookgraph.errors import LocationError
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType


def chooses_steps(location: Location) -> bool:
    """Whether a location is that of some passes of a generation only."""
    return any(dim is Dimension.STEP for dim, _ in location.index)


def a_location(found: object) -> Location:
    """What was given, if it is a location.

    Raises:
        LocationError: it is a kind of location, or text.
    """
    if isinstance(found, Location):
        return found
    if isinstance(found, LocationType):
        name = found.qualified_name
        raise LocationError(
            f"{name} is a kind of location: use graph.every(...) for all layers, or one, as in {name}[0]"
        )
    if isinstance(found, str):
        raise LocationError(f"{found!r} is text: write Location.parse({found!r})")
    raise LocationError(f"{found!r} is no location, such as RESID_POST[6] or ATTN_Z[9].at(head=3)")


def asked(save: Sequence[Location] | Location) -> Sequence[Location]:
    """What is to be saved, as a sequence."""
    return [save] if isinstance(save, Location) else save
