"""Maps of effects: one coloured cell per number, blue below 0 and orange above, 0 in the surface's colour."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.folding import folded, kind_of
from hookgraph.errors import HookGraphError, nearest
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.colors
    import matplotlib.figure
    import matplotlib.ticker

_MISSING = "maps are drawn with matplotlib, which is not installed: pip install 'hookgraph[plot]'"
_AXES = tuple(d.value for d in Dimension)
_NUMBERED = 24
"""Maps with more columns than this show colours only."""
_CELL = (0.56, 0.44)
"""Inches per cell, as far as the map stays within `_LARGEST`."""
_LARGEST = (10.2, 9.0)
_MARGIN = (1.5, 1.0)


@final
@dataclass(frozen=True, slots=True)
class Theme:
    """The colours of a map. Blue and orange are told apart with any common colour vision."""

    surface: str
    ink: str
    muted: str
    negative: tuple[str, str]
    """From weak to strong."""
    positive: tuple[str, str]


LIGHT = Theme("#ffffff", "#1b1f24", "#6b7280", ("#9dc3ea", "#0b4a8f"), ("#f6bd8a", "#a83c05"))
DARK = Theme("#161a20", "#e6e8eb", "#969eaa", ("#2a588f", "#7fbcff"), ("#8a4a1c", "#ffb070"))


@final
@dataclass(frozen=True, slots=True)
class Grid:
    """What one map shows: a number per row and column; NaN where there is none."""

    title: str
    values: Float[Tensor, "..."]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_axis: str
    column_axis: str
    words: tuple[tuple[str, ...], ...] | None = None
    """What stands in the cells instead of their numbers."""
    unit: str = "effect"


def layer_maps(
    effects: Mapping[Location, Float[Tensor, "..."]],
    axes: Mapping[Location, tuple[Dimension, ...]],
    labels: Mapping[str, Sequence[str]] | None = None,
) -> list[Grid]:
    """One map per kind of location: a row per layer, a column per entry of the one axis that is left. Single
    entries of an axis, as in `attn.z[3].at(head=5)`, are put together as if it were left.

    Args:
        effects: numbers by location.
        axes: the axes that they still have, at most one each.
        labels: what to call the entries of an axis, instead of counting them.

    Raises:
        HookGraphError: there is nothing to draw, an axis too many, or a label too few.
    """
    effects, axes = folded(effects, axes)
    kinds: dict[str, list[Location]] = {}
    for location in effects:
        if len(axes[location]) > 1:
            raise HookGraphError(
                f"a map has layers and one other axis, the effects at {location} have "
                f"{', '.join(axes[location])}: reduce all but one, as in .mean('batch').sum('pos', 'd_head')"
            )
        kinds.setdefault(kind_of(location), []).append(location)
    if not kinds:
        raise HookGraphError("there are no effects to draw")
    for name in labels or {}:
        if name not in _AXES:  # an axis that these maps do not have is left out
            raise HookGraphError(f"there are labels for {name!r}, which is no axis: {nearest(name, _AXES)}")
    return [_grid(kind, where, effects, axes, labels or {}) for kind, where in kinds.items()]


def draw(
    grids: Sequence[Grid], theme: Theme = LIGHT, figure: "matplotlib.figure.Figure | None" = None
) -> "matplotlib.figure.Figure":
    """Draw maps one below the other, into a figure of their size unless one is given.

    Raises:
        HookGraphError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HookGraphError(_MISSING) from error
    sizes = [_size(grid) for grid in grids]
    if figure is None:
        figure = Figure(layout="constrained")
    figure.set_size_inches(max(w for w, _ in sizes), sum(h for _, h in sizes))
    figure.set_facecolor(theme.surface)
    heights = [h for _, h in sizes]
    panels = figure.subplots(len(grids), squeeze=False, gridspec_kw={"height_ratios": heights})
    for panel, grid in zip(panels[:, 0], grids, strict=True):
        _draw_one(panel, grid, theme)
    return figure


