"""The algebra of attributions: by location, with named axes; nothing is dropped, nothing broadcast."""

import operator
from pathlib import Path

import pandas
import pytest
import torch
from torch import Tensor

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.effects.results import Convention, PatchingEffect
from hookgraph.algorithms.parts import part_of
from hookgraph.errors import HookGraphError, LoadError, LocationError
from hookgraph.graph import storage
from hookgraph.locations import ATTN_Z, MLP_OUT
from hookgraph.ontology.autoencoder import ERROR, LATENTS
from hookgraph.ontology.locations import Location
from hookgraph_tests.unchecked import unchecked

LATENT = LATENTS().within(MLP_OUT[1], "sae")
LOST = ERROR().within(MLP_OUT[1], "sae")
HEADS = ATTN_Z[0].at(head=[2, 5], pos=slice(-3, None))


def drawn(seed: int = 0) -> Attribution:
    generator = torch.Generator().manual_seed(seed)
    shapes = {LATENT: (2, 3, 8), LOST: (2, 3, 1), HEADS: (2, 3, 2, 4)}
    values = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    values[LATENT] = values[LATENT] * (values[LATENT] > 1)
    return Attribution(values)


def same(a: Attribution, values: dict[Location, Tensor]) -> bool:
    return list(a) == list(values) and all(torch.equal(a[k], v) for k, v in values.items())


def test_arithmetic_is_by_location():
    a, b = drawn(0), drawn(1)
    assert same(a + b, {k: a[k] + b[k] for k in a})
    assert same(2 * a - b / 4, {k: 2 * a[k] - b[k] / 4 for k in a})
    assert same(1 - a, {k: 1 - a[k] for k in a})
    assert same(abs(-a), {k: a[k].abs() for k in a})


def test_a_mask_keeps_the_error_part():
    a = drawn()
    kept = a.where(abs(a) > 1.0)
    assert same(kept, {k: a[k] * (a[k].abs() > 1.0) for k in a})
    assert same((a > 0) & ~(a >= 1), {k: (a[k] > 0) & (a[k] < 1) for k in a})
    assert same((a < 0) | (a <= -1), {k: a[k] < 0 for k in a})


def test_contraction_is_over_everything_but_the_batch():
    a, b = drawn(0), drawn(1)
    expected = sum((a[k] * b[k]).flatten(1).sum(1) for k in a)
    assert torch.allclose(a.dot(b), torch.as_tensor(expected), rtol=1e-13)
    assert torch.allclose(a.norm().square(), a.dot(a), rtol=1e-13)
    assert a.mean("batch").dot(b.mean("batch")).shape == ()


def test_contraction_needs_no_axis_beside_the_batch_and_no_location():
    a = drawn().sum("pos", "d_head", "head", "latent", "d_model")
    assert torch.allclose(a.dot(a), sum((v * v for v in a.values()), torch.zeros(2)), rtol=1e-13)
    assert a.norm().shape == (2,)
    assert Attribution({}).norm() == 0


def test_comparing_for_equality_makes_a_mask():
    a, b = drawn(0), drawn(1)
    assert (a == a * 1).count() == sum(v.numel() for v in a.values())
    assert same(a != b, {k: a[k] != b[k] for k in a})
    assert same(a == 0, {k: a[k] == 0 for k in a})
    assert a != "something else"
    with pytest.raises(HookGraphError, match="a mask is neither true nor false"):
        bool(a == b)
    assert a
    assert not Attribution({})
    assert same(1 / a, {k: 1 / a[k] for k in a})


def test_masks_are_shown_and_ranked():
    mask = abs(drawn()) > 1
    assert [n.effect for n in mask.top(3)] == [1, 1, 1]
    assert f"holds at {mask.count()} of 102 nodes" in mask._repr_html_()  # pyright: ignore[reportPrivateUsage]
    assert mask.top(1)[0].location in mask.nonzero()


