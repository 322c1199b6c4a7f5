"""Saves: keep what was asked for, stop the pass when nothing more is asked for, be complete."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, cast, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hookgraph.errors import HookGraphError, LocationError, MetricError
from hookgraph.graph.reaching import UNREACHED, check_reached
from hookgraph.hooks.editing import shares_memory
from hookgraph.hooks.positions import Place, read_at
from hookgraph.hooks.slicing import read, relative
from hookgraph.hooks.taps import Observer
from hookgraph.ontology.locations import Location
from hookgraph.ontology.passes import PassType

_REENTRANT: Final = (
    "reentrant checkpointing: have the model checkpointed with use_reentrant=False, as by "
    "gradient_checkpointing_enable({'use_reentrant': False})"
)


class EnoughSeen(Exception):  # noqa: N818 (a signal, not an error)
    """Raised inside a pass when every location asked for has fired."""


def _in_backward() -> bool:
    """Whether a backward pass runs parts of the model again, as with gradient checkpointing."""
    return torch._C._current_graph_task_id() >= 0  # pyright: ignore[reportPrivateUsage]


@final
class Recorder:
    """Keeps the values of one pass at the locations asked for.

    Args:
        asked: the locations to save, parts and gradients among them.
        stop: raise `EnoughSeen` once all activations have fired, and hooks before them been reached.
        keep_graph: leave the values in the autograd graph, and the graph intact.
        place: where the pass lies in its sequences, if not at their start without padding.
        hooked: the whole locations that the pass has to reach, with the parts that hooks get; where it is
            stopped, those before something saved.
    """

    def __init__(
        self,
        asked: Sequence[Location],
        *,
        stop: bool,
        keep_graph: bool,
        place: Place | None = None,
        hooked: Mapping[Location, tuple[Location, ...]] | None = None,
    ) -> None:
        self.asked = tuple(dict.fromkeys(asked))
        self._place = place
        self._stop = stop
        self._keep_graph = keep_graph
        self._wholes: dict[Location, list[Location]] = {}
        for location in self.asked:
            self._wholes.setdefault(location.whole, []).append(location)
        self.differentiated = frozenset(x.whole for x in self.asked if x.pass_type is PassType.BACKWARD)
        """The whole locations whose gradient is asked for."""
        self.tracked = frozenset(self._wholes) if keep_graph else self.differentiated
        """The whole locations whose saved value the model goes on with, so that it can be differentiated."""
        self._missing = len(self._wholes)
        last = max((x.order for x in self._wholes), default=())
        places = {x: parts for x, parts in (hooked or {}).items() if x not in self._wholes}
        self._hooked = {x: parts for x, parts in places.items() if not stop or x.order < last}
        self._unreached = set(self._hooked)
        self._seen: dict[Location, Tensor] = {}
        self._given: dict[Location, Location] = {}
        """Which part of a whole location was seen, where it was not all of it."""
        self._parts: dict[Location, Tensor] = {}
        self._gradients: dict[Location, Tensor] = {}

    def observers(self) -> Mapping[Location, Observer]:
        """What is to see the value at each whole location."""
        hooked = {w: Observer(partial(self._reach, w), parts) for w, parts in self._hooked.items()}
        saved = {w: Observer(partial(self._see, w), tuple(parts)) for w, parts in self._wholes.items()}
        return {**hooked, **saved}

    def holds(self, value: Shaped[Tensor, "..."]) -> bool:
        """Whether something that was saved lies in the memory of a tensor."""
        return shares_memory(value, self._seen.values())

    def _see(self, whole: Location, value: Tensor, given: Location | None) -> None:
        if whole in self._seen:
            if _in_backward():  # run again, to be differentiated
                return
            raise HookGraphError(f"{whole} fired twice in one pass; please report this model")
        if given is not None:
            self._given[whole] = given
        parts = self._wholes[whole]
        # A part is copied so that the whole tensor need not be kept alive for it.
        copy = not self._keep_graph and all(p.index and p.pass_type is PassType.FORWARD for p in parts)
        if copy:
            self._parts.update({p: self._read(p, value).clone() for p in parts})
        self._seen[whole] = self._parts[parts[0]] if copy else value
        if whole in self.differentiated and value.requires_grad:
            # What autograd returns may lie before or after the gradient hooks; this lies after. The hook does
            # not hold self, which holds the value that will hold the hook: nothing frees such a cycle.
            keep = partial(self._gradients.__setitem__, whole)
            value.register_hook(keep)  # pyright: ignore[reportUnknownMemberType]
        self._missing -= 1
        self._stop_if_done()

    def _reach(self, whole: Location, value: Tensor, given: Location | None) -> None:
        if whole in self._unreached:
            self._unreached.remove(whole)
            self._stop_if_done()

    def _stop_if_done(self) -> None:
        if self._stop and self._missing == 0 and not self._unreached:
            raise EnoughSeen

    def _here(self, location: Location) -> Location:
        """A location in the coordinates of what was seen of it."""
        given = self._given.get(location.whole)
        return location if given is None else relative(location, given)

    def _read(self, location: Location, value: Tensor) -> Tensor:
        here = self._here(location)
        part = read(here, value) if self._place is None else read_at(here, value, self._place)
        if part is None:
            raise LocationError(f"{location}: a run is one pass, step 0, and holds nothing of this")
        return part

    def values(self, metric: Float[Tensor, " batch"] | None) -> dict[Location, Shaped[Tensor, "..."]]:
        """Everything asked for, in the order of asking.

        Raises:
            HookGraphError: a location did not fire, or a hook was not reached.
            MetricError: the metric has no gradient at a location, or the location holds integers.
        """
        missing = [str(whole) for whole in self._wholes if whole not in self._seen]
        if missing:
            raise HookGraphError(f"did not fire in this pass: {', '.join(missing)}: {UNREACHED}")
        check_reached(self._unreached, "this pass")
        self._differentiate(metric)
        values: dict[Location, Tensor] = {}
        for location in self.asked:
            if location.pass_type is PassType.BACKWARD:
                values[location] = self._read(location, self._gradients[location.whole])
            elif location in self._parts:
                values[location] = self._parts[location]
            else:
                value = self._read(location, self._seen[location.whole])
                values[location] = value if self._keep_graph else value.detach()
        return values

    def _differentiate(self, metric: Float[Tensor, " batch"] | None) -> None:
        """Compute the gradients asked for."""
        if not self.differentiated:
            return
        wholes = [whole for whole in self._wholes if whole in self.differentiated]
        for whole in wholes:
            if not self._seen[whole].is_floating_point():
                raise MetricError(f"{whole} holds integers, so it has no gradient: read or edit it instead")
        if metric is None:
            raise MetricError(f"{wholes[0].grad} is the gradient of a metric: give `metric`")
        inputs = [self._seen[whole] for whole in wholes]
        for whole, value in zip(wholes, inputs, strict=True):
            if not value.requires_grad:
                raise MetricError(f"{whole} was computed without gradients, as in {_REENTRANT}")
        if not metric.requires_grad and torch.is_inference_mode_enabled():
            raise MetricError(
                f"{wholes[0].grad} is a gradient, and torch.inference_mode() is on, in which there are none: "
                "leave it, or use torch.no_grad() instead, which a pass with gradients lifts"
            )
        if not metric.requires_grad:
            raise MetricError(f"the metric does not depend on {', '.join(map(str, wholes))}")
        total = metric.sum()
        try:
            grads = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=self._keep_graph)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise MetricError(f"gradients at chosen places cannot be had through {_REENTRANT}") from error
        found = cast("tuple[Tensor | None, ...]", grads)
        for whole, gradient in zip(wholes, found, strict=True):
            if gradient is None:
                raise MetricError(f"the metric does not depend on {whole}: no path leads from there to it")