def new_figure() -> "matplotlib.figure.Figure":
    """A figure of pyplot, so that notebooks and `plt.show()` find it.

    Raises:
        HookGraphError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise HookGraphError(_MISSING) from error
    return pyplot.figure(layout="constrained")


def bars(names: Sequence[str], values: Sequence[float], unit: str, title: str) -> "matplotlib.figure.Figure":
    """One bar per name, the first on top: blue below 0, orange above.

    Raises:
        HookGraphError: matplotlib is not installed.
    """
    figure, theme = new_figure(), LIGHT
    figure.set_size_inches(6.5, 1.0 + 0.26 * len(names))
    axes = figure.subplots()
    colours = [theme.negative[1] if x < 0 else theme.positive[1] for x in values]
    axes.barh(range(len(names)), values, color=colours, height=0.65)
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0.0, color=theme.muted, linewidth=0.5)
    axes.set_xlabel(unit, color=theme.muted, fontsize=9)
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    return figure


def _grid(
    kind: str,
    where: Sequence[Location],
    effects: Mapping[Location, Tensor],
    axes: Mapping[Location, tuple[Dimension, ...]],
    labels: Mapping[str, Sequence[str]],
) -> Grid:
    width = max(effects[x].numel() for x in where)
    values = torch.full((len(where), width), torch.nan)
    for row, location in enumerate(where):
        found = effects[location].detach().flatten().float().cpu()
        values[row, : len(found)] = found
    left = axes[where[0]]
    columns = _names(where[0], left[0], width, labels) if left else ("",)
    rows = tuple("" if x.layer is None else str(x.layer) for x in where)
    return Grid(kind, values, rows, columns, "layer", left[0].value.replace("_", " ") if left else "")


def _names(
    location: Location, axis: Dimension, width: int, labels: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """What the entries of an axis are called: by their labels, or by their numbers in the whole axis."""
    names = labels.get(axis)
    part = dict(location.index).get(axis)
    if isinstance(part, tuple):
        numbers = list(part)
    elif isinstance(part, slice):
        numbers = [(part.start or 0) + i * (part.step or 1) for i in range(width)]
    else:
        numbers = list(range(width))
    if names is None:
        return tuple(map(str, numbers))
    if max(numbers) >= len(names):
        raise HookGraphError(f"{len(names)} labels for {axis}, which has {max(numbers) + 1} entries or more")
    return tuple(names[i] for i in numbers)


def _size(grid: Grid) -> tuple[float, float]:
    """Width and height of one map in inches."""
    rows, columns = grid.values.shape
    long = max(map(len, grid.columns)) > 3
    width = _MARGIN[0] + _CELL[0] * max(columns, 6)
    height = _MARGIN[1] + _CELL[1] * rows + (0.7 if long else 0)
    return min(width, _LARGEST[0]), min(height, _LARGEST[1])


def _draw_one(axes: "matplotlib.axes.Axes", grid: Grid, theme: Theme) -> None:
    """Cells, their numbers, names of rows and columns, and the scale."""
    from matplotlib.colors import to_rgb

    scale = float(grid.values.nan_to_num().abs().max()) or 1.0
    colours = _colours(theme)
    axes.set_facecolor(theme.surface)
    mesh = axes.pcolormesh(
        grid.values.numpy(), cmap=colours, vmin=-scale, vmax=scale, edgecolors=theme.surface, linewidth=1.5
    )
    axes.invert_yaxis()
    rows, columns = grid.values.shape
    if columns <= _NUMBERED:
        for row in range(rows):
            for column in range(columns):
                value = float(grid.values[row, column])
                ink = theme.muted if abs(value) < 0.02 * scale else _ink(colours(0.5 + value / scale / 2))
                place = (column + 0.5, row + 0.5)
                text = _number(value, scale) if grid.words is None else grid.words[row][column]
                axes.text(
                    *place, text, ha="center", va="center", color=ink, fontsize=7.5, parse_math=False,
                    clip_on=True,
                )  # fmt: skip
    _name_axes(axes, grid, theme)
    bar = axes.figure.colorbar(mesh, ax=axes, aspect=6 * rows, format="%+.3g", pad=0.02, shrink=0.96)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label(grid.unit, color=theme.muted, fontsize=9)
    bar.ax.tick_params(colors=theme.muted, labelsize=7.5, length=0)
    bar.locator = _few_ticks()
    bar.update_ticks()
    axes.spines[:].set_color(to_rgb(theme.surface))


def _name_axes(axes: "matplotlib.axes.Axes", grid: Grid, theme: Theme) -> None:
    rows, columns = grid.values.shape
    every = max(1, columns // 40)
    axes.set_xticks([i + 0.5 for i in range(0, columns, every)])
    axes.set_yticks([i + 0.5 for i in range(rows)])
    long = max(map(len, grid.columns)) > 3
    axes.set_xticklabels(
        grid.columns[::every],
        rotation=40 if long else 0,
        ha="right" if long else "center",
        rotation_mode="anchor",
        parse_math=False,
    )
    axes.set_yticklabels(grid.rows, parse_math=False)
    axes.tick_params(colors=theme.ink, labelsize=8.5, length=0)
    axes.set_xlabel(grid.column_axis, color=theme.muted, fontsize=9)
    axes.set_ylabel(grid.row_axis if any(grid.rows) else "", color=theme.muted, fontsize=9)
    axes.set_title(grid.title, color=theme.ink, fontsize=10, loc="left", fontweight="bold", parse_math=False)


def _colours(theme: Theme) -> "matplotlib.colors.Colormap":
    from matplotlib.colors import LinearSegmentedColormap

    stops = [*reversed(theme.negative), theme.surface, *theme.positive]
    places = (0, 0.25, 0.5, 0.75, 1)
    return LinearSegmentedColormap.from_list("hookgraph", list(zip(places, stops, strict=True)))


def _ink(colour: tuple[float, ...]) -> str:
    """White or near black, whichever contrasts more with a colour (by the formula of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.056 else "#101418"


def _number(value: float, scale: float) -> str:
    if value != value:
        return ""
    if scale < 1e-3:
        return f"{value:+.0e}"
    decimals = sum(scale < limit for limit in (1e2, 1e1, 1e-1, 1e-2))
    return f"{value:+.{decimals}f}" if round(value, decimals) else "0"


def _few_ticks() -> "matplotlib.ticker.MaxNLocator":
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, symmetric=True)
