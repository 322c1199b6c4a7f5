"""Pictures one after another on one axis: towers without an axis for the batch."""

import pytest
import torch

from hookgraph.binding import bind
from hookgraph.binding.tracing.packing import counted_by, examples_in, repeated
from hookgraph.errors import InputError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import (
    ATTN_K,
    ATTN_Q,
    ATTN_RESULT,
    ATTN_V,
    ATTN_V_IN,
    ATTN_Z,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
)
from hookgraph.ontology.weights import W_O
from hookgraph_tests.tiny import build

SIZES = torch.tensor([[1, 4, 4], [1, 2, 8]])
PATCHES = torch.arange(32 * 5.0).view(32, 5)


@pytest.fixture(scope="module")
def tower() -> HookGraph:
    """A tower that is given the patches of pictures and a table of their sizes, proven."""
    return bind(build("base", "glm4v_vision"), cached=False)


def test_the_table_of_pictures_is_told_by_what_it_counts():
    assert counted_by({"patches": PATCHES, "sizes": SIZES}) == "sizes"
    assert counted_by({"patches": PATCHES[:30], "sizes": SIZES}) == "", (
        "the rows are not as many as it counts"
    )
    assert counted_by({"patches": PATCHES, "sizes": SIZES, "ids": torch.zeros(2, 7).long()}) == ""
    assert counted_by({"ids": torch.ones(2, 3).long()}) == ""


def test_copies_of_packed_pictures_follow_one_another():
    copied = repeated({"patches": PATCHES, "sizes": SIZES, "use_cache": False}, "sizes", 3)
    assert copied["patches"].equal(torch.cat([PATCHES] * 3))
    assert copied["sizes"].equal(torch.cat([SIZES] * 3))
    assert copied["use_cache"] is False


def test_pictures_of_several_sizes_have_no_axis_for_the_batch():
    sizes = torch.tensor([[1, 4, 4], [1, 4, 8]])
    with pytest.raises(InputError, match=r"16, 32 patches, by grid_thw.*as many patches each"):
        examples_in({"grid_thw": sizes}, "grid_thw")


def test_a_packed_stream_has_batch_and_positions_as_axes(tower: HookGraph):
    example = tower.binding.example
    run = tower.run(example, save=[RESID_PRE[0], RESID_MID[0], MLP_OUT[0], RESID_POST[0]])
    assert run[RESID_POST[0]].shape == (2, 16, 32)
    torch.testing.assert_close(run[RESID_MID[0]] + run[MLP_OUT[0]], run[RESID_POST[0]])


def test_an_edit_of_one_picture_leaves_the_other_as_it_is(tower: HookGraph):
    example = tower.binding.example

    def doubled(stream: torch.Tensor) -> torch.Tensor:
        return torch.cat([stream[:1], 2 * stream[1:]])

    plain = tower.run(example, save=[RESID_POST[1]])[RESID_POST[1]]
    edited = tower.hook(RESID_PRE[0], doubled).run(example, save=[RESID_POST[1]])[RESID_POST[1]]
    assert edited[0].equal(plain[0])
    assert not torch.isclose(edited[1], plain[1]).all()


def test_heads_of_a_packed_stream_attend_picture_by_picture(tower: HookGraph):
    run = tower.run(tower.binding.example, save=[ATTN_Q[0], ATTN_K[0], ATTN_V[0], ATTN_Z[0], ATTN_RESULT[0]])
    q, k, v, z = (run[kind[0]] for kind in (ATTN_Q, ATTN_K, ATTN_V, ATTN_Z))
    pattern = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(z, torch.einsum("bhqk,bkhd->bqhd", pattern, v), atol=1e-5, rtol=1e-4)
    wide = torch.einsum("bphd,hdm->bphm", z, tower.binding.weight(W_O, 0))
    torch.testing.assert_close(run[ATTN_RESULT[0]], wide)


def test_an_edit_of_the_heads_of_one_picture_leaves_the_other_as_it_is(tower: HookGraph):
    example = tower.binding.example
    plain = tower.run(example, save=[RESID_POST[0]])[RESID_POST[0]]
    for kind in (ATTN_Q, ATTN_V, ATTN_V_IN, ATTN_RESULT):
        hooked = tower.hook(kind[0], lambda x: torch.cat([x[:1], 2 * x[1:]]))
        edited = hooked.run(example, save=[RESID_POST[0]])[RESID_POST[0]]
        torch.testing.assert_close(edited[0], plain[0])
        assert not torch.allclose(edited[1], plain[1])


def test_examples_end_to_end_in_one_row_are_told_apart():
    graph = bind(build("base", "pixtral"), cached=False)
    run = graph.run(graph.binding.example, save=[RESID_POST[1]])
    assert run[RESID_POST[1]].shape == (2, 16, 32)
    assert run.logits.shape == (1, 32, 32)
    assert "there are two examples" in graph.report.absent[ATTN_Q[0]]
