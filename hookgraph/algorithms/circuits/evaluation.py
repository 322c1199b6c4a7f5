"""`faithfulness`: how much of what the model does a circuit does alone, and how much is left without it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, final

from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.algorithms.batches import Batch, batches
from hookgraph.algorithms.circuits.ablating import Ablated, Ablation, Errors, StandIn
from hookgraph.algorithms.circuits.circuit import Circuit
from hookgraph.algorithms.interventions.statistics import AblationStatistics
from hookgraph.errors import HookGraphError, MetricError
from hookgraph.graph import storage
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

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

    def _repr_html_(self) -> str:
        told = repr(self).splitlines()[0]
        means = self.to_frame().mean().rename("mean metric").to_frame()
        return f"<p>{told}</p>{means.to_html(float_format=lambda x: f'{x:+.4f}')}"

    def plot(self) -> "matplotlib.figure.Figure":
        """The mean metric of the model, of the circuit, of what is left without it, and of nothing.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        means = self.to_frame().mean()
        title = f"faithfulness {self.faithfulness:.3f}, completeness {self.completeness:.3f}"
        return plotting.bars(_PARTS, means.tolist(), "mean metric", title)

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
    ablation: Ablation | None = None,
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
        ablation: what stands in; by default what the effects of the circuit's nodes were measured against.
            A node is in the circuit if it matters against that: others may matter against something else.
            `corrupt`: its value in the corrupt input; `mean`: over the clean inputs, of each position, or of
            all where some are padded on the left, or as `statistics` says; `zero`; `resample`: its value in
            another example of the batch.
        errors: `default`: nodes like any other; `keep`: never ablated; `remove`: always.
        statistics: means to use, from `mean_activations` of the circuit's places.
        seed: of the permutation of `resample`.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        HookGraphError: an unknown option, statistics that lack a location, or one example to resample.
        InputError: there are no pairs, or no corrupt inputs to take values from.
        UnknownLocationError: the graph lacks a place of the circuit.
        MetricError: the metric is not one number per example, or ablating everything does not change it.

    Source: Marks et al., arXiv:2403.19647; Wang et al., arXiv:2211.00593 (completeness).
    """
    every = list(batches(pairs, metric))
    chosen = ablation or circuit.edges.convention.ablation
    stand_in = StandIn.of(graph, every, circuit.places, chosen, statistics, seed)
    work = Ablated.of(graph, every, circuit.places, stand_in, errors)
    parts = [None, work.masks(circuit.nodes), work.masks(circuit.nodes, rest=True), work.masks([])]
    values = work.measure(parts, progress=progress, label="faithfulness")
    check_share(values[0], values[-1])
    metadata = graph.binding.metadata
    return Faithfulness(*values, ablation=stand_in.ablation, errors=errors, metadata=metadata)


def check_share(model: Float[Tensor, "..."], nothing: Float[Tensor, "..."]) -> None:
    """Refuse to divide by what ablating everything changes, where that is nothing.

    Raises:
        MetricError: it is.
    """
    if float((model - nothing).mean()) == 0:
        raise MetricError(
            "ablating everything does not change the metric, so there is nothing to have a share of: pass "
            "pairs whose clean and corrupt inputs differ, or another metric or ablation"
        )


def random_circuit(circuit: Circuit, among: Sequence[Location], seed: int = 0) -> Circuit:
    """As many nodes at each location, drawn from nodes given, without edges: what a circuit is compared to.

    Raises:
        HookGraphError: there are fewer to draw from.
    """
    drawn, random = dict[Location, float](), Random(seed)
    own, pool = _by_place(circuit.nodes), _by_place(among)
    for place in circuit.places:
        count, others = len(own.get(place, [])), pool.get(place, [])
        if len(others) < count:
            raise HookGraphError(f"{count} nodes of {place} cannot be drawn from {len(others)}")
        drawn.update(dict.fromkeys(random.sample(others, count), 0.0))
    return replace(circuit, nodes=drawn, edges=replace(circuit.edges, blocks={}))


def _by_place(nodes: Iterable[Location]) -> dict[Location, list[Location]]:
    found: dict[Location, list[Location]] = {}
    for node in nodes:
        found.setdefault(node.whole, []).append(node)
    return found
