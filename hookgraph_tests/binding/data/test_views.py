from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hookgraph.binding.data.views import Columns, HeadsFirst, Scaled, Span, View, view_along
from hookgraph.binding.tracing.values import Value

VIEWS: dict[str, tuple[Columns | Span | HeadsFirst | Scaled, Tensor, list[object]]] = {
    "heads side by side": (
        Columns(0, 2, 2, 2),
        torch.arange(4.0).view(1, 1, 4),
        [[[[0, 1], [2, 3]]]],
    ),
    "a block of heads": (
        Columns(4, 2, 2, 2),
        torch.arange(12.0).view(1, 1, 12),
        [[[[4, 5], [6, 7]]]],
    ),
    "heads interleaved with others": (
        Columns(2, 2, 6, 2),
        torch.arange(12.0).view(1, 1, 12),
        [[[[2, 3], [8, 9]]]],
    ),
    "consecutive features": (Span(1, 2), torch.arange(4.0).view(1, 1, 4), [[[1, 2]]]),
    "heads before positions": (
        HeadsFirst(),
        torch.arange(4.0).view(1, 2, 2, 1),
        [[[[0], [2]], [[1], [3]]]],
    ),
    "a multiple": (Scaled(0.5), torch.arange(2.0).view(1, 1, 2), [[[0, 0.5]]]),
}


@pytest.mark.parametrize(("view", "raw", "expected"), VIEWS.values(), ids=VIEWS)
def test_a_view_gets_the_features_it_names(
    view: Columns | Span | HeadsFirst | Scaled, raw: Tensor, expected: list[object]
):
    assert view.get(raw).tolist() == expected


@pytest.mark.parametrize(("view", "raw", "expected"), VIEWS.values(), ids=VIEWS)
def test_what_is_put_is_got_and_nothing_else_changes(
    view: Columns | Span | HeadsFirst | Scaled, raw: Tensor, expected: list[object]
):
    before = raw.clone()
    changed = view.put(raw, view.get(raw) + 100)
    assert torch.equal(view.get(changed), view.get(before) + 100)
    assert torch.equal(view.put(changed, view.get(before)), before)
    assert torch.equal(raw, before), "putting changed the tensor itself"


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 4))
def test_columns_select_like_indexing_feature_by_feature(start: int, count: int, width: int, gap: int):
    view = Columns(start, count, width + gap, width)
    raw = torch.randn(2, 3, start + count * (width + gap) + 2)
    expected = torch.stack([raw[..., start + h * (width + gap) :][..., :width] for h in range(count)], dim=2)
    assert torch.equal(view.get(raw), expected)
    assert torch.equal(view.put(raw, expected), raw)


@pytest.mark.parametrize("name", [name for name in VIEWS if name != "a multiple"])
def test_getting_copies_nothing(name: str):
    view, raw, _ = VIEWS[name]
    assert view.get(raw).untyped_storage().data_ptr() == raw.untyped_storage().data_ptr()


# --- from what a model does to a view -----------------------------------------------------------

Step = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def followed(source: Tensor, *steps: tuple[Step, int]) -> tuple[Value, list[Value]]:
    """A trace of `steps` from `source`, each with the number of the output that is used."""
    start = Value(0, "addmm", (), source)
    path: list[Value] = []
    here = start
    for number, (step, output) in enumerate(steps, 1):
        result = step(here.tensor)
        tensor = result[output] if isinstance(result, tuple) else result
        here = Value(number, "view", (here,), tensor, replay=step, output=output)
        path.append(here)
    return start, path


def heads(tensor: Tensor) -> Tensor:
    return tensor.view(2, 3, -1, 2)


def swapped(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


FUSED = torch.randn(2, 3, 12)
LAYOUTS: dict[str, tuple[list[tuple[Step, int]], tuple[bool, View]]] = {
    "nothing": ([], (True, None)),
    "all heads": ([(heads, 0), (swapped, 0)], (True, Columns(0, 6, 2, 2))),
    "keys of a fused projection": (
        [(lambda t: t.split(4, -1), 1), (heads, 0), (swapped, 0)],
        (True, Columns(4, 2, 2, 2)),
    ),
    "values interleaved by head": (
        [(lambda t: t.view(2, 3, 2, 6), 0), (swapped, 0), (lambda t: t.chunk(3, -1), 2)],
        (True, Columns(4, 2, 6, 2)),
    ),
    "half of the features": ([(lambda t: t[..., 6:], 0)], (True, Span(6, 6))),
    "features in another order": ([(lambda t: t.flip(-1), 0)], (False, None)),
    "every second feature": ([(lambda t: t[..., ::2], 0)], (False, None)),
    "fewer positions": ([(lambda t: t[:, 1:], 0)], (False, None)),
}


@pytest.mark.parametrize(("steps", "expected"), LAYOUTS.values(), ids=LAYOUTS)
def test_views_are_found_by_following_the_numbers_of_the_features(
    steps: list[tuple[Step, int]], expected: tuple[bool, View]
):
    source, path = followed(FUSED, *steps)
    found = view_along(source, path, heads_first=bool(path) and path[-1].tensor.ndim == 4)
    assert found == expected
    if expected[1] is not None:
        value = path[-1].tensor
        value = value.transpose(1, 2) if value.ndim == 4 else value
        assert torch.equal(expected[1].get(FUSED), value)


def test_heads_that_a_module_returns_before_positions_are_found():
    source, path = followed(torch.randn(2, 4, 3, 5))
    assert view_along(source, path, heads_first=True) == (True, HeadsFirst())
    source, path = followed(torch.randn(2, 3, 4, 5), (swapped, 0))
    assert view_along(source, path, heads_first=True) == (True, None)


def test_an_operation_that_cannot_be_repeated_has_no_view():
    source = Value(0, "addmm", (), FUSED)
    assert view_along(source, [Value(1, "mul", (source,), FUSED)], heads_first=False) == (False, None)
