"""`mean_patching_effect`: how much each node matters over a data set of pairs, which streams through."""

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.batches import Batch, PairBatch, batches
from hookgraph.algorithms.effects.checkpoints import Checkpoint, State
from hookgraph.algorithms.effects.enumeration import counted
from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.patching import Method, patching_effect
from hookgraph.algorithms.effects.quadrature import Quadrature
from hookgraph.algorithms.effects.results import Convention, PatchingEffect
from hookgraph.algorithms.progress import Progress
from hookgraph.errors import HookGraphError, ShapeMismatchError, nearest
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

Positions: TypeAlias = Literal["aligned", "summed"]
_POSITIONS = (Dimension.POS, Dimension.KEY_POS)
_SUMS = ("effects", "squares", "deltas")


def mean_patching_effect(
    graph: HookGraph,
    pairs: Iterable[Batch],
    metric: Metric | None = None,
    *,
    at: Sequence[Location],
    method: Method = "attrib",
    positions: Positions = "aligned",
    steps: int = 10,
    quadrature: Quadrature = "gauss-legendre",
    tolerance: float | None = None,
    joint: Sequence[str] = (),
    batch_size: int = 256,
    max_memory: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> PatchingEffect:
    """The mean of `patching_effect` over all examples of a stream of batches.

    Only sums are kept, so that memory does not grow with the data; total effects and residuals are kept for
    each example, in order.

    Args:
        graph: the hooked model.
        pairs: batches (clean, corrupt), or (clean, corrupt, metric) where answers differ from batch to batch.
        metric: logits -> one number per example, for batches without their own.
        at: locations or parts of locations.
        method: as for `patching_effect`, like the arguments not listed here.
        positions: `aligned`: position 5 of all examples is one node, and all batches are of one length;
            `summed`: effects are summed over positions, and batches may differ in length.
        steps: points of the path integral.
        quadrature: its rule.
        tolerance: for `ig`, the share of a site's change that its residual may have.
        joint: axes whose coordinates are one node.
        batch_size: how many rows are run at once, at most.
        max_memory: how many bytes a pass may take, at most.
        checkpoint: a file that keeps what is done, batch by batch. Where it exists, the batches that it
            holds are not run again; it is left there at the end.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Returns:
        Effects and deltas as means over the batch axis, with `.standard_errors` of the effects.

    Raises:
        InputError: there are no pairs.
        ShapeMismatchError: batches of different lengths are to be aligned.
        LoadError: the checkpoint is of something else.
        MetricError: as for `patching_effect`; what earlier batches gave is in the checkpoint.
    """
    if positions not in ("aligned", "summed"):
        raise HookGraphError(f"unknown positions {positions!r}: {nearest(positions, ('aligned', 'summed'))}")
    summed = positions == "summed"
    plan = {"method": method, "positions": positions, "joint": list(joint), "at": [str(x) for x in at]}
    integral = {"steps": steps, "quadrature": quadrature, "tolerance": tolerance}
    kept = (
        None if checkpoint is None else Checkpoint(checkpoint, {**plan, **integral, **graph.binding.metadata})
    )
    state = None if kept is None else kept.resume()
    mean = Mean() if state is None else Mean.unpack(state)
    with Progress(
        f"{method} over pairs", len(pairs) if isinstance(pairs, Sized) else None, shown=progress
    ) as bar:
        for number, batch in enumerate(batches(pairs, metric)):
            bar.advance()
            if kept is not None and number < len(kept.done):
                kept.recognise(number, graph.binding.prepare(batch.clean))
                continue
            effect = patching_effect(
                graph,
                batch.clean,
                batch.corrupt,
                batch.metric,
                at,
                method,
                steps=steps,
                quadrature=quadrature,
                tolerance=tolerance,
                joint=joint,
                batch_size=batch_size,
                max_memory=max_memory,
                progress=False,
            )
            mean = mean.with_batch(effect, summed=summed)
            if kept is not None:
                kept.keep(graph.binding.prepare(batch.clean), mean.pack())
    measured = pairs if isinstance(pairs, Sequence) else None

    def remeasure(nodes: Sequence[Location]) -> Float[Tensor, "... batch"]:
        every = batches(measured or (), metric)
        return torch.cat([_exactly(graph, batch, nodes, at, batch_size) for batch in every], -1)

    return replace(mean.result(), _remeasure=None if measured is None else remeasure)


def _exactly(
    graph: HookGraph, batch: PairBatch, nodes: Sequence[Location], at: Sequence[Location], batch_size: int
) -> Float[Tensor, "... batch"]:
    return exact_effects(
        graph,
        batch.clean,
        batch.corrupt,
        batch.metric,
        nodes,
        columns=counted(nodes, at),
        batch_size=batch_size,
        progress=False,
    )


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
        lists = {str(place): value for place, value in effect.residuals.items()}
        if effect.total_effect is not None:
            lists[""] = effect.total_effect
        if self.last is not None:
            _check_shapes(self.sums["effects"], new["effects"])
            new = {name: total + new[name] for name, total in self.sums.items()}
            lists = {name: torch.cat([values, lists[name]]) for name, values in self.lists.items()}
        light = replace(
            effect,
            effects=_dtypes(effects),
            deltas=Attribution({}),
            grads=Attribution({}),
            residuals={},
            total_effect=None,
            _remeasure=None,
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
    axes = [d for d in _POSITIONS if any(d in values.dims(x) for x in values)]
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
