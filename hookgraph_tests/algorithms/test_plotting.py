"""`PatchingEffect.plot` draws what is left, and refuses what no map can show; ranks agree by Spearman."""

import sys

import pytest
import torch
from matplotlib import pyplot

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.effects.results import Convention, PatchingEffect
from hookgraph.algorithms.plotting import layer_maps
from hookgraph.algorithms.ranking import Node, Ranking
from hookgraph.errors import HookGraphError
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import ATTN_Z, FINAL_LN_OUT, MLP_OUT, RESID_POST


def effect_of(effects: dict[Location, torch.Tensor]) -> PatchingEffect:
    empty = Attribution({})
    return PatchingEffect(Attribution(effects), empty, empty, None, Convention("attrib"))


def ranking_of(*pairs: tuple[float, float | None]) -> Ranking:
    nodes = [
        Node(MLP_OUT[i], float(effect), None if exact is None else float(exact))
        for i, (effect, exact) in enumerate(pairs)
    ]
    return Ranking(tuple(nodes))


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


def test_plot_draws_a_map_per_type():
    effect = effect_of({x: torch.randn(2, 3, 4, 5) for x in (ATTN_Z[0], ATTN_Z[2])})
    figure = effect.mean("batch").sum("pos", "d_head").plot()
    panel = figure.axes[0]
    assert panel.get_title(loc="left") == "attn.z"
    assert [t.get_text() for t in panel.get_yticklabels()] == ["0", "2"]
    assert figure.number in pyplot.get_fignums()  # pyright: ignore[reportAttributeAccessIssue]


def test_plot_names_positions():
    effect = effect_of({RESID_POST[0]: torch.randn(2, 3, 4)}).mean("batch").sum("d_model")
    with pytest.raises(HookGraphError, match="labels for 'poz', which is no axis: did you mean pos"):
        effect.plot(labels={"poz": ["a", "b", "c"]})
    figure = effect.plot(labels={"pos": ["a", "b", "c"]})
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["a", "b", "c"]


def test_plot_of_too_many_axes_says_what_to_do():
    with pytest.raises(
        HookGraphError, match=r"attn\.z\[0\] have batch, pos, head, d_head: reduce all but one"
    ):
        effect_of({ATTN_Z[0]: torch.randn(1, 2, 3, 4)}).plot()


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HookGraphError, match=r"pip install 'hookgraph\[plot\]'"):
        effect_of({MLP_OUT[0]: torch.randn(1, 2, 3)}).sum("batch", "pos", "d_model").plot()


def test_nothing_cannot_be_drawn():
    with pytest.raises(HookGraphError, match="no effects to draw"):
        layer_maps({}, {})


@pytest.mark.parametrize(
    ("index", "names"),
    [
        ([3, 1], ("3", "1")),
        (slice(1, None, 2), ("1", "3")),
    ],
)
def test_parts_are_numbered_as_in_the_whole(index: slice | list[int], names: tuple[str, ...]):
    part = ATTN_Z[0].at(head=index)
    (grid,) = layer_maps({part: torch.randn(2)}, {part: (Dimension.HEAD,)})
    assert grid.columns == names


def test_single_entries_of_an_axis_are_one_map():
    effects = {ATTN_Z[i].at(head=h, pos=-1): torch.tensor(10.0 * i + h) for i in (0, 2) for h in range(3)}
    effects[MLP_OUT[1]] = torch.tensor(7.0)
    heads, mlps = layer_maps(effects, dict.fromkeys(effects, ()))
    assert (heads.title, heads.rows, heads.columns) == ("attn.z@pos=-1", ("0", "2"), ("0", "1", "2"))
    assert heads.values.tolist() == [[0, 1, 2], [20, 21, 22]]
    assert mlps.values.tolist() == [[7]]


def test_entries_that_a_layer_lacks_are_left_blank():
    chosen = {0: (1, 4), 3: (4,)}
    effects = {ATTN_Z[i].at(head=h): torch.tensor(float(h)) for i, heads in chosen.items() for h in heads}
    (grid,) = layer_maps(effects, dict.fromkeys(effects, ()))
    assert (grid.rows, grid.columns) == (("0", "3"), ("1", "4"))
    assert grid.values[0].tolist() == [1, 4]
    assert grid.values[1].isnan().tolist() == [True, False]


def test_entries_that_differ_in_two_axes_stay_apart():
    effects = {ATTN_Z[0].at(head=h, pos=h): torch.tensor(float(h)) for h in range(2)}
    assert [grid.values.tolist() for grid in layer_maps(effects, dict.fromkeys(effects, ()))] == [
        [[0]],
        [[1]],
    ]


def test_locations_without_layers_or_axes_are_single_cells():
    effects = {FINAL_LN_OUT: torch.tensor(2.0)}
    (grid,) = layer_maps(effects, {FINAL_LN_OUT: ()})
    assert grid.values.shape == (1, 1)
    assert grid.rows == grid.columns == ("",)


def test_layers_with_fewer_heads_leave_cells_empty():
    effects = {ATTN_Z[0]: torch.ones(2), ATTN_Z[1]: torch.ones(3)}
    (grid,) = layer_maps(effects, dict.fromkeys(effects, (Dimension.HEAD,)))
    assert grid.values.isnan().tolist() == [[False, False, True], [False, False, False]]
    assert grid.columns == ("0", "1", "2")


def test_two_parts_of_one_type_are_two_maps():
    effects = {ATTN_Z[0].at(pos=0): torch.ones(2), ATTN_Z[0].at(pos=1): torch.ones(2)}
    grids = layer_maps(effects, dict.fromkeys(effects, (Dimension.HEAD,)))
    assert [g.title for g in grids] == ["attn.z@pos=0", "attn.z@pos=1"]


# --- rank correlation -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(1, 10), (2, 20), (3, 1000)], 1.0),
        ([(1, 3), (2, 2), (3, 1)], -1.0),
        ([(1, 1), (2, 3), (3, 2)], 0.5),
        ([(1, 1), (2, 2), (3, None), (2, 2)], 1.0),
    ],
)
def test_the_correlation_is_that_of_ranks(pairs: list[tuple[float, float | None]], expected: float):
    assert ranking_of(*pairs).correlation == pytest.approx(expected)


def test_equal_numbers_share_their_rank():
    stats = pytest.importorskip("scipy.stats")
    pairs = [(1.0, 2.0), (1.0, 1.0), (3.0, 2.0), (4.0, 2.0), (4.0, 9.0)]
    expected = stats.spearmanr(*zip(*pairs, strict=True)).statistic
    assert ranking_of(*pairs).correlation == pytest.approx(expected)


def test_one_measured_node_has_no_correlation():
    with pytest.raises(HookGraphError, match=r"fewer than two nodes were measured exactly"):
        _ = ranking_of((1, 1), (2, None)).correlation
