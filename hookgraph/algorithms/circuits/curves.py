"""`cpr` and `cmd`: how faithful the circuits of a ranking of edges are, over their sizes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.algorithms.batches import Batch, batches
from hookgraph.algorithms.circuits.components import readers_of, writers_of
from hookgraph.algorithms.circuits.evaluation import check_share
from hookgraph.algorithms.circuits.results import Edges
from hookgraph.algorithms.circuits.running import CircuitRunner, Kept
from hookgraph.algorithms.circuits.scores import EdgeScores
from hookgraph.algorithms.progress import Progress
from hookgraph.errors import HookGraphError
from hookgraph.graph import storage
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "curve of circuits"
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the edges at which circuits are run."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    """f(k) = (m(C_k) - m(nothing)) / (m(model) - m(nothing)) over the share k of edges that are kept.

    Args:
        name: what the area is of.
        fractions: k.
        faithfulness: f.
        area: ∫ f dk, or ∫ |1 - f| dk, by the trapezoid rule over a linear axis.
        metadata: the model's name, revision and dtype.
    """

    name: str
    fractions: tuple[float, ...]
    faithfulness: Float[Tensor, "..."]
    area: float
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def __float__(self) -> float:
        return self.area

    def to_frame(self) -> "pandas.DataFrame":
        """One row per share of edges."""
        import pandas as pd

        return pd.DataFrame({"edges": self.fractions, "faithfulness": self.faithfulness.tolist()})

    def __repr__(self) -> str:
        table = self.to_frame().to_string(index=False, float_format=lambda x: f"{x:.4f}")
        return f"{self.name} {self.area:.4f}\n{table}"

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format=lambda x: f"{x:.4f}")
        return f"<p>{self.name} {self.area:.4f}</p>{table}"

    def plot(self) -> "matplotlib.figure.Figure":
        """f over k, k on a logarithmic axis.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        figure = plotting.new_figure()
        axes = figure.subplots()
        axes.plot(self.fractions, self.faithfulness.tolist(), marker="o", color=plotting.LIGHT.positive[1])
        axes.axhline(1.0, color=plotting.LIGHT.muted, linewidth=0.8)
        axes.set(xscale="log", xlabel="share of edges", ylabel="faithfulness")
        axes.set_title(f"{self.name} {self.area:.3f}")
        return figure

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file.

        Raises:
            LoadError: the file cannot be written.
        """
        about = {"name": self.name, "fractions": self.fractions, "area": self.area}
        header = {**about, "metadata": dict(self.metadata)}
        storage.write(path, _KIND, {"faithfulness": self.faithfulness}, header)

    @staticmethod
    def load(path: str | Path) -> "Curve":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or not such a curve.
        """
        tensors, header = storage.read(path, _KIND)
        return Curve(
            header["name"],
            tuple(header["fractions"]),
            tensors["faithfulness"],
            header["area"],
            header["metadata"],
        )


def cpr(
    graph: HookGraph,
    scores: EdgeScores,
    pairs: Iterable[Batch],
    metric: Metric | None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    progress: bool | None = None,
) -> Curve:
    """The integrated circuit performance ratio: ∫ f dk, of circuits of the edges to which m owes most.

    C_k is the model in which each reader sees the current values of the writers whose edges are among the
    share k without which m falls most, by their signed scores, and the corrupt values of the others.

    Raises:
        HookGraphError: the scores are those of another model, or heads cannot be patched alone in it.
        InputError: there are no pairs, or no corrupt inputs.
        MetricError: nothing is measured, it is not one number per example, or cutting every edge does not
            change it.

    Source: Mueller et al., "MIB", arXiv:2504.13151.
    """
    found = _measured(graph, scores, pairs, metric, fractions, progress, signed=True)
    area = float(torch.trapezoid(found, torch.tensor(fractions, dtype=found.dtype)))
    return Curve("CPR", tuple(fractions), found, area, graph.binding.metadata)


def cmd(
    graph: HookGraph,
    scores: EdgeScores,
    pairs: Iterable[Batch],
    metric: Metric | None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    progress: bool | None = None,
) -> Curve:
    """The integrated circuit-model distance: ∫ |1 - f| dk, of circuits of the edges with the largest |score|.

    Raises:
        HookGraphError, InputError, MetricError: as `cpr`.

    Source: Mueller et al., "MIB", arXiv:2504.13151.
    """
    found = _measured(graph, scores, pairs, metric, fractions, progress, signed=False)
    area = float(torch.trapezoid((1 - found).abs(), torch.tensor(fractions, dtype=found.dtype)))
    return Curve("CMD", tuple(fractions), found, area, graph.binding.metadata)


def _measured(
    graph: HookGraph,
    scores: EdgeScores,
    pairs: Iterable[Batch],
    metric: Metric | None,
    fractions: Sequence[float],
    progress: bool | None,
    *,
    signed: bool,
) -> Float[Tensor, "..."]:
    """f at each share of edges: a ratio of means over all examples."""
    # A score is what m changes by where the edge is cut: what m owes to it is the opposite.
    values = -scores.values() if signed else scores.values().abs()
    order = values.argsort(descending=True, stable=True)
    writers, readers = writers_of(graph), readers_of(graph)
    sums = torch.zeros(len(fractions) + 2, dtype=torch.float64)
    with Progress("circuits", None, shown=progress) as bar:
        for batch in batches(pairs, metric):
            runner = CircuitRunner.of(graph, batch, writers, readers)
            every = runner.everything()
            if sum(m.numel() for m in every.values()) != len(order):
                raise HookGraphError(f"these {len(order)} scores are not those of the edges of this model")
            for i, share in enumerate(fractions):
                chosen = scores.select(order[: round(share * len(order))])
                sums[i] += runner.run(_masks(every, chosen)).sum().double()
                bar.advance()
            sums[-2] += runner.run({}).sum().double()
            sums[-1] += runner.measured.sum().double()
    nothing, model = sums[-2], sums[-1]
    check_share(model, nothing)
    return (sums[:-2] - nothing) / (model - nothing)


def _masks(every: Kept, chosen: Edges) -> Kept:
    """The chosen ones of all edges."""
    masks = {pair: torch.zeros_like(mask) for pair, mask in every.items()}
    for (writer, reader), mask in masks.items():
        block = chosen.blocks.get((writer.place, reader.place))
        if block is not None:
            ends = (block.source, block.target)
            mask[tuple(x[:, 0] if x.shape[1] else x.new_zeros(len(x)) for x in ends)] = True
    return masks
