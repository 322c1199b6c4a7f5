"""`faithfulness`: how much of what the model does a circuit does alone, and how much is left without it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal, TypeAlias, final, get_args

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hookgraph.algorithms.batches import Batch, PairBatch, batches
from hookgraph.algorithms.circuits.circuit import Circuit
from hookgraph.algorithms.interventions.replacements import moved
from hookgraph.algorithms.interventions.statistics import AblationStatistics, mean_activations
from hookgraph.algorithms.progress import Progress
from hookgraph.errors import HookGraphError, InputError, nearest
from hookgraph.graph import storage
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.ontology.autoencoder import ERROR
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import pandas

Ablation: TypeAlias = Literal["mean", "zero", "resample", "corrupt"]
"""What stands in for a node that is left out: its mean over the clean inputs, zero, its value in another
example, or in the corrupt input."""

Errors: TypeAlias = Literal["default", "keep", "remove"]
"""Errors of dictionaries: nodes like any other, all kept, or all left out."""

_KIND = "faithfulness"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness:
    """The metric of the model, of the circuit alone, of the model without it, and of nothing.

    faithfulness = (m(circuit) - m(nothing)) / (m(model) - m(nothing)), completeness the same of the rest.

    Args:
        model: m of the whole model, per example.
        circuit: with every other node ablated.
        rest: with the circuit's nodes ablated.
        nothing: with all nodes ablated.
        ablation: what stands in.
        errors: what becomes of errors.
        metadata: the model's name, revision and dtype.
    """

    model: Float[Tensor, " batch"]
    circuit: Float[Tensor, " batch"]
    rest: Float[Tensor, " batch"]
    nothing: Float[Tensor, " batch"]
    ablation: str
    errors: str
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def faithfulness(self) -> float:
        """1 where the circuit alone does what the model does, 0 where it does no more than nothing."""
        return self._share(self.circuit)

    @property
    def completeness(self) -> float:
        """0 where nothing is left without the circuit."""
        return self._share(self.rest)

    def _share(self, part: Tensor) -> float:
        return float((part - self.nothing).mean() / (self.model - self.nothing).mean())

    def to_frame(self) -> "pandas.DataFrame":
        """One row per example."""
        import pandas as pd

        return pd.DataFrame({k: getattr(self, k).tolist() for k in _PARTS})

    def __repr__(self) -> str:
        means = ", ".join(f"{k} {float(getattr(self, k).mean()):+.4f}" for k in _PARTS)
        return (
            f"faithfulness {self.faithfulness:.3f}, completeness {self.completeness:.3f} "
            f"({self.ablation} ablation, errors {self.errors}, {len(self.model)} examples)\n"
            f"mean metric: {means}"
        )

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        about = {"ablation": self.ablation, "errors": self.errors, "metadata": dict(self.metadata)}
        storage.write(path, _KIND, {k: getattr(self, k) for k in _PARTS}, about)

    @staticmethod
    def load(path: str | Path) -> "Faithfulness":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or no saved faithfulness.
        """
        tensors, header = storage.read(path, _KIND)
        return Faithfulness(**{k: tensors[k] for k in _PARTS}, **header)


_PARTS = ("model", "circuit", "rest", "nothing")


