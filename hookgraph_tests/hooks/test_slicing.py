from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hookgraph.errors import LocationError
from hookgraph.hooks.slicing import read, relative, write
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import ATTN_SCORES, ATTN_Z, RESID_POST

SIZES = {"batch": 2, "pos": 4, "head": 3, "d_head": 5}
"""The axes of attn.z, in order."""
Part = dict[str, Any]
"""An index by dimension, as `Location.at` takes it."""


def values(seed: int = 0) -> Tensor:
    return torch.randn(tuple(SIZES.values()), generator=torch.Generator().manual_seed(seed))


def index_of(size: int) -> st.SearchStrategy[int | slice | list[int]]:
    """Ints, slices and lists without repetition, counted from either end."""
    numbers = st.integers(-size, size - 1)
    bounds = st.none() | st.integers(-size - 2, size + 2)
    slices = st.builds(slice, bounds, bounds, st.none() | st.integers(1, 3))
    lists = st.lists(numbers, min_size=1, max_size=size, unique_by=lambda i: i % size)
    return numbers | slices | lists


parts = st.fixed_dictionaries({}, optional={dim: index_of(size) for dim, size in SIZES.items()})


def oracle(part: Part) -> tuple[Any, tuple[int, ...]]:
    """The index by `numpy.ix_`, and the axes that it keeps although an int was given for them."""
    chosen = [part.get(dim, slice(None)) for dim in SIZES]
    gone = tuple(axis for axis, index in enumerate(chosen) if isinstance(index, int))
    lists = [
        np.arange(size)[[index] if isinstance(index, int) else index]
        for index, size in zip(chosen, SIZES.values(), strict=True)
    ]
    return np.ix_(*lists), gone


@given(parts)
def test_reading_selects_what_numpy_selects(part: Part):
    whole = values()
    index, gone = oracle(part)
    expected = whole.numpy()[index].squeeze(gone)
    assert np.array_equal(read(ATTN_Z[0].at(**part), whole).numpy(), expected)


@given(parts)
def test_writing_changes_what_numpy_changes_in_a_copy(part: Part):
    whole, location = values(), ATTN_Z[0].at(**part)
    new = torch.randn_like(read(location, whole))
    index, gone = oracle(part)
    expected = whole.numpy().copy()
    expected[index] = np.expand_dims(new.numpy(), gone)
    assert np.array_equal(write(location, whole, new).numpy(), expected)
    assert torch.equal(whole, values()), "the value itself was changed"


@given(parts)
def test_what_was_written_is_read_back(part: Part):
    location = ATTN_Z[0].at(**part)
    new = torch.randn_like(read(location, values()))
    assert torch.equal(read(location, write(location, values(), new)), new)


def test_lists_apart_select_their_outer_product():
    value = torch.arange(24.0).view(1, 2, 3, 4)
    part = read(ATTN_SCORES[0].at(head=[1, 0], key_pos=[3, 0]), value)
    assert part.tolist() == [[[[15, 12], [19, 16], [23, 20]], [[3, 0], [7, 4], [11, 8]]]]


def test_a_list_may_name_an_entry_twice_when_reading():
    value = torch.arange(3.0).view(1, 3, 1)
    assert read(RESID_POST[0].at(pos=[2, 2, -1]), value).flatten().tolist() == [2, 2, 2]


@pytest.mark.parametrize("part", [{"pos": -1}, {"head": slice(1, None)}, {"pos": 0, "d_head": 2}])
def test_ints_and_slices_are_read_without_a_copy(part: Part):
    whole = values()
    assert read(ATTN_Z[0].at(**part), whole).untyped_storage().data_ptr() == (
        whole.untyped_storage().data_ptr()
    )


def test_the_whole_is_neither_copied_nor_written():
    whole, new = values(), values(1)
    assert read(ATTN_Z[0], whole) is whole
    assert write(ATTN_Z[0], whole, new) is new


@pytest.mark.parametrize(
    "part", [{"pos": -1}, {"head": [2, 0], "d_head": [1, 3]}, {"pos": slice(1, 3), "head": [1]}]
)
def test_writing_passes_gradients_to_the_part_and_to_the_rest(part: Part):
    location = ATTN_Z[0].at(**part)
    whole = values().requires_grad_()
    new = torch.randn_like(read(location, values())).requires_grad_()
    weights = values(2)
    of_whole, of_new = torch.autograd.grad((write(location, whole, new) * weights).sum(), (whole, new))
    assert torch.equal(of_new, read(location, weights))
    assert torch.equal(of_whole, write(location, weights, torch.zeros_like(new)))


# --- a part of a part -------------------------------------------------------------------------


def test_a_location_in_the_coordinates_of_a_part_that_holds_it():
    given = ATTN_Z[0].at(head=[0, 2], pos=[1, 3])
    asked = ATTN_Z[0].at(head=2, pos=[3, 1, 1], d_head=slice(1, 3))
    here = relative(asked, given)
    assert here == ATTN_Z[0].at(head=1, pos=[1, 0, 0], d_head=slice(1, 3))
    assert torch.equal(read(here, read(given, values())), read(asked, values()))
    assert relative(asked, ATTN_Z[0]) is asked


@pytest.mark.parametrize("part", [{}, {"head": 1}, {"head": [0, 1]}, {"head": slice(0, 1)}, {"head": -1}])
def test_a_part_that_was_not_handed_over_is_an_error(part: Part):
    given = ATTN_Z[0].at(head=[0, 2])
    with pytest.raises(LocationError, match=r"was asked for, and only attn.z\[0\]@head=0,2 was handed over"):
        relative(ATTN_Z[0].at(**part), given)


def out_of_range(dim: str, index: int | list[int], size: int) -> Any:
    shown = ",".join(map(str, index)) if isinstance(index, list) else index
    text = f"{dim}={shown} is out of range, {dim} has size {size}"
    return pytest.param(ATTN_Z[1].at(**{dim: index}), text, id=text)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        out_of_range("head", 3, 3),
        out_of_range("head", -4, 3),
        out_of_range("head", [0, 7], 3),
        out_of_range("pos", 4, 4),
        pytest.param(RESID_POST[0].at(pos=0), r"shape \(2, 4, 3, 5\), the location the axes", id="axes"),
    ],
)
def test_an_index_that_does_not_fit_the_tensor_is_an_error(location: Location, message: str):
    with pytest.raises(LocationError, match=message):
        read(location, values())
    with pytest.raises(LocationError, match=message):
        write(location, values(), values())
