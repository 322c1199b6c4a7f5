"""Every value that a binding is made of survives being written as JSON and read again."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookgraph.binding.cache import Entry
from hookgraph.binding.data.anchors import Anchor
from hookgraph.binding.data.findings import ExpertLayer, Findings, Layer, StreamStep, WeightSource
from hookgraph.binding.data.records import decode, encode
from hookgraph.binding.data.views import View
from hookgraph.errors import LoadError
from hookgraph.graph.conformance import ConformanceReport, Proof
from hookgraph.ontology.locations import Location, declared
from hookgraph.ontology.transformer import ATTN_Z, RESID_MID
from hookgraph_tests.families import FAMILIES, binding_of, bound

# beartype looks at a random element of each list, which hypothesis notices.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

LOCATIONS = st.sampled_from(
    [Location(kind, n if kind.layered else None) for kind in declared() for n in (0, 7)][::5]
)
FLOATS = st.floats(allow_nan=False)


st.register_type_strategy(Location, LOCATIONS)
st.register_type_strategy(float, FLOATS)


def survives(value: object, hint: Any) -> bool:
    return decode(json.loads(json.dumps(encode(value, hint))), hint) == value


@pytest.mark.parametrize("kind", [Anchor, Layer, StreamStep, WeightSource, Proof, View])
def test_every_value_comes_back_as_it_was(kind: Any):
    @given(st.from_type(kind))
    def comes_back(value: object) -> None:
        assert survives(value, kind)

    comes_back()


@given(
    st.dictionaries(LOCATIONS, st.from_type(Anchor), max_size=3),
    st.dictionaries(LOCATIONS, st.text(), max_size=3),
    st.dictionaries(st.text(), st.lists(st.from_type(Layer), max_size=2), max_size=2),
    st.dictionaries(
        st.tuples(st.text(), st.text(), st.none() | st.integers()), st.from_type(WeightSource), max_size=3
    ),
    st.dictionaries(st.tuples(st.text(), st.integers()), st.from_type(ExpertLayer), max_size=2),
    st.dictionaries(st.tuples(st.text(), st.integers()), st.text(), max_size=2),
    st.dictionaries(
        st.text(), st.lists(st.none() | st.integers() | st.text(), max_size=2).map(tuple), max_size=2
    ),
    st.integers(),
)
def test_findings_come_back_as_they_were(
    anchors: Any,
    reasons: Any,
    layers: Any,
    weights: Any,
    experts: Any,
    closed: Any,
    overtaken: Any,
    batch: int,
):
    found = Findings(anchors, reasons, layers, weights, experts, closed, overtaken, batch)
    assert survives(found, Findings)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_found_in_a_model_comes_back_as_it_was(family: str):
    binding = binding_of(bound(family))
    assert survives(binding.findings, Findings)


def test_reports_come_back_as_they_were():
    report = ConformanceReport(
        (Proof(ATTN_Z[1], "shape", False, 1e-9, 0.0, "odd"),),
        {ATTN_Z[1]: "output"},
        {RESID_MID[0]: "none"},
        {"class": "X"},
        {ATTN_Z[2]: ATTN_Z[1]},
    )
    again = decode(json.loads(json.dumps(encode(Entry(Findings(), report), Entry))), Entry).report
    assert again.to_json() == report.to_json()
    assert again.peers == report.peers


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "Anchor lacks location, mechanism, module"),
        ([], "expected Anchor, found"),
        ({"location": "resid.mid[0]", "mechanism": "sum", "module": "x", "slott": 1}, "has unknown slott"),
        ({"location": "resid.mid[0]", "mechanism": "guess", "module": "x"}, "expected .*Literal.*'guess'"),
        ({"location": "resid.mid[0]", "mechanism": "sum", "module": 3}, "expected str, found '3'"),
        ({"location": "resid.mid[0]", "mechanism": "sum", "module": "x", "slot": 1.5}, "expected .*int"),
        (
            {"location": "resid.mid[0]", "mechanism": "sum", "module": "x", "view": {"is": "Rows"}},
            "expected .*Columns",
        ),
        ({"location": 7, "mechanism": "sum", "module": "x"}, "expected Location, found '7'"),
    ],
)
def test_what_is_not_such_a_value_is_told(data: Any, message: str):
    with pytest.raises(LoadError, match=message):
        decode(data, Anchor)
