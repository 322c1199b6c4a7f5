from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hookgraph.errors import LocationError
from hookgraph.hooks.positions import Place, Placed, PlacedGradient, Span, is_placed, read_at
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import ATTN_PATTERN, ENCODER, RESID_POST, XATTN_PATTERN

HERE = RESID_POST[0]


def place(past: int, length: int, *padding: int, step: int = 0, alone: bool = False) -> Place:
    return Place({"decoder": Span(past, length, padding or (0,))}, step, alone)


def numbered(rows: int, span: Span) -> Tensor:
    """A stream of width one whose values are the positions of its rows."""
    padding = torch.tensor(span.padding).expand(rows)[:, None]
    return (torch.arange(span.length) + span.past - padding)[..., None].double()


def seen(location: Location, where: Place) -> list[Any] | None:
    """The positions that a hook at `location` is given, by row."""
    span = where.spans["decoder"]
    found = read_at(location, numbered(2, span), where)
    return None if found is None else found.squeeze(-1).tolist()


INDICES: tuple[tuple[Any, Callable[[list[int]], Any]], ...] = (
    (7, lambda held: 7 if 7 in held else None),
    ([2, 7], lambda held: [p for p in (2, 7) if p in held] or None),
    (slice(2, None), lambda held: [p for p in held if p >= 2] or None),
    (slice(None, 3), lambda held: [p for p in held if 0 <= p < 3] or None),
    (slice(1, 8, 3), lambda held: [p for p in held if p in (1, 4, 7)] or None),
    (slice(3, -1), lambda held: [p for p in held[:-1] if p >= 3] or None),
    (-1, lambda held: held[-1]),
    (slice(-2, None), lambda held: held[-2:]),
)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize(("past", "length"), [(0, 6), (6, 1), (7, 1), (9, 1), (6, 3)])
@pytest.mark.parametrize(("index", "expected"), INDICES, ids=[str(i) for i, _ in INDICES])
def test_an_index_names_the_positions_of_the_sequence_that_the_pass_holds(
    index: Any, expected: Callable[[list[int]], Any], past: int, length: int, padding: int
):
    held = [past + c - padding for c in range(length)]
    wanted = expected(held)
    found = seen(HERE.at(pos=index), place(past, length, padding))
    assert found == (None if wanted is None else [wanted, wanted])


@pytest.mark.parametrize(
    ("index", "first", "second"),
    [(1, 1, 1), ([0, 3], [0, 3], [0, 3]), (slice(1, 4), [1, 2, 3], [1, 2, 3]), (-1, 5, 3)],
)
def test_rows_that_are_padded_differently_have_their_own_columns(index: Any, first: Any, second: Any):
    assert seen(HERE.at(pos=index), place(0, 6, 0, 2)) == [first, second]


def test_an_edit_reaches_the_position_of_each_row_and_nothing_else():
    where = place(0, 6, 0, 2)
    value = numbered(2, where.spans["decoder"])
    edited = Placed(HERE.at(pos=[1, 3]), lambda x: x + 100, where)(value)
    assert (edited - value).squeeze(-1).tolist() == [[0, 100, 0, 100, 0, 0], [0, 0, 0, 100, 0, 100]]


def test_an_edit_in_place_reaches_the_position_of_each_row():
    where = place(0, 6, 0, 2)
    value = numbered(2, where.spans["decoder"])
    edited = Placed(HERE.at(pos=1), lambda x: x.fill_(50.0), where)(value.clone())
    assert (edited != value).squeeze(-1).tolist() == [[c == 1 for c in range(6)], [c == 3 for c in range(6)]]


def test_rows_that_do_not_hold_a_position_yet_keep_what_they_had():
    where = place(6, 1, 0, 2)
    value = numbered(2, where.spans["decoder"])
    given = list[Tensor]()
    edited = Placed(HERE.at(pos=6), lambda x: given.append(x) or x + 100, where)(value)
    assert edited.flatten().tolist() == [106, 4]
    assert given[0].shape == (2, 1), "the hook sees the whole batch"
    with pytest.raises(LocationError, match="some rows hold these positions, others do not"):
        read_at(HERE.at(pos=6), value, where)


def test_keys_go_back_to_the_start_of_the_sequence_or_of_the_window():
    pattern = ATTN_PATTERN[0].at(key_pos=3)
    columns = torch.arange(7.0).expand(1, 1, 1, 7)
    assert read_at(pattern, columns, place(6, 1)) == 3
    assert read_at(pattern, columns, place(6, 1, 2)) == 5
    window = torch.arange(4.0).expand(1, 1, 1, 4)  # positions 3 to 6
    assert read_at(pattern, window, place(6, 1)) == 0
    assert read_at(ATTN_PATTERN[0].at(key_pos=2), window, place(6, 1)) is None


def test_keys_of_another_stack_are_counted_as_they_stand():
    columns = torch.arange(7.0).expand(1, 1, 1, 7)
    assert read_at(XATTN_PATTERN[0].at(key_pos=3), columns, place(6, 1, 2)) == 3


def test_steps_choose_passes():
    chosen = {
        str(index): [s for s in range(6) if seen(HERE.at(step=index), place(s, 1, step=s)) is not None]
        for index in (0, [1, 4], slice(2, None), slice(None, 5, 2))
    }
    assert list(chosen.values()) == [[0], [1, 4], [2, 3, 4, 5], [0, 2, 4]]


def test_other_stacks_have_one_step():
    assert read_at(ENCODER.RESID_POST[0].at(step=0), torch.zeros(1, 2, 3), place(5, 1, step=4)) is not None


def test_a_gradient_hook_keeps_to_the_pass_it_was_set_in():
    where = place(0, 4, 1)
    value = torch.ones(1, 4, 1, requires_grad=True)
    location = HERE.at(pos=1)
    PlacedGradient(location.grad, torch.zeros_like, where)(value)
    where.spans["decoder"] = Span(4, 1)
    value.sum().backward()
    assert value.grad is not None
    assert value.grad.flatten().tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("index", [9, [1, 9]])
def test_in_a_single_pass_a_position_that_is_not_there_is_an_error(index: Any):
    with pytest.raises(LocationError, match="holds positions 0 to 4"):
        seen(HERE.at(pos=index), place(0, 6, 1, alone=True))
    with pytest.raises(LocationError, match="row 1 holds pos 0 to 3"):
        seen(HERE.at(pos=4), place(0, 6, 0, 2, alone=True))


def test_a_slice_from_the_end_to_a_position_is_refused_where_rows_differ():
    with pytest.raises(LocationError, match="start at a position, not at the end"):
        seen(HERE.at(pos=slice(-2, 3)), place(0, 6, 0, 2))


def test_only_positions_and_steps_depend_on_the_pass():
    assert [is_placed(x) for x in (HERE, HERE.at(d_model=3), HERE.at(pos=3), HERE.at(step=1))] == [
        False,
        False,
        True,
        True,
    ]
