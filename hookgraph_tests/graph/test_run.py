from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hookgraph.errors import HookGraphError, LoadError, LocationError, UnknownLocationError
from hookgraph.graph.run import Run
from hookgraph.ontology.transformer import ATTN_OUT, LOGITS, MLP_OUT, RESID_POST, RESID_PRE
from hookgraph_tests.toy import Coordinates, orthonormal, toy_graph, toy_of, toy_tokens

IDS = toy_tokens()
SUBGRAPH = Coordinates(MLP_OUT[1], "c", orthonormal(4, 2))
ASKED = [
    RESID_POST[2],
    RESID_POST[0].at(pos=-1, d_model=[0, 2]),
    SUBGRAPH.latents.at(latent=slice(1)),
    ATTN_OUT[1].grad,
]


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 0] - logits[:, -1, 1]


def example() -> Run:
    return toy_graph().inject(SUBGRAPH).run(IDS, save=ASKED, metric=metric)


def test_a_run_is_a_mapping_in_the_order_of_asking():
    run = example()
    assert list(run) == list(run.keys()) == ASKED
    assert len(run) == 4
    assert ASKED[3] in run
    assert RESID_PRE[0] not in run
    assert run.get(RESID_PRE[0]) is None
    assert all(value is run[location] for location, value in run.items())


def test_what_is_asked_for_twice_is_saved_once():
    run = toy_graph().run(IDS, save=[RESID_POST[1], RESID_POST[0], RESID_POST[1]])
    assert list(run) == [RESID_POST[1], RESID_POST[0]]


@pytest.mark.parametrize("location", [RESID_POST[1], RESID_POST[2].grad, RESID_POST[1].at(pos=0)], ids=str)
def test_what_was_not_saved_is_an_error_that_names_what_was(location: object):
    with pytest.raises(UnknownLocationError, match=r"was not saved in this run: did you mean resid"):
        example()[location]  # pyright: ignore[reportArgumentType]


PARTS: list[dict[str, Any]] = [{"pos": -1}, {"batch": 1, "d_model": slice(2)}, {"pos": [0, 2]}, {"step": 0}]


@pytest.mark.parametrize("index", PARTS, ids=str)
def test_a_part_of_what_was_saved_whole_is_what_would_have_been_saved(index: dict[str, Any]):
    whole, part = RESID_POST[1], RESID_POST[1].at(**index)
    graph = toy_graph()
    run = graph.run(IDS, save=[whole, whole.grad], metric=metric)
    expected = graph.run(IDS, save=[part, part.grad], metric=metric)
    for one in (run, run.detach()):
        assert torch.equal(one[part], expected[part])
        assert torch.equal(one[part.grad], expected[part.grad])
    assert part not in run, "only what was saved is in the mapping"


def test_a_part_that_a_whole_does_not_have_says_why():
    run = toy_graph().run(IDS, save=[RESID_POST[1]])
    with pytest.raises(
        LocationError, match=r"pos=7 is out of range, pos has size 3|this pass holds positions 0 to 2"
    ):
        run[RESID_POST[1].at(pos=7)]
    with pytest.raises(LocationError, match="a run is one pass, step 0, and holds nothing of this"):
        run[RESID_POST[1].at(step=2)]


def test_a_loaded_run_serves_parts_but_does_not_guess_positions(tmp_path: Path):
    run = toy_graph().run(IDS, save=[RESID_POST[1]])
    run.save(tmp_path / "run")
    loaded = Run.load(tmp_path / "run")
    part = RESID_POST[1].at(d_model=[1, 3])
    assert torch.equal(loaded[part], run[part])
    with pytest.raises(
        LocationError, match=r"does not know which positions are padding: index run\[resid.post"
    ):
        loaded[RESID_POST[1].at(pos=-1)]


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path):
    missing = tmp_path / "no" / "such"
    with pytest.raises(LoadError, match=f"cannot save a run to .*: there is no folder '{missing}', make it"):
        example().save(missing / "run.safetensors")
    with pytest.raises(LoadError, match="cannot save a run to"):
        example().save(tmp_path)


def test_a_location_that_is_not_declared_is_an_error_of_the_file(tmp_path: Path):
    path = tmp_path / "run"
    example().save(path)
    path.write_bytes(path.read_bytes().replace(b"attn.out[1]", b"attn.owt[1]"))
    with pytest.raises(LoadError, match=r"holds a location that is not declared here: .*'attn\.owt'"):
        Run.load(path)


def test_what_was_measured_is_there_or_an_error():
    run = toy_graph().run(toy_tokens(), metric=metric)
    assert run.measured is run.metric
    with pytest.raises(HookGraphError, match=r"not measured: give graph.run a metric"):
        toy_graph().run(toy_tokens()).measured  # noqa: B018 (raises)


