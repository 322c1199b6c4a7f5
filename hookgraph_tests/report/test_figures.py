"""Maps are drawn, named, coloured around 0, and saved as pictures that show something."""

import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.plotting import DARK, LIGHT, Theme
from hookgraph.errors import HookGraphError
from hookgraph.ontology.transformer import ATTN_Z, MLP_OUT, RESID_POST
from hookgraph.report import Picture, head_map, map_of, position_map
from hookgraph.report.breakdown import only
from hookgraph.report.figures import pictures, png


@pytest.fixture
def heads(effect: PatchingEffect) -> PatchingEffect:
    return only(effect, ATTN_Z)


@pytest.fixture
def stream(effect: PatchingEffect) -> PatchingEffect:
    return only(effect, RESID_POST)


def labels(found: Sequence[object]) -> list[str]:
    return [label.get_text() for label in found]  # pyright: ignore[reportAttributeAccessIssue]


def colours(image: bytes) -> int:
    """How many colours a picture has, coarsely."""
    pixels = imread(BytesIO(image), format="png")[..., :3]
    return len({tuple(p) for p in (pixels.reshape(-1, 3) * 16).astype(int).tolist()})


def test_the_head_map_has_layers_on_y_and_heads_on_x(heads: PatchingEffect):
    axes = head_map(heads, title="Heads").axes[0]
    assert axes.get_xlabel() == "head"
    assert axes.get_ylabel() == "layer"
    assert labels(axes.get_xticklabels()) == ["0", "1", "2", "3"]
    assert labels(axes.get_yticklabels()) == ["0", "1"]
    assert axes.get_title(loc="left") == "Heads"
    assert axes.yaxis_inverted()


def test_the_colours_are_centred_at_zero(heads: PatchingEffect):
    mesh = head_map(heads).axes[0].collections[0]
    low, high = mesh.get_clim()
    assert low == -high
    assert high == pytest.approx(abs(torch.as_tensor(mesh.get_array())).max())
    middle = mesh.get_cmap()(0.5)
    assert min(middle[:3]) > 0.98


def test_the_cells_hold_the_numbers(heads: PatchingEffect):
    mesh = head_map(heads).axes[0].collections[0]
    expected = torch.stack([heads.effects[x].mean(0).sum((0, 2)) for x in heads.effects])
    torch.testing.assert_close(torch.as_tensor(mesh.get_array()).view(2, 4), expected)


def test_tokens_name_the_positions(stream: PatchingEffect):
    axes = position_map(stream, ("a", "b → c", "$d_x$")).axes[0]
    assert labels(axes.get_xticklabels()) == ["a", "b → c", "$d_x$"]


def test_too_few_tokens_are_an_error(stream: PatchingEffect):
    with pytest.raises(HookGraphError, match=r"2 labels for pos, which has 3 entries"):
        position_map(stream, ("a", "b"))


def test_an_axis_too_many_is_an_error(heads: PatchingEffect):
    with pytest.raises(HookGraphError, match=r"have batch, pos, head, d_head: reduce all but one"):
        map_of(heads)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_picture_shows_something(heads: PatchingEffect, theme: Theme):
    image = png(head_map(heads, theme=theme))
    assert image.startswith(b"\x89PNG")
    assert colours(image) > 20


def test_a_picture_has_both_themes(heads: PatchingEffect):
    def drawn(theme: Theme) -> Figure:
        return head_map(heads, theme=theme)

    picture = Picture.of(drawn, "heads")
    light, dark = (imread(BytesIO(x), format="png")[0, 0, :3].mean() for x in (picture.light, picture.dark))
    assert light > 0.95
    assert dark < 0.2
    assert 2 < picture.width < 11


def test_tokens_of_any_script_are_drawn_without_a_warning(stream: PatchingEffect):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert png(position_map(stream, ("牛乳", "$\\frac", "\x00")))


def test_pictures_leave_out_what_has_no_parts_or_too_many(effect: PatchingEffect):
    found = pictures(effect, ("a", "b", "c"))
    assert [caption.split(":")[0] for _, caption in found] == ["attn.z", "resid.post"]
    wide = {MLP_OUT[0]: torch.randn(1, 100, 2)}
    many = replace(effect, effects=Attribution(wide))
    assert pictures(many, ()) == []


def test_plotting_needs_matplotlib_only_when_it_draws(heads: PatchingEffect, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(HookGraphError, match=r"pip install 'hookgraph\[plot\]'"):
        head_map(heads)


def test_importing_the_command_line_does_not_import_matplotlib():
    code = "import sys, hookgraph.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
