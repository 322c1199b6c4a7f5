"""`PathProfile`: a metric and its slope on the way of nodes from clean to corrupt."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.plotting import LIGHT, new_figure
from hookgraph.graph import storage
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "path profile"
_TENSORS = ("alphas", "weights", "values", "slopes", "start", "end")


@final
@dataclass(frozen=True, eq=False, repr=False)
class PathProfile:
    """A metric and its slope, node by node, at points between clean and corrupt.

    Args:
        nodes: what was moved, one at a time.
        alphas: the points in [0, 1]; 0 is clean.
        weights: of the points in the integral; they sum to 1.
        values: m(α), (node, step, batch).
        slopes: dm/dα, likewise.
        start: m(0), the metric of the clean run.
        end: m(1) for each node, (node, batch).
        total_effect: m(corrupt) - m(clean) per example; None without a corrupt input.
        quadrature: the rule of the points.
        ablation: what stands in for a node at the end: its `corrupt` value, or `zero`.
        metadata: the model's name, revision and dtype.
    """

    nodes: tuple[Location, ...]
    alphas: Float[Tensor, " step"]
    weights: Float[Tensor, " step"]
    values: Float[Tensor, "... step batch"]
    slopes: Float[Tensor, "... step batch"]
    start: Float[Tensor, " batch"]
    end: Float[Tensor, "... batch"]
    total_effect: Float[Tensor, " batch"] | None
    quadrature: str
    ablation: str
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def integrated(self) -> Float[Tensor, "... batch"]:
        """Σ_k w_k dm/dα(α_k), the integrated gradient of each node."""
        return (self.slopes * self.weights.to(self.slopes)[:, None]).sum(1)

    @property
    def endpoint_difference(self) -> Float[Tensor, "... batch"]:
        """m(1) - m(0), the effect of patching each node."""
        return self.end - self.start

    @property
    def residuals(self) -> Float[Tensor, "... batch"]:
        """Integrated gradient - endpoint difference: the error of the quadrature."""
        return self.integrated - self.endpoint_difference

    @property
    def output_range(self) -> Float[Tensor, "... batch"]:
        """max m(α) - min m(α) over the points, which all lie between the ends: no endpoint difference."""
        return self.values.amax(1) - self.values.amin(1)

    @property
    def gradient_range(self) -> Float[Tensor, "... batch"]:
        """max dm/dα - min dm/dα over the points: zero where the metric is linear in the node."""
        return self.slopes.amax(1) - self.slopes.amin(1)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per node, mean over the batch: both ranges, the integral, and what patching gives."""
        import pandas as pd

        columns = {
            "endpoint difference": self.endpoint_difference,
            "integrated": self.integrated,
            "output range": self.output_range,
            "gradient range": self.gradient_range,
        }
        rows = {name: value.mean(-1).tolist() for name, value in columns.items()}
        return pd.DataFrame(rows, index=[str(x) for x in self.nodes])

    def plot(self) -> "matplotlib.figure.Figure":
        """m(α) - m(0) and dm/dα of each node, mean over the batch.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        figure = new_figure()
        figure.set_size_inches(9.5, 3.8)
        figure.set_facecolor(LIGHT.surface)
        panels = figure.subplots(1, 2)
        drawn = (("m(α) - m(0)", self.values - self.start), ("dm/dα", self.slopes))
        for axes, (name, values) in zip(panels, drawn, strict=True):
            for node, curve in zip(self.nodes, values.mean(-1), strict=True):
                axes.plot(self.alphas.tolist(), curve.tolist(), label=str(node), linewidth=1.4)
            axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
            axes.set_xlabel("α: 0 is clean, 1 corrupt", color=LIGHT.muted, fontsize=9)
            axes.axhline(0, color=LIGHT.muted, linewidth=0.5)
        panels[1].legend(fontsize=7.5, frameon=False)
        return figure

    def __repr__(self) -> str:
        error = float(self.residuals.abs().max())
        about = f"{len(self.nodes)} nodes, {len(self.alphas)} points ({self.quadrature})"
        table = self.to_frame().to_string(float_format=lambda x: f"{x:+.4f}")
        return f"Path profile of {about}; integral within {error:.0e} of patching\n{table}"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(float_format=lambda x: f"{x:+.4f}")

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        if self.total_effect is not None:
            tensors["total_effect"] = self.total_effect
        header = {
            "nodes": [str(x) for x in self.nodes],
            "quadrature": self.quadrature,
            "ablation": self.ablation,
            "metadata": dict(self.metadata),
        }
        storage.write(path, _KIND, tensors, header)

    @staticmethod
    def load(path: str | Path) -> "PathProfile":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, not a saved profile, or of a location that is not declared.
        """
        tensors, header = storage.read(path, _KIND)
        nodes = tuple(storage.parse(path, name) for name in header["nodes"])
        return PathProfile(
            nodes=nodes,
            **{name: tensors[name] for name in _TENSORS},
            total_effect=tensors.get("total_effect"),
            quadrature=header["quadrature"],
            ablation=header["ablation"],
            metadata=header["metadata"],
        )
