"""What must hold of every location of every family, and that the check of it can fail."""

import copy
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookgraph.binding import HuggingFaceBinding, bind, check
from hookgraph.binding.data.views import Columns, Scaled
from hookgraph.binding.proving import conformance, proving
from hookgraph.binding.running import huggingface
from hookgraph.errors import UnknownLocationError
from hookgraph.graph.conformance import INVARIANTS, ConformanceReport, Proof
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import (
    ATTN_IN,
    ATTN_K,
    ATTN_LN_SCALE,
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Q,
    ATTN_RESULT,
    ATTN_SCORES,
    ATTN_V,
    ATTN_Z,
    FINAL_LN_OUT,
    FINAL_LN_SCALE,
    LOGITS,
    MLP_OUT,
    MLP_POST,
    MLP_PRE,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
)
from hookgraph_tests.families import (
    FAMILIES,
    Size,
    binding_of,
    bound,
    build,
    layers_of,
    model_of,
    tokens,
)

IDS = tokens(2, 5)
EXAMPLE = {"input_ids": tokens(1, 5), "use_cache": False}
UPCASTS = ("attn.scores", "attn.pattern")
"""What models compute in single precision even where everything else is in double precision."""


UNCHECKED = {"gemma2": {"fused": "transformers knows no fused attention for it"}}
"""What is proven of no location of a family, and why."""


def graph_of(family: str) -> HookGraph:
    return bound(family, torch.float64)


# --- what holds -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_invariant_of_every_location_is_proven_at_bind(family: str):
    graph = graph_of(family)
    report = graph.report
    assert report.ok, report
    proven = {name: {p.location for p in report.proofs if p.invariant == name} for name in INVARIANTS}
    missing = {g.invariant for g in report.gaps}
    everywhere = set(INVARIANTS) - {"replayed", "narrowed", "shared"}
    for name in everywhere - missing:
        assert proven[name] == set(graph.locations), name
    assert missing == {"conserved", *UNCHECKED.get(family, {})}
    for location, name in product(graph.locations, everywhere):
        assert (location in proven[name]) != bool(report.why_unchecked(location, name))
    for name, reason in UNCHECKED.get(family, {}).items():
        assert {report.why_unchecked(x, name) for x in graph.locations} == {reason}
    # No equation stands for these, but for what the model computes from them.
    free = {"embed", "logits"}
    free |= {f"attn.{x}_pre" for x in "qk"} if family == "gpt2" else set()
    assert {x.type.name for x in set(graph.locations) - proven["conserved"]} <= free


@pytest.mark.parametrize("family", FAMILIES)
def test_the_errors_of_the_proofs_are_roundings(family: str):
    exact = FAMILIES[family].double_throughout
    for proof in graph_of(family).report.proofs:
        rounded = not exact or proof.location.type.name in UPCASTS
        limit = {"transparent": 1e-5 if proof.location.type.name in UPCASTS else 0.0}.get(proof.invariant)
        if proof.invariant == "edit = gradient":
            limit = 2e-3 if rounded else 1e-7
            assert proof.tolerance == (1e-5 if limit == 1e-7 or family == "gpt2" else 2e-3)
            assert bool(proof.note) == (proof.tolerance == 2e-3)
        elif proof.invariant in ("conserved", "cached", "padded", "fused", "shared"):
            limit = 1e-6
        elif proof.invariant == "narrowed":
            limit = 1e-12  # a product with fewer rows is summed in another order
        assert proof.error <= (limit or 0.0), proof


