"""Encoders in stages of different width are one stack."""

import pytest

from hookgraph.binding import bind
from hookgraph.binding.proving import conformance
from hookgraph.errors import BindingError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import FINAL_LN_OUT, RESID_POST, RESID_PRE
from hookgraph_tests.tiny import build


@pytest.fixture(scope="module")
def swin() -> HookGraph:
    """Two stages of one layer each; between them four positions become one of twice the width."""
    return bind(build("base", "swin"), cached=False)


def test_layers_are_counted_through_the_stages(swin: HookGraph):
    assert swin.binding.layers("decoder") == 2
    run = swin.run(swin.binding.example, save=[RESID_PRE[0], RESID_POST[0], RESID_PRE[1], FINAL_LN_OUT])
    assert run[RESID_PRE[0]].shape == run[RESID_POST[0]].shape == (2, 64, 16)
    assert run[RESID_PRE[1]].shape == (2, 16, 32)
    assert run[FINAL_LN_OUT].shape == (2, 16, 32)


def test_what_a_stage_returns_is_not_what_the_next_is_given(swin: HookGraph):
    assert [layer.stage for layer in swin.binding.findings.layers["decoder"]] == [0, 1]
    assert swin.binding.findings.layers["decoder"][0].after.lost == 0


def test_a_list_of_lists_is_one_stack():
    graph = bind(build("base", "segformer"), check=False)
    stages = [layer.stage for layer in graph.binding.findings.layers["decoder"]]
    assert stages == [0, 0, 1, 1, 2, 2, 3, 3]
    assert graph.binding.layers("vision") == graph.binding.layers("encoder") == 0


def test_what_is_read_of_the_output_tells_which_stack_needs_no_prefix():
    """The predictor runs last, but what is read is what the encoder returns."""
    graph = bind(build("base", "vjepa2"), check=False)
    assert graph.binding.findings.layers["decoder"][0].module.startswith("encoder.")


def test_a_model_that_edits_lead_elsewhere_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    """As where an edit of the lengths of sounds changes how many positions a later stack has."""

    def fail(*_: object) -> None:
        raise IndexError("index 3 is out of bounds")

    monkeypatch.setattr(conformance, "check", fail)
    refusal = "could not be proven: run with edits it fails with IndexError: index 3 is out"
    with pytest.raises(BindingError, match=refusal):
        bind(build("causal", "gpt2"), cached=False)
