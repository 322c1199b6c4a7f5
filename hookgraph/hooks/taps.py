"""What one attached graph does at one location, in order.

Order of events: forward hooks in order of registration; gradient hooks, which see the gradient of
the final hooked value; saves; then subgraphs, in order of injection. Locations inside a subgraph
have taps of their own, which obey the same rule.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

from jaxtyping import Shaped
from torch import Tensor

from hookgraph.hooks.editing import Hook, apply_hook
from hookgraph.hooks.gradients import differentiable, hook_gradient
from hookgraph.ontology.locations import Location

Splice = Callable[[Location, Tensor], Tensor]
"""What a subgraph does at one of its sites: gets site and value, returns the value that goes on."""

Observer = Callable[[Tensor], None]
"""What receives the value of a location after its hooks."""


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
        observers: are given the value after the hooks, before the subgraphs.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", bool(self.hooks or self.splices))
        tracks = bool(self.gradient_hooks) or self.needs_gradient
        object.__setattr__(self, "tracks_gradient", tracks)

    def __call__(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Let everything happen, in order; returns what the model goes on with."""
        for location, hook in self.hooks:
            value = apply_hook(location, hook, value)
        if self.gradient_hooks:
            hook_gradient(value, self.gradient_hooks)
        elif self.needs_gradient:
            differentiable(value)
        for observe in self.observers:
            observe(value)
        for splice in self.splices:
            value = splice(self.location, value)
        return value


Taps = Mapping[Location, Tap]
"""The taps of a pass, by whole location."""
