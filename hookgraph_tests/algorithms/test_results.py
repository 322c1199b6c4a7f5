"""Every result is shown, tabled, drawn and kept."""

import inspect

import pytest

import hookgraph.algorithms as algorithms

_LENSES = ("TunedLens",)
RESULTS = [
    kind
    for name in algorithms.__all__
    if inspect.isclass(kind := getattr(algorithms, name)) and hasattr(kind, "save") and name not in _LENSES
]


@pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)
def test_what_can_be_saved_can_be_shown_tabled_and_drawn(kind: type):
    wanted = ("save", "load", "to_frame", "plot", "__repr__", "_repr_html_")
    assert [name for name in wanted if name not in vars(kind)] == []


def test_there_are_results():
    assert len(RESULTS) > 15
