"""The names that users import: few, in order, importable, documented."""

import re
import types
from pathlib import Path

import pytest

import hookgraph as hg
from hookgraph import algorithms

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
PAGES = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
DOCUMENTED = set(re.findall(r"^::: (\S+)", PAGES, re.MULTILINE))
MOST = 30


def test_the_names_are_in_order_and_stand_once():
    assert hg.__all__ == sorted(set(hg.__all__))


def test_the_names_are_few():
    assert len(hg.__all__) <= MOST


@pytest.mark.parametrize("name", hg.__all__)
def test_every_name_is_in_the_reference(name: str):
    found = getattr(hg, name)
    if isinstance(found, types.ModuleType):
        assert found.__name__ in DOCUMENTED or f"`{found.__name__}`" in PAGES
    else:
        assert found.__module__ in DOCUMENTED


@pytest.mark.parametrize("name", algorithms.__all__)
def test_every_algorithm_is_reached_from_the_top(name: str):
    assert getattr(hg, name) is getattr(algorithms, name)


def test_a_star_import_gives_these_names_and_no_others():
    given: dict[str, object] = {}
    exec("from hookgraph import *", given)
    assert set(given) - {"__builtins__"} == set(hg.__all__)
