"""`EdgeRoc`: how well scores tell true edges from all others, over every threshold."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hookgraph.algorithms import plotting

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas


@final
@dataclass(frozen=True, eq=False, repr=False)
class EdgeRoc:
    """The shares of true and of other edges whose score is at least a threshold, from the highest down.

    Args:
        thresholds: the scores, each once, after infinity.
        true_positives: the share of the true edges that reach each.
        false_positives: that of the others.
    """

    thresholds: Float[Tensor, "..."]
    true_positives: Float[Tensor, "..."]
    false_positives: Float[Tensor, "..."]

    @staticmethod
    def of(sizes: Float[Tensor, "..."], true: Bool[Tensor, "..."]) -> "EdgeRoc":
        """The curve of some scores, of which some are those of true edges; equal scores are one step."""
        levels, places = sizes.unique(return_inverse=True)
        counts = torch.zeros(2, len(levels), dtype=torch.float64)
        for row, chosen in enumerate((true, ~true)):
            counts[row].index_add_(0, places[chosen], torch.ones(int(chosen.sum()), dtype=torch.float64))
        reached = counts.flip(1).cumsum(1) / counts.sum(1, keepdim=True)
        shares = torch.cat([torch.zeros(2, 1, dtype=torch.float64), reached], 1)
        return EdgeRoc(torch.cat([levels.new_full((1,), torch.inf), levels.flip(0)]), shares[0], shares[1])

    @property
    def area(self) -> float:
        """AUROC, the area under the curve: 1 where every true edge is above all others, 0.5 by chance."""
        return float(torch.trapezoid(self.true_positives, self.false_positives))

    def __float__(self) -> float:
        return self.area

    def to_frame(self) -> "pandas.DataFrame":
        """One row per threshold."""
        import pandas as pd

        columns = ("thresholds", "true_positives", "false_positives")
        return pd.DataFrame({k.replace("_", " "): getattr(self, k).tolist() for k in columns})

    def __repr__(self) -> str:
        return f"EdgeRoc: AUROC {self.area:.4f}, {len(self.thresholds) - 1} thresholds"

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