@pytest.mark.parametrize("family", FAMILIES)
def test_every_location_fires_once_in_a_pass(family: str):
    graph, fired = bound(family), dict[Location, int]()

    def count(location: Location) -> Callable[[Tensor], None]:
        def called(x: Tensor) -> None:
            fired[location] = fired.get(location, 0) + 1

        return called

    for location in graph.locations:
        graph = graph.hook(location, count(location))
    graph.run(IDS)
    assert fired == dict.fromkeys(graph.locations, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_named_by_the_axes(family: str):
    graph = bound(family)
    heads = 2 if family in ("llama", "gemma2") else 4
    sizes = {"batch": 2, "pos": 5, "key_pos": 5, "head": 4, "kv_head": heads, "d_head": 8, "one": 1}
    sizes |= {"d_model": 32, "d_mlp": 40, "vocab": 48}
    for location, value in graph.run(IDS, save=graph.locations).items():
        assert value.shape == tuple(sizes[dim] for dim in location.dims), location


def slope_and_change(
    graph: HookGraph, location: Location, gradient: Tensor, value: Tensor, step: float
) -> tuple[float, float]:
    """(gradient along a direction, central difference along it, extrapolated from two steps).

    The direction is half gradient, half random.
    """
    generator = torch.Generator().manual_seed(len(str(location)))
    live = value > torch.finfo(torch.float32).min / 2
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64) * live
    direction = gradient.double() / gradient.double().norm() + noise / noise.norm()

    def measured(size: float) -> float:
        run = graph.hook(location, lambda x: x + (size * direction).to(x.dtype)).run(IDS, metric=metric)
        assert run.metric is not None
        return float(run.metric.sum())

    size = step * float((value * live).norm())
    near, far = ((measured(h) - measured(-h)) / (2 * h) for h in (size, 2 * size))
    return float((gradient.double() * direction).sum()), (4 * near - far) / 3


