"""What must hold of a subgraph before it is injected."""

from collections.abc import Callable, Sequence

from hookgraph.errors import SubgraphError, UnknownLocationError
from hookgraph.graph.abstract import AbstractSubgraph
from hookgraph.ontology.locations import Location


def check_injectable(
    subgraph: AbstractSubgraph, present: Sequence[AbstractSubgraph], check: Callable[[Location], Location]
) -> None:
    """Refuse a subgraph that cannot be injected beside those that are `present`.

    Args:
        subgraph: the one to inject.
        present: those injected before.
        check: raises `UnknownLocationError` for a location that the graph does not have.

    Raises:
        SubgraphError: a site is unknown, a name is taken, or locations overlap.
    """
    name = subgraph.name
    if not subgraph.sites:
        raise SubgraphError(f"subgraph {name!r} names no site at which to inject it")
    for site in subgraph.sites:
        if site != site.whole:
            raise SubgraphError(f"subgraph {name!r}: a site is a whole location, not {site}")
        try:
            check(site)
        except UnknownLocationError as error:
            raise SubgraphError(f"subgraph {name!r} cannot be injected: {error}") from error
        for other in present:
            if other.name == name and site in other.sites:
                raise SubgraphError(f"a subgraph called {name!r} is at {site} already")
    for location in subgraph.locations:
        if location.site not in subgraph.sites or location.subgraph != name:
            raise SubgraphError(
                f"subgraph {name!r} declares {location}: its locations stand at one of its "
                f"sites and bear its name, as {location.type}.within(site, {name!r}) makes them"
            )
        if location.layer not in (None, location.root.layer):
            raise SubgraphError(
                f"subgraph {name!r} declares {location}: inside a subgraph the layer is that of the "
                f"site; declare {location.type} with layered=False"
            )
        if subgraph.locations.count(location) > 1:
            raise SubgraphError(f"subgraph {name!r} declares {location} twice")
