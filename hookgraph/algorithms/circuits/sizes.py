"""`size_curve`: how faithful the circuits of the largest nodes are over their size, beside random ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.algorithms.batches import Batch, batches
from hookgraph.algorithms.circuits.ablating import Ablated, Ablation, Errors, Masks, StandIn
from hookgraph.algorithms.circuits.circuit import Circuit
from hookgraph.algorithms.circuits.evaluation import check_share, random_circuit
from hookgraph.algorithms.interventions.statistics import AblationStatistics
from hookgraph.errors import HookGraphError
from hookgraph.graph import storage
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "size curve"
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
"""Of a circuit's nodes, the shares of which circuits are made."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class SizeCurve:
    """Faithfulness and completeness of circuits of k nodes, and the faithfulness of random ones.

    Args:
        sizes: k.
        faithfulness: of the k nodes with the largest |effect|.
        completeness: of all others.
        random: of k nodes drawn at random, as many at each location: a row for each size.
        ablation: what stands in for the other nodes.
        errors: what becomes of errors of dictionaries.
        metadata: the model's name, revision and dtype.
    """

    sizes: tuple[int, ...]
    faithfulness: Float[Tensor, "..."]
    completeness: Float[Tensor, "..."]
    random: Float[Tensor, "..."]
    ablation: str
    errors: str
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def smallest(self, faithfulness: float = 0.8) -> int:
        """The smallest size from which on circuits are so faithful.

        Raises:
            HookGraphError: none is.
        """
        found: int | None = None
        for size, value in zip(reversed(self.sizes), reversed(self.faithfulness.tolist()), strict=True):
            if not value >= faithfulness:
                break
            found = size
        if found is None:
            raise HookGraphError(
                f"no circuit of up to {self.sizes[-1]} nodes has a faithfulness of {faithfulness}, the whole "
                f"has {float(self.faithfulness[-1]):.3f}: look at more locations, or ask for less"
            )
        return found

    def to_frame(self) -> "pandas.DataFrame":
        """One row per size."""
        import pandas as pd

        columns = {"faithfulness": self.faithfulness.tolist(), "completeness": self.completeness.tolist()}
        if self.random.shape[1]:
            columns["random"] = self.random.mean(1).tolist()
        return pd.DataFrame(columns, index=pd.Index(self.sizes, name="nodes"))

    def __repr__(self) -> str:
        table = self.to_frame().to_string(float_format=lambda x: f"{x:.3f}")
        return f"{self.ablation} ablation, errors {self.errors}\n{table}"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(float_format=lambda x: f"{x:.3f}")

    def plot(self) -> "matplotlib.figure.Figure":
        """Faithfulness over size: orange the largest nodes, blue what is left without them, grey random ones.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        figure = plotting.new_figure()
        axes = figure.subplots()
        theme = plotting.LIGHT
        for i, column in enumerate(self.random.T.tolist()):
            label = "random nodes" if i == 0 else None
            axes.plot(self.sizes, column, color=theme.muted, linewidth=0.8, alpha=0.7, label=label)
        lines = (
            (self.faithfulness, theme.positive[1], "the largest nodes"),
            (self.completeness, theme.negative[1], "all others"),
        )
        for values, colour, label in lines:
            axes.plot(self.sizes, values.tolist(), marker="o", markersize=3, color=colour, label=label)
        for level in (0.0, 1.0):
            axes.axhline(level, color=theme.muted, linewidth=0.5)
        axes.set(xlabel="nodes", ylabel="share of what the model does")
        axes.set_title(f"{self.ablation} ablation", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        return figure

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        about = {"sizes": list(self.sizes), "ablation": self.ablation, "errors": self.errors}
        tensors = {k: getattr(self, k) for k in _TENSORS}
        storage.write(path, _KIND, tensors, {**about, "metadata": dict(self.metadata)})

    @staticmethod
    def load(path: str | Path) -> "SizeCurve":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or no saved curve.
        """
        tensors, header = storage.read(path, _KIND)
        sizes = tuple(header.pop("sizes"))
        return SizeCurve(sizes, **{k: tensors[k] for k in _TENSORS}, **header)


_TENSORS = ("faithfulness", "completeness", "random")


def size_curve(
    graph: HookGraph,
    circuit: Circuit,
    pairs: Iterable[Batch],
    metric: Metric | None,
    *,
    sizes: Sequence[int] | None = None,
    random: int = 3,
    ablation: Ablation | None = None,
    errors: Errors = "default",
    statistics: AblationStatistics | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> SizeCurve:
    """How faithful the circuit of the k nodes with the largest |effect| is, over k.

    Give it a circuit of all nodes, `discover_circuit(..., node_threshold=0.0, edge_threshold=math.inf)`: then
    random circuits are drawn from every node that has an effect.

    Args:
        graph: the hooked model, with the circuit's subgraphs.
        circuit: the nodes.
        pairs: batches (clean, corrupt), or (clean, corrupt, metric).
        metric: logits -> one number per example.
        sizes: k; by default a dozen from a hundredth of the nodes to all.
        random: how many random circuits of each size.
        ablation: what stands in for the others; by default what effects were measured against.
        errors: what becomes of errors of dictionaries.
        statistics: means to use, from `mean_activations` of the circuit's places.
        seed: of what is drawn.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        HookGraphError: an unknown option, a size that is not between 1 and the number of nodes.
        InputError, UnknownLocationError, MetricError: as `faithfulness`.
    """
    total = len(circuit.nodes)
    chosen = sorted({max(1, round(s * total)) for s in _SHARES}) if sizes is None else sorted(set(sizes))
    if not chosen or chosen[0] < 1 or chosen[-1] > total:
        raise HookGraphError(f"sizes {chosen} of a circuit of {total} nodes: give numbers from 1 to {total}")
    every = list(batches(pairs, metric))
    against = ablation or circuit.edges.convention.ablation
    stand_in = StandIn.of(graph, every, circuit.places, against, statistics, seed)
    work = Ablated.of(graph, every, circuit.places, stand_in, errors)
    parts: list[Masks | None] = [None, work.masks([])]
    for size in chosen:
        largest = circuit.largest(size)
        parts += [work.masks(largest.nodes), work.masks(largest.nodes, rest=True)]
        for i in range(random):
            parts.append(work.masks(random_circuit(largest, list(circuit.nodes), seed + i).nodes))
    model, nothing, *rest = (x.mean() for x in work.measure(parts, progress=progress))
    check_share(model, nothing)
    shares = ((torch.stack(rest) - nothing) / (model - nothing)).view(len(chosen), 2 + random)
    return SizeCurve(
        tuple(chosen),
        shares[:, 0],
        shares[:, 1],
        shares[:, 2:],
        stand_in.ablation,
        errors,
        graph.binding.metadata,
    )