def metric(logits: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).sin().view(logits[0].shape)
    return (logits * weights).flatten(1).sum(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_has_the_effect_that_the_gradient_says(family: str):
    graph = graph_of(family)
    locations = [x for x in graph.locations if x.layer in (1, None)]
    assert (RESID_MID[1] in locations) == (family != "neox")
    run = graph.run(IDS, save=[*locations, *(x.grad for x in locations)], metric=metric)
    for location in locations:
        exact = FAMILIES[family].double_throughout and location.type.name not in UPCASTS
        # Small steps are lost in the roundings of single precision, large ones in the curvature.
        steps, tolerance = ((1e-5,), 1e-5) if exact else ((2e-3, 2e-2), 2e-3)
        found = [slope_and_change(graph, location, run[location.grad], run[location], s) for s in steps]
        errors = [abs(change - slope) / abs(slope) for slope, change in found]
        assert min(errors) <= tolerance, (location, found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_value_is_the_one_that_the_model_goes_on_with(family: str):
    graph = graph_of(family)
    locations = [x for x in graph.locations if x.layer in (1, None)]
    expected = graph.run(IDS, save=[x.grad for x in locations], metric=metric)
    kept = graph.run(IDS, save=locations, metric=metric, grad=True)
    assert kept.metric is not None
    gradients = torch.autograd.grad(kept.metric.sum(), [kept[x] for x in locations])
    for location, gradient in zip(locations, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[location.grad], rtol=1e-5, atol=1e-6)


def zero(x: Tensor) -> Tensor:
    x[:] = 0
    return x


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_in_place_is_an_edit(family: str):
    graph = bound(family)
    for location in [x for x in graph.locations if x.layer in (1, None)]:
        parts = {"pos": {"pos": [0, 2]}, "whole": {}, "last": {"batch": 1}}
        for index in parts.values():
            place = location.at(**index)
            expected = graph.hook(place, torch.zeros_like).run(IDS).logits
            assert torch.equal(graph.hook(place, zero).run(IDS).logits, expected), place


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_work_in_inference_mode(family: str):
    graph = bound(family)
    for location in [x for x in graph.locations if x.layer in (1, None)]:
        graph = graph.hook(location.at(pos=[0, 1]), lambda x: 0.9 * x).hook(location, lambda x: None)
    expected = graph.run(IDS).logits
    with torch.inference_mode():
        assert torch.equal(graph.run(IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_hook_keeps_is_not_changed_by_later_edits(family: str):
    graph = bound(family)
    clean = graph.run(IDS, save=graph.locations)
    for location in [x for x in graph.locations if x.layer == 1]:
        kept: list[Tensor] = []
        reading = graph.hook(location, kept.append).hook(location, torch.zeros_like)
        reading.run(IDS)
        torch.testing.assert_close(kept[0], clean[location], rtol=1e-5, atol=1e-6, msg=str(location))


# --- the check can fail -------------------------------------------------------------------------


def broken(family: str, location: Location, **change: Any) -> ConformanceReport:
    """What the check says of a binding in which one anchor is wrong, of it and the locations around it."""
    binding = binding_of(graph_of(family))
    anchors = binding.findings.anchors
    wrong = {**anchors, location: replace(anchors[location], **change)}
    candidate = HuggingFaceBinding(binding.model, replace(binding.findings, anchors=wrong))
    around = [x for x in middle(candidate) if group_of(x) == group_of(location)]
    return conformance.check(candidate, EXAMPLE, around)


def middle(binding: HuggingFaceBinding) -> list[Location]:
    """The locations of one layer, and those without layers: enough to see what goes wrong there."""
    return [x for x in binding.locations if x.layer in (1, None)]


def group_of(location: Location) -> str:
    """What a location's equations are about: the stream, the inside of attention or of the MLP, the ends."""
    part, _, name = location.type.name.partition(".")
    return "stream" if part == "resid" or name == "out" else part


def failed(report: ConformanceReport) -> set[tuple[Location, str]]:
    return {(p.location, p.invariant) for p in report.failures}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_anchors_as_found_pass_the_same_check(family: str):
    for location in (RESID_PRE[1], ATTN_V[1], MLP_POST[1], FINAL_LN_OUT):
        report = broken(family, location)
        assert report.ok, report
        assert location in {p.location for p in report.proofs}


CONSERVED: dict[str, tuple[str, Location, dict[str, Any]]] = {
    "the sum bound as the norm's input": ("llama", RESID_MID[1], {"mechanism": "input"}),
    "the sum bound as the norm's input, GPT-2": ("gpt2", RESID_MID[1], {"mechanism": "input"}),
    "the sum bound as the norm's input, Gemma-2": ("gemma2", RESID_MID[1], {"mechanism": "input"}),
    "another layer": ("llama", RESID_PRE[1], {"module": "model.layers.2"}),
    "a wrong coefficient": ("gpt2", ATTN_OUT[1], {"view": Scaled(2.0)}),
    "a wrong sign": ("neox", MLP_OUT[1], {"view": Scaled(-1.0)}),
    "before the post-norm": ("gemma2", ATTN_OUT[1], {"module": "model.layers.1.self_attn", "slot": 0}),
    "columns of the keys": ("gpt2", ATTN_Q[1], {"view": Columns(32, 4, 8, 8)}),
    "columns of the values": ("gpt2", ATTN_K[1], {"view": Columns(64, 4, 8, 8)}),
    "columns of the queries": ("gpt2", ATTN_V[1], {"view": Columns(0, 4, 8, 8)}),
    "heads not interleaved": ("neox", ATTN_V[1], {"view": Columns(64, 4, 8, 8)}),
    "values for keys": ("llama", ATTN_K[1], {"role": "value"}),
    "neurons scaled": ("llama", MLP_POST[1], {"view": Scaled(2.0)}),
    "input of the nonlinearity scaled": ("neox", MLP_PRE[1], {"view": Scaled(2.0)}),
    "the final norm scaled": ("gemma2", FINAL_LN_OUT, {"view": Scaled(0.5)}),
    "a wrong epsilon": ("gpt2", ATTN_LN_SCALE[1], {"epsilon": 1e-3}),
    "a wrong epsilon, Llama": ("llama", ATTN_LN_SCALE[1], {"epsilon": 1e-3}),
    "a wrong epsilon of the last norm": ("neox", FINAL_LN_SCALE, {"epsilon": 1e-3}),
    "a norm that does not centre": ("neox", ATTN_LN_SCALE[1], {"centred": False}),
    "a norm that centres": ("gemma2", ATTN_LN_SCALE[1], {"centred": True}),
}


@pytest.mark.parametrize(("family", "location", "change"), CONSERVED.values(), ids=CONSERVED)
def test_a_wrong_anchor_is_not_conserved(family: str, location: Location, change: dict[str, Any]):
    assert (location, "conserved") in failed(broken(family, location, **change))


SHAPES: dict[str, tuple[str, Location, dict[str, Any]]] = {
    "half as many heads": ("llama", ATTN_Z[1], {"view": Columns(0, 2, 16, 16)}),
    "heads of the results": ("gpt2", ATTN_RESULT[1], {"view": Columns(0, 2, 16, 16)}),
    "no heads": ("neox", ATTN_V[1], {"view": None}),
    "neurons for the stream": ("llama", MLP_OUT[1], {"module": "model.layers.1.mlp.up_proj"}),
}


@pytest.mark.parametrize(("family", "location", "change"), SHAPES.values(), ids=SHAPES)
def test_a_wrong_shape_is_found(family: str, location: Location, change: dict[str, Any]):
    assert (location, "shape") in failed(broken(family, location, **change))


FIRING: dict[str, tuple[str, Location, dict[str, Any]]] = {
    "a module that returns no tensor": ("gpt2", MLP_OUT[1], {"module": "transformer", "slot": None}),
    "a slot that is not there": ("llama", ATTN_IN[1], {"slot": "nothing"}),
    "a module that is not called": ("neox", MLP_OUT[1], {"module": "gpt_neox.layers"}),
    "a module called in every layer": ("gemma2", MLP_OUT[1], {"module": "model.rotary_emb"}),
}


@pytest.mark.parametrize(("family", "location", "change"), FIRING.values(), ids=FIRING)
def test_a_location_that_does_not_fire_once_is_found(family: str, location: Location, change: dict[str, Any]):
    report = broken(family, location, **change)
    assert (location, "fires once") in failed(report)
    (note,) = (p.note for p in report.failures if (p.location, p.invariant) == (location, "fires once"))
    assert note


def changed_copy(family: str, change: Callable[[nn.Module], None]) -> HookGraph:
    """A graph of a copy of a family's model whose layer 1 was changed after binding."""
    binding = binding_of(graph_of(family))
    model = copy.deepcopy(binding.model)
    change(layers_of(family, model)[1])
    return HookGraph(HuggingFaceBinding(model, binding.findings, example=binding.example))


def straight_through(layer: nn.Module) -> None:
    """The layer's MLP adds something to its output that autograd does not see."""
    layer.get_submodule("mlp").register_forward_hook(lambda m, args, out: out + unseen(args[0]))


@torch.no_grad()
def unseen(x: Tensor) -> Tensor:
    return x.tanh()


def test_an_effect_that_the_gradient_does_not_see_is_found():
    graph = changed_copy("gpt2", straight_through)
    report = conformance.check(binding_of(graph), EXAMPLE, middle(binding_of(graph)))
    found = failed(report)
    assert {(x, "edit = gradient") for x in (RESID_PRE[1], ATTN_OUT[1], RESID_MID[1])} <= found
    assert (RESID_POST[1], "edit = gradient") not in found
    (note,) = (p.note for p in report.failures if p.location == RESID_MID[1] and p.note.startswith("finite"))
    assert "gradient" in note


def test_an_edit_without_effect_is_found():
    report = broken("gemma2", ATTN_PATTERN[1], mechanism="output", module="model.layers.1.self_attn", slot=1)
    assert (ATTN_PATTERN[1], "edit = gradient") in failed(report)
    (note,) = (p.note for p in report.failures if p.invariant == "edit = gradient")
    assert note.startswith("finite difference 0, gradient ")


def test_a_hook_that_changes_the_model_by_being_there_is_found(monkeypatch: pytest.MonkeyPatch):
    """The eager function that scores and pattern are taken from differs from the fused kernel."""
    module = "transformers.models.llama.modeling_llama.eager_attention_forward"
    path, _, name = module.rpartition(".")
    eager = getattr(__import__(path, fromlist=[name]), name)

    def slightly_off(*args: Any, **kwargs: Any) -> Any:
        return eager(*args, **{**kwargs, "scaling": 1.01 * kwargs["scaling"]})

    monkeypatch.setattr(module, slightly_off)
    binding = binding_of(graph_of("llama"))
    found = failed(conformance.check(binding, EXAMPLE, middle(binding)))
    inside = {(ATTN_SCORES[1], "transparent"), (ATTN_PATTERN[1], "transparent")}
    assert {x for x in found if x[1] == "transparent"} == inside


def test_something_left_behind_is_found(monkeypatch: pytest.MonkeyPatch):
    graph = changed_copy("gpt2", lambda layer: None)
    model, proper = model_of(graph), huggingface.installed

    @contextmanager
    def careless(*installers: Any) -> Any:
        with proper(*installers):
            if installers:
                model.register_forward_hook(lambda *_: None)
            yield

    monkeypatch.setattr(huggingface, "installed", careless)
    binding = binding_of(graph)
    found = failed(conformance.check(binding, EXAMPLE, middle(binding)))
    assert found == {(x, "removed") for x in middle(binding)}


# --- what becomes of it -------------------------------------------------------------------------


def test_what_fails_is_absent_with_the_reason():
    binding = binding_of(graph_of("llama"))
    report = broken("llama", RESID_MID[1], mechanism="input")
    outcome = proving.conclude(binding, report.proofs)
    graph = HookGraph(binding.proven(outcome.findings, outcome.report))
    assert RESID_MID[1] not in graph.locations
    assert RESID_MID[2] in graph.locations
    with pytest.raises(
        UnknownLocationError, match=r"no location resid.mid\[1\]: conserved fails: resid.post ="
    ):
        graph.run(IDS, save=[RESID_MID[1]])
    assert RESID_MID[1] in graph.report.absent
    assert RESID_MID[1] not in graph.report.mechanisms


def test_of_what_fails_without_a_note_it_is_said_by_how_much():
    binding = binding_of(graph_of("llama"))
    outcome = proving.conclude(binding, [Proof(RESID_MID[1], "transparent", False, 0.125, 1e-5)])
    reason = "transparent fails: it is off by 0.12, of at most 1e-05"
    assert outcome.findings.reasons[RESID_MID[1]] == reason


def test_a_bound_model_can_be_checked_again_as_it_is():
    model = build("neox", torch.float64, Size(layers=1))
    graph = bind(model, check=False)
    assert graph.report.proofs == ()
    report = check(graph)
    assert report.ok
    assert {p.location for p in report.proofs} == set(graph.locations)
    assert {m.training for m in model.modules()} == {False}


def test_a_report_is_shown_as_text_table_and_json():
    report = graph_of("neox").report
    lines = repr(report).splitlines()
    assert lines[0].startswith("GPTNeoXForCausalLM: 70 locations, ")
    assert lines[0].endswith(" invariants checked, all hold")
    assert any(line.startswith("  absent resid.mid[0]: ") for line in lines)
    frame = report.to_frame()
    assert list(frame.columns) == ["mechanism", *INVARIANTS]
    assert frame.loc["attn.v[1]", "mechanism"] == report.mechanisms[ATTN_V[1]]
    assert frame.loc["logits", "edit = gradient"] <= 1e-5
    content = json.loads(report.to_json())
    assert content["ok"] is True
    assert content["locations"]["logits"] == report.mechanisms[LOGITS]
    assert len(content["proofs"]) == len(report.proofs)


def test_a_report_of_failures_lists_each():
    report = broken("gpt2", RESID_MID[1], mechanism="input")
    assert not report.ok
    lines = repr(report).splitlines()
    assert " fail" in lines[0]
    assert any(line.startswith("  resid.mid[1]: conserved off by ") for line in lines)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_checked_in_it(family: str, dtype: torch.dtype):
    report = check(bind(build(family, dtype)))
    assert report.ok, report
    assert {p.tolerance for p in report.proofs if p.invariant == "conserved"} == {10 * torch.finfo(dtype).eps}


def test_in_half_precision_a_wrong_location_is_still_wrong():
    graph = bind(build("gpt2", torch.bfloat16))
    assert isinstance(graph.binding, HuggingFaceBinding)
    anchors = graph.binding.findings.anchors
    anchors[RESID_MID[1]] = replace(anchors[RESID_POST[1]], location=RESID_MID[1])
    wrong = {p.location for p in check(graph).proofs if not p.holds}
    assert RESID_MID[1] in wrong
