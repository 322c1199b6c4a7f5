"""Pictures that lie one after another are told apart by their table."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hookgraph.errors import InputError
from hookgraph.graph.examples import count_examples, rows_of
from hookgraph.graph.pictures import are_packed, packed_in, refuse_uneven

SIZES = torch.tensor([[1, 4, 4], [1, 2, 8]])
PATCHES = torch.arange(32 * 5.0).view(32, 5)
PACKED = {"pixel_values": PATCHES, "image_grid_thw": SIZES}
TEXT = {"input_ids": torch.arange(14).view(2, 7)}


def test_what_lies_packed_is_told_by_what_a_table_counts():
    assert packed_in(PACKED).keys() == PACKED.keys()
    assert packed_in({**TEXT, **PACKED}).keys() == PACKED.keys()
    assert packed_in({**PACKED, "pixel_values": PATCHES[:30]}) == {}, "the rows are not as many as it counts"
    assert packed_in({"input_ids": torch.ones(2, 3).long(), "scores": torch.ones(2, 5)}) == {}


def test_examples_are_those_of_the_text_or_else_the_pictures():
    assert count_examples({**PACKED, **TEXT}) == 2
    assert count_examples(PACKED) == 2
    assert are_packed(PACKED)
    assert not are_packed({**PACKED, **TEXT})


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5),
    st.integers(1, 3),
    st.data(),
)
def test_chosen_examples_have_their_own_pictures(
    sizes: list[tuple[int, int]], each: int, data: st.DataObject
):
    count = len(sizes)
    table = torch.tensor([[1, *size] for size in sizes]).repeat_interleave(each, 0)
    owner = torch.arange(count).repeat_interleave(each).repeat_interleave(table.prod(-1))
    inputs = {
        "input_ids": torch.arange(count)[:, None],
        "pixel_values": owner[:, None].double(),
        "image_grid_thw": table,
    }
    order = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=6))
    chosen = rows_of(inputs, torch.tensor(order), count)
    sizes_of = {i: int(table[i * each : (i + 1) * each].prod(-1).sum()) for i in range(count)}
    assert chosen["pixel_values"].flatten().tolist() == [i for i in order for _ in range(sizes_of[i])]
    assert chosen["image_grid_thw"].equal(torch.cat([table[i * each : (i + 1) * each] for i in order]))


def test_pictures_that_examples_cannot_have_as_many_of_are_not_divided():
    inputs = {**PACKED, "input_ids": torch.zeros(3, 7).long()}
    whole = rows_of(inputs, torch.tensor([0, 1, 2] * 2), 3)
    assert whole["pixel_values"].equal(torch.cat([PATCHES] * 2)), "the whole batch again needs no owners"
    with pytest.raises(InputError, match="2 pictures, which 3 examples cannot have as many of each"):
        rows_of(inputs, slice(0, 1), 3)


def test_other_numbers_of_patches_are_refused():
    refuse_uneven({**TEXT, **PACKED}, 2)
    table = torch.tensor([[1, 4, 4], [1, 4, 8]])
    with pytest.raises(InputError, match=r"16, 32 patches, by grid_thw.*as many patches"):
        refuse_uneven({"hidden_states": torch.zeros(48, 3), "grid_thw": table}, 2)


def test_films_are_told_by_their_own_table():
    films = torch.arange(32 * 5.0).view(32, 5).flip(0)
    table = torch.tensor([[1, 2, 4], [1, 4, 6]])
    inputs = {**TEXT, **PACKED, "pixel_values_videos": films, "video_grid_thw": table}
    packed = packed_in(inputs)
    assert packed["pixel_values"].pictures == (16, 16)
    assert packed["pixel_values_videos"].pictures == (8, 24)
    turned = rows_of(inputs, torch.tensor([1, 0]), 2)
    assert turned["pixel_values"].equal(torch.cat([PATCHES[16:], PATCHES[:16]]))
    assert turned["pixel_values_videos"].equal(torch.cat([films[8:], films[:8]]))
    with pytest.raises(InputError, match="image_grid_thw, patch_grid_thw fit pixel_values alike"):
        packed_in({**PACKED, "patch_grid_thw": SIZES})


def test_what_has_a_row_per_picture_goes_with_its_picture():
    table = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 4, 2], [1, 2, 3]])
    inputs = {**TEXT, "pixel_values": PATCHES[:26], "image_grid_thw": table, "merge_sizes": torch.arange(4)}
    assert rows_of(inputs, torch.tensor([1, 0]), 2)["merge_sizes"].tolist() == [2, 3, 0, 1]


def test_tokens_tell_the_examples_whatever_stands_before_them():
    positions = torch.zeros(3, 2, 7).long()
    assert count_examples({"position_ids": positions, **TEXT}) == 2
