"""What one attached graph does at one location, in order.

Order of events: forward hooks in order of registration; gradient hooks, which see the gradient of
the final hooked value; saves; then subgraphs, in order of injection. Locations inside a subgraph
have taps of their own, which obey the same rule.

A subgraph may hand a tap only that part of its location of which anything is asked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

from jaxtyping import Shaped
from torch import Tensor

from hookgraph.hooks.editing import Hook, SetTo, apply_hook
from hookgraph.hooks.gradients import differentiable, hook_gradient
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

Splice = Callable[[Location, Tensor], Tensor]
"""What a subgraph does at one of its sites: gets site and value, returns the value that goes on."""


@final
@dataclass(frozen=True, slots=True)
class Observer:
    """What receives the value of a location after its hooks.

    Args:
        see: is given the value, and the part of the location that it is; None for the whole.
        parts: what it makes use of; nothing said is the whole.
    """

    see: Callable[[Tensor, Location | None], None]
    parts: tuple[Location, ...] = ()

    def __call__(self, value: Shaped[Tensor, "..."], given: Location | None = None) -> None:
        """See a value."""
        self.see(value, given)


@final
@dataclass(frozen=True, slots=True)
class Tap:
    """Everything that happens at one location. Call it with the value; it returns what goes on.

    Without hooks and subgraphs the very same tensor is returned, so that a binding can tell that
    nothing has to be written back.

    Args:
        location: the whole activation.
        hooks: forward hooks, with the part each is for.
        gradient_hooks: gradient hooks, with the part each is for.
        observers: see the value after the hooks, before the subgraphs.
        splices: the subgraphs at this site.
        needs_gradient: make the value the start of the autograd graph if nothing before it is.
    """

    location: Location
    hooks: tuple[tuple[Location, Hook], ...] = ()
    gradient_hooks: tuple[tuple[Location, Hook], ...] = ()
    observers: tuple[Observer, ...] = ()
    splices: tuple[Splice, ...] = ()
    needs_gradient: bool = False
    edits: bool = field(init=False)
    """Whether the value may be replaced."""
    tracks_gradient: bool = field(init=False)
    """Whether the model must go on with the very tensor that was handed in."""
    given: Shaped[Tensor, "..."] | None = field(init=False)
    """What the first hook puts there whatever it is handed; None where that matters."""

    def __post_init__(self) -> None:
        part, first = self.hooks[0] if self.hooks else (self.location, None)
        given = first.value if isinstance(first, SetTo) and not part.index else None
        object.__setattr__(self, "given", given)
        object.__setattr__(self, "edits", bool(self.hooks or self.splices))
        tracks = bool(self.gradient_hooks) or self.needs_gradient
        object.__setattr__(self, "tracks_gradient", tracks)

    def asked(self, dim: Dimension) -> tuple[int, ...] | None:
        """The indices along one axis of which anything is asked; None where that may be all of them."""
        if self.splices or not all(observer.parts for observer in self.observers):
            return None
        found: set[int] = set()
        named = [location for location, _ in (*self.hooks, *self.gradient_hooks)]
        for location in (*named, *(part for observer in self.observers for part in observer.parts)):
            part = dict(location.index).get(dim)
            chosen = (part,) if isinstance(part, int) else part
            if not isinstance(chosen, tuple) or min(chosen) < 0:
                return None
            found.update(chosen)
        return tuple(sorted(found))

    def __call__(self, value: Shaped[Tensor, "..."], given: Location | None = None) -> Shaped[Tensor, "..."]:
        """Let everything happen, in order; returns what the model goes on with.

        With `given`, `value` is no more than that part of the location, which holds all that is asked for.
        """
        for location, hook in self.hooks:
            value = apply_hook(location, hook, value, given)
        if self.gradient_hooks:
            hook_gradient(value, self.gradient_hooks, given)
        elif self.needs_gradient:
            differentiable(value)
        for observe in self.observers:
            observe(value, given)
        for splice in self.splices:
            value = splice(self.location, value)
        return value


Taps = Mapping[Location, Tap]
"""The taps of a pass, by whole location."""