def faithfulness(
    graph: HookGraph,
    circuit: Circuit,
    pairs: Iterable[Batch],
    metric: Metric | None,
    *,
    ablation: Ablation = "mean",
    errors: Errors = "default",
    statistics: AblationStatistics | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Faithfulness:
    """What the circuit alone does of what the model does, and what the model does without it.

    All four runs are of the clean inputs. A node that is left out has another value; every location of the
    circuit's `places` is divided so. Encoders run on what the stream is by then, ablations before them
    included; errors are those of that.

    Args:
        graph: the hooked model, with the circuit's subgraphs.
        circuit: what is kept.
        pairs: batches (clean, corrupt), or (clean, corrupt, metric); corrupt may be None.
        metric: logits -> one number per example.
        ablation: `mean` over the clean inputs, or as `statistics` says; `zero`; `resample`: the value of
            another example of the batch in the model itself; `corrupt`.
        errors: `default`: nodes like any other; `keep`: never ablated; `remove`: always.
        statistics: means to use, from `mean_activations` of the circuit's places.
        seed: of the permutation of `resample`.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        HookGraphError: an unknown option, statistics that lack a location, or one example to resample.
        InputError: there are no pairs, or no corrupt inputs to take values from.
        UnknownLocationError: the graph lacks a place of the circuit.
        MetricError: the metric is not one number per example.

    Source: Marks et al., arXiv:2403.19647; Wang et al., arXiv:2211.00593 (completeness).
    """
    for name, value, known in (
        ("ablation", ablation, get_args(Ablation)),
        ("errors", errors, get_args(Errors)),
    ):
        if value not in known:
            raise HookGraphError(f"{name}={value!r} is unknown: {nearest(value, known)}")
    for place in circuit.places:
        graph.check(place)
    every = list(batches(pairs, metric))
    if ablation == "mean" and statistics is None:
        statistics = mean_activations(graph, [b.clean for b in every], circuit.places, progress=False)
    masks = {place: mask_of(circuit, place, graph, every[0]) for place in circuit.places}
    values: dict[str, list[Tensor]] = {k: [] for k in _PARTS}
    with Progress("faithfulness", 4 * len(every), shown=progress) as bar:
        for batch in every:
            stand_in = _stand_in(graph, batch, circuit.places, ablation, statistics, seed)
            for part in _PARTS:
                hooked = graph
                for place, mask in masks.items():
                    kept = _kept(part, mask, errors if place.type == ERROR else "default")
                    hooked = hooked if part == "model" else hooked.hook(place, _Keep(kept, stand_in(place)))
                run = hooked.run(batch.clean, metric=batch.metric, logits=False)
                values[part] += [] if run.metric is None else [run.metric]
                bar.advance()
    joined = {k: torch.cat(v) for k, v in values.items()}
    return Faithfulness(**joined, ablation=ablation, errors=errors, metadata=graph.binding.metadata)


def random_circuit(circuit: Circuit, among: Sequence[Location], seed: int = 0) -> Circuit:
    """As many nodes at each location, drawn from nodes given, without edges: what a circuit is compared to.

    Raises:
        HookGraphError: there are fewer to draw from.
    """
    drawn, random = dict[Location, float](), Random(seed)
    for place in circuit.places:
        own = [x for x in circuit.nodes if x.whole == place]
        pool = [x for x in among if x.whole == place]
        if len(pool) < len(own):
            raise HookGraphError(f"{len(own)} nodes of {place} cannot be drawn from {len(pool)}")
        drawn.update(dict.fromkeys(random.sample(pool, len(own)), 0.0))
    return replace(circuit, nodes=drawn, edges=replace(circuit.edges, blocks={}))


def mask_of(circuit: Circuit, place: Location, graph: HookGraph, batch: PairBatch) -> Bool[Tensor, "..."]:
    """Which values at a location are in the circuit, over its axes, of size 1 where all are one node."""
    own = [x for x in circuit.nodes if x.whole == place]
    named = {d for node in own for d, _ in node.index}
    sizes = graph.run(batch.clean, save=[place])[place].shape
    shape = [n if d in named else 1 for d, n in zip(place.dims, sizes, strict=True)]
    mask = torch.zeros(shape, dtype=torch.bool)
    for node in own:
        index = dict(node.index)
        here = tuple(index.get(d, 0) for d in place.dims)
        try:
            mask[here] = True  # pyright: ignore[reportArgumentType] (a node's index holds numbers)
        except IndexError as error:
            raise InputError(
                f"{node} lies outside of these inputs, where {place} has {tuple(sizes)}"
            ) from error
    return mask


def _kept(part: str, mask: Bool[Tensor, "..."], errors: str) -> Bool[Tensor, "..."]:
    """What is not ablated, for one of the runs."""
    if errors != "default":
        return torch.full_like(mask, errors == "keep")
    if part == "nothing":
        return torch.zeros_like(mask)
    return ~mask if part == "rest" else mask


@final
@dataclass(frozen=True, eq=False)
class _Keep:
    """A hook: values that are kept, and what stands in for the others."""

    kept: Bool[Tensor, "..."]
    other: Float[Tensor, "..."]

    def __call__(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return torch.where(self.kept.to(value.device), value, self.other.to(value))


def _stand_in(
    graph: HookGraph,
    batch: PairBatch,
    places: Sequence[Location],
    ablation: Ablation,
    statistics: AblationStatistics | None,
    seed: int,
) -> Callable[[Location], Float[Tensor, "..."]]:
    """What a value is replaced by, at each location."""
    if ablation == "zero":
        return lambda _: torch.zeros(())
    if ablation == "mean" and statistics is not None:
        return lambda place: statistics.of(place, "mean")[None]
    inputs = batch.clean if ablation == "resample" else batch.corrupt
    if inputs is None:
        raise InputError("corrupt ablation takes values from the corrupt inputs, and a batch has none")
    run = graph.run(inputs, save=list(places))
    if ablation == "corrupt":
        return lambda place: run[place]
    order = moved(len(run[places[0]]), seed)
    return lambda place: run[place][order.to(run[place].device)]
