"""Sums over the examples of a stream of batches, and the means that they come to."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.effects.checkpoints import State
from hookgraph.algorithms.effects.results import Convention, PatchingEffect
from hookgraph.errors import ShapeMismatchError
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

POSITIONS = (Dimension.POS, Dimension.KEY_POS)
_SUMS = ("effects", "squares", "deltas")


@final
@dataclass(frozen=True, eq=False)
class Mean:
    """Sums over the examples of the batches so far, in double precision.

    Args:
        count: how many examples.
        last: the effect of the last batch, without its tensors.
        sums: of effects, squared effects and deltas.
        lists: total effects (under ""), and residuals by location, of each example.
        incomplete: the locations whose residual was over the tolerance in some batch.
    """

    count: int = 0
    last: PatchingEffect | None = None
    sums: Mapping[str, Attribution] = field(default_factory=dict[str, Attribution])
    lists: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    incomplete: tuple[Location, ...] = ()

    def with_batch(self, effect: PatchingEffect, *, summed: bool) -> "Mean":
        """The sums with one more batch.

        Raises:
            ShapeMismatchError: it is of another length, and positions are aligned.
        """
        effects = _over_positions(effect.effects) if summed else effect.effects
        deltas = _over_positions(effect.deltas) if summed else effect.deltas
        double = effects.map(Tensor.double)
        new = {
            "effects": double.sum("batch"),
            "squares": (double * double).sum("batch"),
            "deltas": deltas.map(Tensor.double).sum("batch"),
        }
        before = 0 if self.last is None else self.last.convention.steps
        lists = {str(place): value for place, value in effect.residuals.items()}
        if effect.total_effect is not None:
            lists[""] = effect.total_effect
        if self.last is not None:
            _check_shapes(self.sums["effects"], new["effects"])
            new = {name: total + new[name] for name, total in self.sums.items()}
            lists = {name: torch.cat([values, lists[name]]) for name, values in self.lists.items()}
        light = replace(
            effect,
            convention=replace(effect.convention, steps=max(effect.convention.steps, before)),
            effects=_dtypes(effects),
            deltas=Attribution({}),
            grads=Attribution({}),
            residuals={},
            total_effect=None,
            _remeasure="",
        )
        count = len(next(iter(effects.values())))
        incomplete = tuple(dict.fromkeys((*self.incomplete, *effect.incomplete)))
        return Mean(self.count + count, light, new, lists, incomplete)

    def result(self) -> PatchingEffect:
        """Means, and the standard errors of those of effects."""
        if self.last is None:
            raise ValueError("there was a batch")
        n = self.count
        sums = self.sums
        means = {name: total * (1 / n) for name, total in sums.items()}
        spread = means["squares"] - means["effects"] * means["effects"]
        errors = spread.map(lambda v: v.clamp(min=0).div(max(1, n - 1)).sqrt())
        return replace(
            self.last,
            effects=_as_mean(means["effects"], self.last.effects),
            deltas=_as_mean(means["deltas"], self.last.effects),
            standard_errors=_as_mean(errors, self.last.effects) if n > 1 else Attribution({}),
            total_effect=self.lists.get(""),
            residuals={Location.parse(name): v for name, v in self.lists.items() if name},
            incomplete=self.incomplete,
        )

    def pack(self) -> State:
        """Everything, to be written."""
        if self.last is None:
            raise ValueError("there was a batch")
        tensors = {f"lists/{name}": value for name, value in self.lists.items()}
        for name, total in self.sums.items():
            tensors.update(total.pack(name)[0])
        light = self.last.effects
        return tensors, {
            "count": self.count,
            "dtypes": {str(k): str(v.dtype).removeprefix("torch.") for k, v in light.items()},
            "reduced": {name: dict(total.reduced) for name, total in self.sums.items()},
            "light": dict(light.reduced),
            "convention": asdict(self.last.convention),
            "metadata": dict(self.last.metadata),
            "lists": list(self.lists),
            "incomplete": [str(x) for x in self.incomplete],
        }

    @staticmethod
    def unpack(state: State) -> "Mean":
        """What `pack` made."""
        tensors, about = state
        order = list(about["dtypes"])
        sums = {
            name: Attribution.unpack(tensors, name, order, _named(about["reduced"][name])) for name in _SUMS
        }
        dtypes = {
            Location.parse(k): torch.zeros((), dtype=getattr(torch, v)) for k, v in about["dtypes"].items()
        }
        light = Attribution(dtypes, _named(about["light"]))
        nothing = Attribution({})
        last = PatchingEffect(
            light, nothing, nothing, None, Convention(**about["convention"]), metadata=about["metadata"]
        )
        lists = {name: tensors[f"lists/{name}"] for name in about["lists"]}
        incomplete = tuple(map(Location.parse, about["incomplete"]))
        return Mean(about["count"], last, sums, lists, incomplete)


def _named(reduced: Mapping[str, str]) -> dict[Dimension, str]:
    return {Dimension(name): how for name, how in reduced.items()}


def _over_positions(values: Attribution) -> Attribution:
    axes = [d for d in POSITIONS if any(d in values.dims(x) for x in values)]
    return values.sum(*axes) if axes else values


def _check_shapes(before: Attribution, after: Attribution) -> None:
    for place in before:
        if before[place].shape != after[place].shape:
            raise ShapeMismatchError(
                f"at {place} the effects of this batch have shape {tuple(after[place].shape)}, those before "
                f'{tuple(before[place].shape)}: pad all batches to one length, or give positions="summed"'
            )


def _as_mean(values: Attribution, like: Attribution) -> Attribution:
    reduced = {**values.reduced, Dimension.BATCH: "mean"}
    return Attribution({k: v.to(like[k].dtype) for k, v in values.items()}, reduced)


def _dtypes(values: Attribution) -> Attribution:
    """Nothing but the dtype at each location."""
    return Attribution({k: v.new_zeros(()) for k, v in values.items()})
