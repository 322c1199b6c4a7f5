"""Whether the hooks of a graph are reached: one that is not edits nothing, and nobody would know."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from hookgraph.errors import HookGraphError
from hookgraph.graph.compiling import Registration
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.locations import Location

UNREACHED: Final = (
    "the model computes nothing there where its inputs already hold what it leads to, as inputs_embeds and "
    "encoder_outputs do, or where none of them goes into that stack, as text alone does not into one of "
    "pictures; if the model was changed since it was bound, bind it again"
)
"""Why a location may not be reached, and what to do."""


def hooked_places(
    registrations: Sequence[Registration], after: Location | None = None
) -> Mapping[Location, tuple[Location, ...]]:
    """The whole locations that a pass under these hooks has to reach, and which parts of them are hooked.

    A replay that starts `after` a location does not reach what lies before it. In a subgraph of which
    something is set, the rest need not be computed: it is enough to reach its site.
    """
    given = {x.scope for x, hook in registrations if isinstance(hook, SetTo)}
    places: dict[Location, list[Location]] = {}
    for location, _ in registrations:
        if after is None or not location.root.precedes(after):
            inside = location.site is not None and location.scope in given
            whole, part = (location.root, location.root) if inside else (location.whole, location)
            places.setdefault(whole, []).append(part)
    return {whole: tuple(parts) for whole, parts in places.items()}


def check_reached(unreached: Iterable[Location], where: str) -> None:
    """Refuse what came of passes that edited nothing where they should have.

    Raises:
        HookGraphError: naming the locations.
    """
    names = ", ".join(map(str, sorted(unreached, key=lambda x: x.order)))
    if names:
        raise HookGraphError(
            f"hooked, but not reached in {where}, so nothing is edited: {names}: {UNREACHED}"
        )
