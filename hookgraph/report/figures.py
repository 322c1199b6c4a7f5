"""Maps of a `PatchingEffect` as figures, and figures as bytes for files and pages."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, final

from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.plotting import DARK, LIGHT, Theme, draw, layer_maps
from hookgraph.ontology.dimensions import Dimension
from hookgraph.report.breakdown import by_type, places, reduced, units

if TYPE_CHECKING:
    import matplotlib.figure

_DOTS_PER_INCH = 160
_WIDEST = 64
"""Maps on pages have at most so many columns; of neurons and latents only the top ones are listed."""


def map_of(
    effect: PatchingEffect,
    *,
    title: str = "",
    labels: dict[str, Sequence[str]] | None = None,
    theme: Theme = LIGHT,
) -> "matplotlib.figure.Figure":
    """Layers on y, the one axis that the effects still have on x; one map per kind of location.

    Raises:
        HookGraphError: more than one axis is left, or matplotlib is not installed.
    """
    axes = {location: effect.dims(location) for location in effect.effects}
    grids = layer_maps(effect.effects, axes, labels)
    return draw([replace(grid, title=title or grid.title) for grid in grids], theme)


def head_map(effect: PatchingEffect, *, title: str = "", theme: Theme = LIGHT) -> "matplotlib.figure.Figure":
    """The layer x head map of effects at locations that have heads, averaged over the batch.

    Raises:
        HookGraphError: the locations have other axes than heads, or matplotlib is not installed.
    """
    return map_of(reduced(effect, (Dimension.HEAD, Dimension.KV_HEAD)), title=title, theme=theme)


def position_map(
    effect: PatchingEffect, tokens: Sequence[str], *, title: str = "", theme: Theme = LIGHT
) -> "matplotlib.figure.Figure":
    """The layer x position map of effects, averaged over the batch, with tokens to name the positions.

    Raises:
        HookGraphError: there are fewer tokens than positions, or matplotlib is not installed.
    """
    labels = {Dimension.POS.value: tokens}
    return map_of(reduced(effect, (Dimension.POS,)), title=title, labels=labels, theme=theme)


def png(figure: "matplotlib.figure.Figure") -> bytes:
    """The figure as a PNG file."""
    file = BytesIO()
    with warnings.catch_warnings():
        # Tokens come in scripts that the font may lack; a box is drawn for these.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph .* missing")
        figure.savefig(file, format="png", dpi=_DOTS_PER_INCH)
    return file.getvalue()


@final
@dataclass(frozen=True, slots=True)
class Picture:
    """A figure twice, for light and for dark surroundings."""

    light: bytes
    dark: bytes
    width: float
    """In inches."""
    alt: str
    """What it shows, in words."""

    @staticmethod
    def of(draw_in: "Callable[[Theme], matplotlib.figure.Figure]", alt: str) -> "Picture":
        """Draw a figure in both themes."""
        light = draw_in(LIGHT)
        return Picture(png(light), png(draw_in(DARK)), float(light.get_size_inches()[0]), alt)


def pictures(effect: PatchingEffect, tokens: Sequence[str]) -> list[tuple[Picture, str]]:
    """A map and its caption per type of location, where there are parts few enough to be told apart."""
    found: list[tuple[Picture, str]] = []
    for part in filter(None, (units(effect), places(effect))):
        for kind, one in by_type(part).items():
            if 1 < max(x.numel() for x in one.effects.values()) <= _WIDEST:

                def drawn(theme: Theme, one: PatchingEffect = one) -> "matplotlib.figure.Figure":
                    return map_of(one, labels={Dimension.POS.value: tokens}, theme=theme)

                caption = f"{kind}: the effect of each part, layer by layer."
                found.append((Picture.of(drawn, f"map of the effects at {kind}"), caption))
    return found