def test_printing_a_run_lists_names_shapes_and_dtypes():
    lines = repr(example()).splitlines()
    assert lines[0] == "Run of 4 locations"
    assert lines[1:3] == [
        "  resid.post[2]: (2, 3, 4) float64",
        "  resid.post[0]@d_model=0,2;pos=-1: (2, 2) float64",
    ]


def test_the_logits_of_a_pass_that_stopped_are_completed_once_and_when_read():
    graph = toy_graph().hook(RESID_POST[2], torch.neg)
    executed = toy_of(graph).executed
    run = graph.run(IDS, save=[RESID_POST[0]])
    assert executed == [0]
    expected = graph.run(IDS).logits
    executed.clear()
    assert torch.equal(run.logits, expected)
    assert run.logits is run.logits
    assert executed == [0, 1, 2]


def test_saved_logits_are_the_logits():
    graph = toy_graph()
    run = graph.run(IDS, save=[LOGITS])
    toy_of(graph).executed.clear()
    assert run.logits is run[LOGITS]
    assert toy_of(graph).executed == []


def test_a_detached_run_lies_outside_the_autograd_graph():
    run = toy_graph().run(IDS, save=[RESID_POST[1]], metric=metric, grad=True)
    assert run[RESID_POST[1]].requires_grad
    detached = run.detach()
    assert detached.metric is not None
    assert not any(t.requires_grad for t in (detached[RESID_POST[1]], detached.metric, detached.logits))
    assert torch.equal(detached[RESID_POST[1]], run[RESID_POST[1]])
    assert torch.equal(detached.logits, run.logits)


@pytest.mark.parametrize("early", [True, False], ids=["stopped", "complete"])
def test_a_run_is_moved_to_a_dtype_logits_included(early: bool):
    graph = toy_graph()
    executed = toy_of(graph).executed
    moved = graph.run(IDS, save=[RESID_POST[1]], metric=None if early else metric).to(torch.float32)
    assert moved[RESID_POST[1]].dtype == torch.float32
    assert executed == ([0, 1] if early else [0, 1, 2]), "moving a run must not complete it"
    assert moved.logits.dtype == torch.float32
    torch.testing.assert_close(moved.logits, graph.run(IDS).logits.float())


def test_a_run_is_moved_to_a_device():
    assert example().to("meta")[ASKED[0]].device.type == "meta"


def test_a_saved_run_is_read_back_whole(tmp_path: Path):
    run, path = example(), tmp_path / "run.safetensors"
    run.save(path)
    loaded = Run.load(path)
    assert list(loaded) == ASKED
    assert all(torch.equal(loaded[location], run[location]) for location in ASKED)
    assert loaded.metric is not None
    assert run.metric is not None
    assert torch.equal(loaded.metric, run.metric)
    assert torch.equal(loaded.logits, run.logits)
    assert loaded.metadata == run.metadata


def test_a_run_with_views_and_shared_memory_is_saved(tmp_path: Path):
    graph, path = toy_graph(), tmp_path / "run"
    asked = [RESID_POST[0], RESID_PRE[1], RESID_PRE[1].at(pos=slice(0, 3, 2))]
    run = graph.run(IDS, save=asked, grad=True)
    run.save(str(path))
    assert all(torch.equal(Run.load(str(path))[location], run[location]) for location in asked)


def test_logits_saved_as_a_location_are_logits_after_loading(tmp_path: Path):
    run = toy_graph().run(IDS, save=[LOGITS])
    run.save(tmp_path / "run")
    assert torch.equal(Run.load(tmp_path / "run").logits, run[LOGITS])


def test_a_loaded_run_without_logits_says_how_to_keep_them(tmp_path: Path):
    toy_graph().run(IDS, save=[RESID_POST[0]]).save(tmp_path / "run")
    with pytest.raises(HookGraphError, match="holds no logits: ask for LOGITS in `save` before saving"):
        _ = Run.load(tmp_path / "run").logits


def nothing(path: Path) -> None: ...


def garbage(path: Path) -> None:
    path.write_bytes(b"not a safetensors file" * 10)


def truncated(path: Path) -> None:
    example().save(path)
    path.write_bytes(path.read_bytes()[:-8])


def others(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "expected a run saved by hookgraph, found: No such file"),
        (garbage, "expected a run saved by hookgraph, found: .*header"),
        (truncated, "expected a run saved by hookgraph, found: .*"),
        (others, "expected a run saved by hookgraph, found 'other tensors'"),
        (Path.mkdir, "expected a run saved by hookgraph, found: No such device"),
    ],
)
def test_a_file_that_is_no_saved_run_says_what_was_found(
    tmp_path: Path, make: Callable[[Path], None], message: str
):
    path = tmp_path / "run.safetensors"
    make(path)
    with pytest.raises(LoadError, match=f"{path}: {message}"):
        Run.load(path)
