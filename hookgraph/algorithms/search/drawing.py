"""The figure of a search: what every text does, over how strange it is."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor

from hookgraph.algorithms.plotting import LIGHT, new_figure

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

_APART = 0.06
"""How far labels are apart at least, as a share of the height."""
_LABELS = 6


def scatter(
    perplexity: Float[Tensor, " batch"],
    effect: Float[Tensor, " batch"],
    parts: Mapping[str, Bool[Tensor, " batch"]],
    labels: Mapping[int, str],
    what: str,
) -> "matplotlib.figure.Figure":
    """One point per text.

    Args:
        perplexity: as a multiple of the start's.
        effect: its size.
        parts: which texts are drawn alike, by what they are.
        labels: the texts of the front by number, the first ones first.
        what: of which nodes the effect is.

    Raises:
        HookGraphError: matplotlib is not installed.
    """
    figure = new_figure()
    figure.set_size_inches(7.5, 4.6)
    figure.set_facecolor(LIGHT.surface)
    axes = figure.subplots()
    for (name, part), colour in zip(parts.items(), (LIGHT.muted, LIGHT.positive[0]), strict=True):
        axes.scatter(perplexity[part].tolist(), effect[part].tolist(), s=12, color=colour, label=name)
    chosen = list(labels)
    across, up = perplexity[chosen].tolist(), effect[chosen].tolist()
    axes.scatter(across, up, s=32, color=LIGHT.positive[1], label="on the front")
    _write(axes, dict(zip(labels.values(), zip(across, up, strict=True), strict=True)))
    axes.set_xscale("log")
    axes.axvline(1.0, color=LIGHT.muted, linewidth=0.5)
    axes.set_xlabel("perplexity, as a multiple of the start's", color=LIGHT.muted, fontsize=9)
    axes.set_ylabel(f"|effect| of {what}", color=LIGHT.muted, fontsize=9, parse_math=False)
    axes.legend(fontsize=7.5, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _write(axes: "matplotlib.axes.Axes", places: Mapping[str, tuple[float, float]]) -> None:
    """The first few labels that keep apart."""
    apart = _APART * (axes.get_ylim()[1] - axes.get_ylim()[0])
    written: list[float] = []
    for label, (across, up) in places.items():
        if len(written) < _LABELS and all(abs(up - other) >= apart for other in written):
            written.append(up)
            offset = {"xytext": (6, 4), "textcoords": "offset points"}
            axes.annotate(label, (across, up), fontsize=7.5, color=LIGHT.ink, parse_math=False, **offset)
