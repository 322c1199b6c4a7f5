"""The graph of tokens, drawn: positions on x, layers on y, lines as strong as their shares."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hookgraph.algorithms.flow.tokens import Flow
from hookgraph.algorithms.plotting import LIGHT, Theme, new_figure

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

_ASIDE = 0.22
"""How far to the right of the stream the updates stand."""
_HEIGHTS = {"X0": 0.0, "A": 0.5, "C": 0.6, "T": 0.25, "S": 0.25, "K": 0.55, "M": 0.75, "E": 0.8, "I": 1.0}
"""Of nodes above the layer before."""
_LARGEST = (14.0, 12.0)


def draw(
    found: Sequence[Flow], places: Sequence[int], labels: Sequence[str], layers: int, theme: Theme = LIGHT
) -> "matplotlib.figure.Figure":
    """Draw edges between the tokens at some positions.

    Raises:
        HookGraphError: matplotlib is not installed.
    """
    figure = new_figure()
    figure.set_size_inches(
        min(1.5 + 0.62 * max(len(places), 6), _LARGEST[0]), min(1.6 + 0.8 * layers, _LARGEST[1])
    )
    figure.set_facecolor(theme.surface)
    axes = figure.subplots()
    columns = {pos: column for column, pos in enumerate(places)}
    colours = {"residual": theme.muted, "attention": theme.negative[1], "bias": theme.positive[0]}
    for flow in found:
        if flow.key is None:
            continue
        start, end = _place(flow.source, columns), _place(flow.target, columns)
        strength = min(1.0, flow.share)
        axes.plot(
            *zip(start, end, strict=True),
            color=colours.get(flow.kind, theme.positive[1]),
            linewidth=0.6 + 2.6 * strength,
            alpha=0.25 + 0.75 * strength,
            solid_capstyle="round",
            zorder=1,
        )
    _dots(axes, found, columns, theme)
    _frame(axes, [labels[pos] for pos in places], layers, theme)
    return figure


def _place(node: str, columns: dict[int, int]) -> tuple[float, float]:
    """Where a node such as `A3_7` stands."""
    name, pos = node.split("_")
    column = float(columns[int(pos)])
    if name == "X0":
        return column, 0.0
    aside = 0.0 if name[0] in "ACI" else _ASIDE
    return column + aside, int(name[1:]) + _HEIGHTS[name[0]]


def _dots(axes: "matplotlib.axes.Axes", found: Sequence[Flow], columns: dict[int, int], theme: Theme) -> None:
    nodes = sorted({x for flow in found for x in (flow.source, flow.target) if "_" in x})
    stream = [_place(x, columns) for x in nodes if x[0] in "XACI"]
    updates = [_place(x, columns) for x in nodes if x[0] not in "XACI"]
    for places, marker, colour in ((stream, "o", theme.ink), (updates, "s", theme.positive[1])):
        if places:
            axes.scatter(*zip(*places, strict=True), s=14, marker=marker, color=colour, zorder=2)


def _frame(axes: "matplotlib.axes.Axes", names: Sequence[str], layers: int, theme: Theme) -> None:
    """Tokens below, layers on the left, and what the colours mean."""
    axes.set_facecolor(theme.surface)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(-0.3, layers + 0.3)
    axes.set_xticks(range(len(names)))
    axes.set_xticklabels(names, rotation=40, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(layers + 1))
    axes.set_yticklabels(["embedded", *(f"after {i}" for i in range(layers))])
    axes.tick_params(colors=theme.ink, labelsize=8.5, length=0)
    axes.set_ylabel("layer", color=theme.muted, fontsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    told = (("stream", theme.muted), ("attention", theme.negative[1]), ("MLP", theme.positive[1]))
    for name, colour in told:
        axes.plot([], [], color=colour, linewidth=2.4, label=name)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8.5)
