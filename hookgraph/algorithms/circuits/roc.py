"""`EdgeRoc`: how well scores tell true edges from all others, over every threshold."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.graph import storage

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "ROC of edges"
_TENSORS = ("thresholds", "true_positives", "false_positives")
_SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)
"""Of the true edges: a page shows at which thresholds they are reached."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class EdgeRoc:
    """The shares of true and of other edges whose score is at least a threshold, from the highest down.

    Args:
        thresholds: the scores, each once, after infinity.
        true_positives: the share of the true edges that reach each.
        false_positives: that of the others.
        metadata: the model's name, revision and dtype.
    """

    thresholds: Float[Tensor, "..."]
    true_positives: Float[Tensor, "..."]
    false_positives: Float[Tensor, "..."]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @staticmethod
    def of(
        sizes: Float[Tensor, "..."], true: Bool[Tensor, "..."], metadata: Mapping[str, str] | None = None
    ) -> "EdgeRoc":
        """The curve of some scores, of which some are those of true edges; equal scores are one step."""
        levels, places = sizes.unique(return_inverse=True)
        counts = torch.zeros(2, len(levels), dtype=torch.float64)
        for row, chosen in enumerate((true, ~true)):
            counts[row].index_add_(0, places[chosen], torch.ones(int(chosen.sum()), dtype=torch.float64))
        reached = counts.flip(1).cumsum(1) / counts.sum(1, keepdim=True)
        shares = torch.cat([torch.zeros(2, 1, dtype=torch.float64), reached], 1)
        thresholds = torch.cat([levels.new_full((1,), torch.inf), levels.flip(0)])
        return EdgeRoc(thresholds, shares[0], shares[1], metadata or {})

    @property
    def area(self) -> float:
        """AUROC, the area under the curve: 1 where every true edge is above all others, 0.5 by chance."""
        return float(torch.trapezoid(self.true_positives, self.false_positives))

    def __float__(self) -> float:
        return self.area

    def to_frame(self) -> "pandas.DataFrame":
        """One row per threshold."""
        import pandas as pd

        return pd.DataFrame({k.replace("_", " "): getattr(self, k).tolist() for k in _TENSORS})

    def __repr__(self) -> str:
        return f"EdgeRoc: AUROC {self.area:.4f}, {len(self.thresholds) - 1} thresholds"

    def _repr_html_(self) -> str:
        # A row per threshold is too much to read: what matters is how soon the true edges are all there.
        shown = [int((self.true_positives < share).sum()) for share in _SHARES]
        last = len(self.thresholds) - 1
        rows = sorted({min(i, last) for i in shown})
        table = self.to_frame().iloc[rows].to_html(index=False, float_format=lambda x: f"{x:.4g}")
        return f"<p>{self!r}</p>{table}"

    def plot(self) -> "matplotlib.figure.Figure":
        """True positives over false positives, beside chance.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        figure = plotting.new_figure()
        figure.set_size_inches(4.5, 4.5)
        axes, theme = figure.subplots(), plotting.LIGHT
        axes.plot([0, 1], [0, 1], color=theme.muted, linewidth=0.8)
        axes.plot(self.false_positives.tolist(), self.true_positives.tolist(), color=theme.positive[1])
        axes.set(xlabel="share of other edges", ylabel="share of true edges", aspect="equal")
        axes.set_title(f"AUROC {self.area:.3f}", loc="left", fontsize=10)
        return figure

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file.

        Raises:
            LoadError: the file cannot be written.
        """
        tensors = {k: getattr(self, k) for k in _TENSORS}
        storage.write(path, _KIND, tensors, {"metadata": dict(self.metadata)})

    @staticmethod
    def load(path: str | Path) -> "EdgeRoc":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or not such a curve.
        """
        tensors, header = storage.read(path, _KIND)
        return EdgeRoc(**{k: tensors[k] for k in _TENSORS}, metadata=header["metadata"])
