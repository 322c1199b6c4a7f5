"""An architecture with names of its own binds without a record; a record adds what cannot be discovered."""

from pathlib import Path

import pytest
import torch

import hookgraph as hg
from hookgraph.binding.proving import proving
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.transformer import ATTN_PATTERN, DECODER, EXTRA_OUT, MLP_OUT, RESID_POST
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM

ECHO_POST = hg.LocationType(
    "echo.post", (Dimension.BATCH, Dimension.POS, Dimension.D_MLP), stage=155, layered=True
)
ROW = "cloth.{layer}"
ECHO = {"location": "echo.post", "mechanism": "input", "module": f"{ROW}.echo.rinse", "slot": 0}
ORDINARY = {
    *("attn.ln_scale", "attn.in", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z"),
    *("attn.result", "attn.out", "resid.pre", "resid.mid", "resid.post"),
    *("mlp.ln_scale", "mlp.in", "mlp.pre", "mlp.post", "mlp.out"),
    *("embed", "final.ln_scale", "final.ln_out", "logits"),
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def loom(**changes: object) -> LoomForCausalLM:
    torch.manual_seed(0)
    model = LoomForCausalLM(LoomConfig(**changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def family(*anchors: dict[str, object]) -> hg.Family:
    return hg.Family("LoomForCausalLM", anchors)


def test_an_ordinary_architecture_with_names_of_its_own_needs_no_record():
    model = loom(echo=False)
    graph = hg.bind(model)
    assert {x.type.name for x in graph.locations} >= ORDINARY
    assert graph.report.ok
    row = model.cloth[1]
    kept: dict[str, torch.Tensor] = {}
    row.weft.register_forward_hook(lambda m, args, out: kept.update(attn=out))
    model(IDS)
    run = graph.run(IDS, save=[DECODER.ATTN_OUT[1], DECODER.ATTN_PATTERN[1]])
    assert torch.equal(run[DECODER.ATTN_OUT[1]], kept["attn"])
    assert torch.allclose(run[ATTN_PATTERN[1]].sum(-1), torch.ones(()))


def test_a_third_branch_is_discovered_too():
    graph = hg.bind(loom())
    assert {x.type.name for x in graph.locations} >= ORDINARY | {"extra.out"}
    assert graph.report.ok


@pytest.mark.parametrize("large", [False, True])
def test_a_record_adds_what_is_not_discovered(large: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proving, "is_small", lambda model: not large)
    model = loom()
    graph = hg.bind(model, family=family(ECHO))
    assert graph.every(ECHO_POST) == ECHO_POST[:3]
    assert graph.report.ok
    checked = {p.location for p in graph.report.proofs}
    assert {graph.report.peers.get(x, x) for x in ECHO_POST[:3]} <= checked
    kept: dict[str, torch.Tensor] = {}
    rinse = model.cloth[2].get_submodule("echo.rinse")
    rinse.register_forward_pre_hook(lambda m, args: kept.update(given=args[0]))
    model(IDS)
    assert torch.equal(graph.run(IDS, save=[ECHO_POST[2]])[ECHO_POST[2]], kept["given"])


def test_a_record_may_name_some_layers_only():
    graph = hg.bind(loom(), family=family({**ECHO, "layers": [0, 2]}))
    assert graph.every(ECHO_POST) == ECHO_POST[[0, 2]]


def test_a_record_that_says_what_is_discovered_changes_nothing():
    known = hg.bind(loom())
    said = {"location": "extra.out", "mechanism": "output", "module": f"{ROW}.echo"}
    graph = hg.bind(loom(), family=family(said))
    assert graph.locations == known.locations
    assert graph.report.ok


def test_updates_that_are_told_apart_by_a_record_are_conserved():
    """Two branches beside the MLP: which is which cannot be discovered; where they enter the stream can."""
    first = hg.LocationType("first.out", EXTRA_OUT.dims, stage=161, layered=True)
    second = hg.LocationType("second.out", EXTRA_OUT.dims, stage=162, layered=True)
    model = loom(fringe=True)
    plain = hg.bind(model)
    assert EXTRA_OUT not in {x.type for x in plain.locations}
    record = family(
        {"location": "first.out", "mechanism": "output", "module": f"{ROW}.echo"},
        {"location": "second.out", "mechanism": "output", "module": f"{ROW}.fringe"},
    )
    graph = hg.bind(model, family=record)
    equations = {p.note for p in graph.report.proofs if p.invariant == "conserved" and p.location == first[0]}
    assert "resid.post = resid.mid + mlp.out + first.out + second.out" in equations
    assert set(graph.every(second)) <= {p.location for p in graph.report.proofs if p.invariant == "conserved"}


@pytest.mark.parametrize(
    ("anchor", "message"),
    [
        (
            {"location": "mlp.out", "mechanism": "output", "module": f"{ROW}.echo"},
            r"family LoomForCausalLM: mlp.out\[0\] fails 'conserved' by [0-9.e-]+ \(tolerance 1e-05\): resid",
        ),
        (
            {"location": "mlp.post", "mechanism": "output", "module": f"{ROW}.dye.soak"},
            r"mlp.post\[0\] fails 'conserved' by",
        ),
        (
            {"location": "attn.z", "mechanism": "own code", "module": f"{ROW}.weft", "role": "out"},
            r"record of attn.z is malformed: the mechanism .own code. needs an operand, such as \{.kind",
        ),
        (
            {"location": "mlp.out", "mechanism": "output", "module": f"{ROW}.dye", "slot": 1},
            r"mlp.out\[0\] fails 'fires once' by 1 ",
        ),
        (
            {"location": "echo.post", "mechanism": "output", "module": f"{ROW}.echo", "view": {
                "is": "Columns", "start": 0, "count": 4, "stride": 8, "width": 8}},
            r"echo.post\[0\] fails 'shape' by 1 \(tolerance 0\): 4 axes, of sizes 1 7 4 8, for batch pos",
        ),
    ],
)  # fmt: skip
def test_a_wrong_record_is_refused(anchor: dict[str, object], message: str):
    with pytest.raises(hg.BindingError, match=message):
        hg.bind(loom(), family=family(anchor))


def test_a_record_that_is_wrong_of_a_large_model_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proving, "is_small", lambda model: False)
    wrong = {"location": "mlp.out", "mechanism": "output", "module": f"{ROW}.echo"}
    with pytest.raises(hg.BindingError, match=r"mlp.out\[0\] fails 'conserved' by"):
        hg.bind(loom(), family=family(wrong))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (hg.Family("TapestryModel", (ECHO,)), "record is for TapestryModel, but the model is a LoomFor"),
        (family({**ECHO, "module": "cloth.{layer}.ech"}), "'cloth.0.ech', but there is no such module"),
        (family({**ECHO, "location": "ecko.post"}), "unknown location type 'ecko.post': did you mean echo"),
        (family({**ECHO, "mechanism": "guess"}), "the family record of echo.post is malformed: expected"),
        (family({**ECHO, "modul": ""}), "Anchor has unknown modul; its fields: location, mechanism"),
    ],
)
def test_a_malformed_record_is_told(record: hg.Family, message: str):
    with pytest.raises(hg.BindingError, match=message):
        hg.bind(loom(), family=record)


def test_a_record_is_a_file(tmp_path: Path):
    record = family(ECHO)
    (tmp_path / "loom.json").write_text(record.to_json())
    assert hg.Family.read(tmp_path / "loom.json") == record
    (tmp_path / "odd.json").write_text('{"model": "X"}')
    with pytest.raises(hg.LoadError, match=r"odd\.json is no family record, .* anchors: 'anchors'"):
        hg.Family.read(tmp_path / "odd.json")


def test_a_record_is_for_subclasses_too():
    class Kelim(LoomForCausalLM):
        pass

    graph = hg.bind(Kelim(loom().config).eval(), family=family(ECHO))
    assert ECHO_POST[0] in graph.locations


def test_other_records_are_other_bindings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOOKGRAPH_CACHE", str(tmp_path))
    assert ECHO_POST[0] not in hg.bind(loom()).locations
    for _ in range(2):
        assert ECHO_POST[0] in hg.bind(loom(), family=family(ECHO)).locations
    assert len(list(tmp_path.iterdir())) == 2


def test_without_checks_a_record_is_believed():
    wrong = {"location": "mlp.out", "mechanism": "output", "module": f"{ROW}.echo"}
    graph = hg.bind(loom(), family=family(wrong), check=False)
    assert MLP_OUT[0] in graph.locations
    assert RESID_POST[0] in graph.locations