def test_nothing_is_broadcast():
    a = drawn()
    for other in (torch.ones(1), torch.ones(2, 1), "a", None, [1.0]):
        with unchecked(), pytest.raises(HookGraphError, match=r"or with one number, not .* nothing is broad"):
            operator.add(a, other)
    with pytest.raises(HookGraphError, match="masks have no difference"):
        operator.sub(a > 0, a < 0)
    with pytest.raises(HookGraphError, match="a mask has no negative"):
        operator.neg(a > 0)


def test_numbers_are_no_mask():
    a = drawn()
    with pytest.raises(HookGraphError, match="~ takes a mask"):
        operator.invert(a)
    for use in (lambda: a & a, lambda: (a > 0) | a, lambda: a.where(a)):
        with pytest.raises(HookGraphError, match="takes a mask, such as"):
            use()


def test_reduced_axes_are_named_and_gone():
    reduced = drawn().sum("pos", "d_head").mean("batch")
    assert {str(k.type): reduced.dims(k) for k in reduced} == {
        "latents": ("latent",),
        "error": ("d_model",),
        "attn.z": ("head",),
    }
    assert reduced.reduced == {"pos": "sum", "d_head": "sum", "batch": "mean"}


def test_nodes_stand_in_the_coordinates_of_the_whole_location():
    a = drawn()
    marked = a.map(torch.zeros_like)
    marked[HEADS][0, 0, 1, 3] = 1.0
    marked[LOST][1, 2, 0] = -2.0
    node, lost = (
        Location.parse(t) for t in ("attn.z[0]@batch=0;d_head=3;head=5;pos=-3", f"{LOST}@batch=1;pos=2")
    )
    assert set(marked.nonzero()) == {node, lost}
    assert marked.count() == 2
    assert [n.location for n in marked.top(2)] == [lost, node]
    assert {n.location: n.effect for n in marked.nodes() if n.effect} == {node: 1.0, lost: -2.0}


def test_a_slice_longer_than_the_axis_names_entries_that_exist():
    place = ATTN_Z[0].at(pos=slice(-10, None))
    effect = Attribution({place: torch.arange(6.0).view(1, 6, 1, 1)})
    assert effect.top(1)[0].location == ATTN_Z[0].at(batch=0, pos=-1, head=0, d_head=0)
    assert effect.top(6)[-1].location == ATTN_Z[0].at(batch=0, pos=-6, head=0, d_head=0)


def test_a_fully_reduced_attribution_still_prints_and_ranks():
    whole = drawn().sum("batch", "pos", "latent", "d_model", "head", "d_head")
    assert len(whole.to_frame()) == len(whole.top(5)) == 3
    assert "sae/error: one number" in repr(whole)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Attribution({LATENT: torch.zeros(2, 3, 8)}), "only one of the two attributions has .*sae/error"),
        (drawn().sum("pos"), "the axes of the two attributions differ: nothing reduced against sum over pos"),
        (Attribution({k: v[:1] for k, v in drawn().items()}), "the shapes .2, 3, 8. and .1, 3, 8. differ"),
    ],
    ids=["locations", "axes", "shapes"],
)
def test_what_does_not_match_is_refused(other: Attribution, message: str):
    with pytest.raises(HookGraphError, match=message):
        drawn() + other


