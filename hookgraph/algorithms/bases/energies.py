"""The energy of a direction: what the output loses when the states are moved along it to a target."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hookgraph.algorithms.readouts.lenses import Translation
from hookgraph.errors import ShapeMismatchError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.replay import can_start
from hookgraph.graph.run import Run
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.locations import MAIN_STACK, Location
from hookgraph.ontology.transformer import LOGITS, RESID_POST, RESID_PRE

Decode: TypeAlias = Callable[[Float[Tensor, "batch pos ..."]], Float[Tensor, "batch pos vocab"]]
"""States at a location -> the logits that follow from them."""


@final
@dataclass(frozen=True, eq=False)
class Loss:
    """Σ_n KL(p_n ‖ p'_n), or with labels the increment Σ_n (log p_n - log p'_n)[label_n], in nats."""

    log_probs: Float[Tensor, "... vocab"]
    """log p, unablated."""
    labels: Int[Tensor, "..."] | None = None

    @property
    def weights(self) -> Float[Tensor, "... vocab"]:
        """What the loss averages log p - log p' over: p, or all on the label."""
        if self.labels is None:
            return self.log_probs.exp()
        return torch.zeros_like(self.log_probs).scatter(-1, self.labels[:, None], 1.0)

    def __call__(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, ""]:
        """The sum over states."""
        change = self.log_probs - logits.log_softmax(-1)
        if self.labels is not None:
            return change.gather(-1, self.labels[:, None]).sum()
        return (self.log_probs.exp() * change).sum()


@final
@dataclass(frozen=True, eq=False)
class States:
    """The states of one process at a location.

    Args:
        value: as the run saved them.
        kept: which positions count.
    """

    value: Float[Tensor, "batch pos ..."]
    kept: Bool[Tensor, "batch pos"]

    @property
    def rows(self) -> Float[Tensor, "... d_model"]:
        """The states that count, one after the other."""
        return self.value.flatten(2)[self.kept]

    def replaced(self, rows: Float[Tensor, "... d_model"]) -> Float[Tensor, "batch pos ..."]:
        """All states, those that count being `rows`."""
        flat = self.value.flatten(2)
        return flat.masked_scatter(self.kept[..., None].expand_as(flat), rows).view_as(self.value)


@final
@dataclass(frozen=True, eq=False)
class DecodedEnergy:
    """E(v) by decoding the ablated states R_v h = h - v (v · (h - target)), gradients by autograd."""

    states: States
    rest: Float[Tensor, "... d_model"]
    """h - target."""
    decode: Decode
    loss: Loss

    def __call__(self, v: Float[Tensor, " d_model"]) -> tuple[Float[Tensor, ""], int]:
        """The sum over states, and their number."""
        direction = v.to(self.rest)
        moved = self.states.rows - (self.rest @ direction)[:, None] * direction
        logits = self.decode(self.states.replaced(moved))[self.states.kept]
        return self.loss(logits), len(self.rest)


def model_after(graph: HookGraph, inputs: Mapping[str, object], at: Location) -> tuple[Decode, Run]:
    """What the model makes of other states at a location, executing only what lies after it, and the run.

    Hooks of the graph at the location have been applied to the states already.
    """
    place = graph.check(at).whole
    direct = (
        can_start(graph.binding, place)
        and not graph.subgraphs
        and place.type.stack == MAIN_STACK
        and place.type.name in {RESID_PRE.name, RESID_POST.name}
        and all(location.activation.whole != place for location, _ in graph.registrations)
    )
    entry = place if direct else graph.entry(place)
    run = graph.run(inputs, save=[x for x in dict.fromkeys((place, entry, LOGITS)) if x is not None])

    def decode(value: Float[Tensor, "batch pos ..."], /) -> Float[Tensor, "batch pos vocab"]:
        with graph.binding.frozen():
            if direct:
                return graph.replay(run, place, value=value, save=[LOGITS], grad=True)[LOGITS]
            hooked = graph.hook(place, SetTo(value))
            if entry is None:
                return hooked.run(inputs, save=[LOGITS], grad=True)[LOGITS]
            return hooked.replay(run, entry, save=[LOGITS], grad=True)[LOGITS]

    return decode, run


def through(end: Decode, translation: Translation | None) -> Decode:
    """The translation, and then the end of the model."""

    def decode(value: Float[Tensor, "batch pos d_model"], /) -> Float[Tensor, "batch pos vocab"]:
        return end(value if translation is None else translation(value))

    return decode


def checked_labels(labels: Int[Tensor, "..."], shape: tuple[int, ...]) -> Bool[Tensor, "batch pos"]:
    """Which labels count: those from 0 on.

    Raises:
        ShapeMismatchError: not one label per position.
    """
    if tuple(labels.shape) != shape:
        raise ShapeMismatchError(
            f"labels have shape {tuple(labels.shape)}, the inputs {shape}: give the token that each position "
            "should say, or a negative number for none"
        )
    return labels >= 0
