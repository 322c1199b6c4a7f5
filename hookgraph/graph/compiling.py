"""From what a graph registers to one tap per location."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set

from torch import Tensor

from hookgraph.graph.abstract import AbstractSubgraph, Frame
from hookgraph.hooks.editing import Hook, SetTo, hook_apart
from hookgraph.hooks.positions import ByPosition, Place, Placed, PlacedGradient, is_placed
from hookgraph.hooks.taps import Observer, Splice, Tap, Taps
from hookgraph.ontology.locations import Location
from hookgraph.ontology.passes import PassType

Registration = tuple[Location, Hook]


def compile_taps(
    registrations: Sequence[Registration],
    subgraphs: Sequence[AbstractSubgraph],
    observers: Mapping[Location, Observer] | None = None,
    differentiated: Iterable[Location] = (),
    place: Place | None = None,
    held: Callable[[Tensor], bool] | None = None,
) -> dict[Location, Tap]:
    """One tap for every whole location at which anything happens, those inside subgraphs included.

    Clear the result when the pass is over: the frames of subgraphs refer to it and it to them, so that
    they, and every tensor that they and the observers hold, would otherwise live until collected.

    With `place`, parts are those of the sequence, wherever in it the pass lies; without, the pass holds it
    from position 0 on.

    A hook that is given a tensor in whose memory lies what was saved, as `held` tells, is given a copy, so
    that a change in place does not reach it.
    """
    observers = observers or {}
    needs_gradient = frozenset(differentiated)
    hooks: dict[Location, list[Registration]] = {}
    gradient_hooks: dict[Location, list[Registration]] = {}
    placed: list[Registration] = []
    for location, hook in registrations:
        whole, backward = location.whole, location.pass_type is PassType.BACKWARD
        if held is not None and not backward and not isinstance(hook, SetTo):
            if isinstance(hook, ByPosition):
                hook = ByPosition(hook_apart(hook.fn, held))
            else:
                hook = hook_apart(hook, held)
        if place is None or not is_placed(location):
            (gradient_hooks if backward else hooks).setdefault(whole, []).append((location, hook))
        elif not backward:
            hooks.setdefault(whole, []).append((whole, Placed(location, hook, place)))
        else:
            # In the backward pass it would be too late to ask where the pass lay.
            placed.append((whole, PlacedGradient(location, hook, place)))
            gradient_hooks.setdefault(whole, []).append((whole, _leave))
    for whole, hook in placed:
        hooks.setdefault(whole, []).append((whole, hook))
    taps: dict[Location, Tap] = {}
    asked = {*hooks, *gradient_hooks, *observers, *needs_gradient}
    splices = _splices(_acting(subgraphs, asked), taps, place)
    for location in sorted({*asked, *splices}, key=lambda x: x.order):
        observer = observers.get(location)
        taps[location] = Tap(
            location,
            hooks=tuple(hooks.get(location, ())),
            gradient_hooks=tuple(gradient_hooks.get(location, ())),
            observers=() if observer is None else (observer,),
            splices=tuple(splices.get(location, ())),
            needs_gradient=location in needs_gradient,
        )
    return taps


def _leave(gradient: Tensor) -> None:
    """A gradient hook that changes nothing: the model goes on with the very tensor that was hooked."""


def _acting(subgraphs: Sequence[AbstractSubgraph], asked: Set[Location]) -> list[AbstractSubgraph]:
    """The subgraphs that do something in a pass where these locations are asked for, in order."""
    acting: list[AbstractSubgraph] = []
    asked = set(asked)
    for subgraph in reversed(subgraphs):
        if subgraph.acts or not asked.isdisjoint(subgraph.locations):
            acting.append(subgraph)
            asked.update(subgraph.sites)  # of which some may lie in subgraphs before it
    return acting[::-1]


def _splices(
    subgraphs: Sequence[AbstractSubgraph], taps: Taps, place: Place | None
) -> Mapping[Location, list[Splice]]:
    """What each site's subgraphs do there. `taps` is filled later: frames look into it as they run."""
    splices: dict[Location, list[Splice]] = {}
    for subgraph in subgraphs:
        splice = _splice(subgraph, Frame(taps, place=place))
        for site in subgraph.sites:
            splices.setdefault(site, []).append(splice)
    return splices


def _splice(subgraph: AbstractSubgraph, frame: Frame) -> Splice:
    def splice(site: Location, value: Tensor) -> Tensor:
        return subgraph.visit(site, value, frame)

    return splice