def test_an_unknown_axis_or_location_is_refused_with_near_names():
    with unchecked(), pytest.raises(LocationError, match=r"one by one, as in \.sum\('pos', 'd_head'\)"):
        drawn().sum(["head", "pos"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(LocationError, match="no axis 'heads': did you mean head"):
        drawn().sum("heads")
    with pytest.raises(
        LocationError, match=r"nothing was attributed to attn.z\[1\]: known: attn.z\[0\]@head"
    ):
        drawn()[ATTN_Z[1]]


def effect() -> PatchingEffect:
    a = drawn()
    return PatchingEffect(
        a.sum("d_head"),
        a,
        Attribution({}),
        torch.tensor([1.0, 2.0]),
        Convention("ig", steps=7, tolerance=0.1),
        {LATENT: torch.tensor([0.0, 0.5])},
        (LATENT,),
        {"model": "toy"},
    )


def test_a_saved_effect_loads_as_it_was_and_latents_are_stored_sparsely(tmp_path: Path):
    before, path = effect(), tmp_path / "effect.safetensors"
    before.save(path)
    after = PatchingEffect.load(path)
    assert same(after.effects, dict(before.effects))
    assert same(after.deltas, dict(before.deltas))
    assert after.effects.reduced == before.effects.reduced
    assert after.convention == before.convention
    assert after.incomplete == before.incomplete
    assert torch.equal(after.residuals[LATENT], before.residuals[LATENT])
    assert after.metadata == before.metadata
    stored, _ = storage.read(path, "patching effect")
    assert f"effects/{LATENT}" not in stored
    assert len(stored[f"effects/{LATENT}#values"]) == before.effects[LATENT].count_nonzero()


def test_an_effect_at_an_undeclared_location_is_refused(tmp_path: Path):
    path = tmp_path / "effect.safetensors"
    groups = ("effects", "deltas", "grads", "standard_errors")
    header = {
        "order": {**{key: [] for key in groups}, "effects": ["no.such[0]"], "residuals": []},
        "convention": {"method": "attrib"},
        "reduced": {key: {} for key in groups},
        "incomplete": [],
        "metadata": {},
    }
    storage.write(path, "patching effect", {"effects/no.such[0]": torch.zeros(1)}, header)
    with pytest.raises(LoadError, match="not declared; import what declares it"):
        PatchingEffect.load(path)


def test_an_incomplete_effect_says_so():
    for told in (repr(effect()), effect()._repr_html_()):  # pyright: ignore[reportPrivateUsage]
        assert "not within the tolerance of 0.1: mlp.out[1]/sae/latents" in told
        assert "total effect" in told


def test_tables_and_nodes_are_those_of_each_node_by_itself():
    """Of parts, joint axes, reduced ones, a location with a fixed entry, and one without numbers."""
    fixed = ATTN_Z[1].at(head=2, pos=slice(1, 4))
    values = {**drawn(), fixed: torch.randn(2, 3, 4), MLP_OUT[0].at(pos=slice(9, 10)): torch.zeros(2, 0, 8)}
    for given in (
        Attribution(values),
        Attribution(values).sum("pos"),
        Attribution(values).mean("batch", "d_head"),
    ):
        nodes: list[tuple[Location, float]] = []
        for location, value in given.items():
            axes = [d for d in given.dims(location) if d not in location.type.joint]
            sizes = dict(zip(given.dims(location), value.shape, strict=True))
            for place in torch.ones_like(value).nonzero().tolist():
                point = dict(zip(given.dims(location), place, strict=True))
                told = part_of(location, {d: point[d] for d in axes}, sizes)
                nodes.append((told, float(value[tuple(place)])))
        assert [(n.location, n.effect) for n in given.nodes()] == nodes
        assert [hash(n.location) for n in given.nodes()] == [hash(x) for x, _ in nodes]
        assert given.nonzero() == tuple(x for x, effect in nodes if effect)
        rows = [
            {"location": str(x.whole), **{d.value: i for d, i in x.index}, "effect": effect}
            for x, effect in nodes
        ]
        pandas.testing.assert_frame_equal(given.to_frame(), pandas.DataFrame(rows))


def test_the_mean_of_a_mask_is_the_share_where_it_holds():
    mask = drawn() > 0
    assert torch.allclose(mask.mean("pos")[LATENT], mask[LATENT].float().mean(1))


def test_what_is_no_location_or_no_number_of_nodes_is_refused():
    with unchecked(), pytest.raises(LocationError, match=r"use Location.parse\('attn.z\[0\]'\)"):
        drawn()["attn.z[0]"]  # pyright: ignore[reportArgumentType]
    with pytest.raises(HookGraphError, match="k=-1: it has to be a whole number, at least 0"):
        drawn().top(-1)
