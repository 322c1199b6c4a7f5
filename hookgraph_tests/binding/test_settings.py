"""Models as people run them: offloaded, in half precision, checkpointed, compiled, wrapped, side by side."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hookgraph.binding import bind
from hookgraph.errors import BindingError, InputError, MetricError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.hooks.handles import installed
from hookgraph.ontology.transformer import (
    ATTN_K,
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Q_IN,
    ATTN_RESULT,
    ATTN_Z,
    MLP_OUT,
    MLP_POST,
    MLP_PRE,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
)
from hookgraph.ontology.weights import W_O, b_O
from hookgraph_tests.families import FAMILIES, bound, build, model_of, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
"""Its new name is not in every version that is supported, and PEFT asks for the old one."""

IDS = tokens(2, 6)
ASKED = [
    RESID_POST[1],
    ATTN_Z[0],
    MLP_PRE[2],
    ATTN_PATTERN[1],
    RESID_POST[1].grad,
    ATTN_K[1].grad,
    MLP_POST[0].grad,
]


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5].float()


def edited(graph: HookGraph) -> HookGraph:
    return (
        graph.hook(RESID_POST[0], lambda x: 1.5 * x)
        .hook(ATTN_PATTERN[1], lambda x: 0.5 * x)
        .hook(ATTN_K[1].at(pos=2), lambda x: x + 1)
        .hook(MLP_PRE[0].grad, lambda g: 3 * g)
    )


def assert_same(found: Run, expected: Run, tolerance: float = 1e-5):
    for location, value in expected.items():
        torch.testing.assert_close(
            found[location], value, rtol=tolerance, atol=tolerance, msg=lambda m, x=location: f"{x}: {m}"
        )


# --- weights that lie elsewhere ---------------------------------------------------------------


def dispatched(folder: Path) -> nn.Module:
    build("llama").save_pretrained(folder)
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map={**places, **layers}, offload_folder=folder / "offload"
    )


def on_cpu(folder: Path) -> nn.Module:
    return accelerate.cpu_offload(build("llama"), execution_device=torch.device("cpu"))


def on_disk(folder: Path) -> nn.Module:
    return accelerate.disk_offload(build("llama"), folder, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [dispatched, on_cpu, on_disk])
def test_a_model_whose_weights_lie_elsewhere_is_the_same(
    offload: Callable[[Path], nn.Module], tmp_path: Path
):
    graph: Any = bind(offload(tmp_path))  # pyright: ignore[reportArgumentType]
    whole = bind(build("llama"))
    assert graph.report.ok
    assert graph.locations == whole.locations
    assert_same(graph.run(IDS, save=ASKED, metric=metric), whole.run(IDS, save=ASKED, metric=metric))
    assert_same(
        edited(graph).run(IDS, save=ASKED, metric=metric), edited(whole).run(IDS, save=ASKED, metric=metric)
    )
    steered = [
        g.hook(RESID_POST[1].at(pos=7), torch.zeros_like)
        .generate(IDS, max_new_tokens=4, do_sample=False)
        .tokens
        for g in (graph, whole)
    ]
    assert torch.equal(*steered)


# --- half precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_in_half_precision_a_model_has_the_same_locations(family: str):
    graph = bind(build(family, torch.bfloat16))
    single = bound(family)
    assert graph.report.ok
    assert graph.locations == single.locations
    run = graph.run(IDS, save=ASKED, metric=metric)
    # Many models compute their softmax in single precision.
    assert {v.dtype for k, v in run.items() if k != ATTN_PATTERN[1]} == {torch.bfloat16}
    for location, value in single.run(IDS, save=ASKED, metric=metric).items():
        assert (run[location].float() - value).norm() < 0.1 * value.norm(), location


# --- gradient checkpointing -------------------------------------------------------------------


def training(family: str, *, reentrant: bool | None) -> HookGraph:
    """A model in training mode, without dropout; checkpointed unless `reentrant` is None."""
    model = build(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return bind(model.train(), check=False)


@pytest.mark.parametrize("family", ["llama", "neox", "gemma2"])
def test_layers_that_are_run_again_are_run_with_their_hooks(family: str):
    plain, graph = training(family, reentrant=None), training(family, reentrant=False)
    for change in (lambda g: g, edited):
        found, expected = (change(g).run(IDS, save=ASKED, metric=metric) for g in (graph, plain))
        assert_same(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "neox", "gemma2"])
def test_training_under_hooks_gives_the_gradients_of_the_edited_model(family: str, reentrant: bool):
    gradients = list[Tensor]()
    for graph in (training(family, reentrant=None), training(family, reentrant=reentrant)):
        model = model_of(graph)
        with edited(graph).attached():
            metric(model(input_ids=IDS, use_cache=False).logits).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_gradients_that_checkpointing_cannot_give_are_refused():
    with pytest.raises(MetricError, match="was computed without gradients, as in reentrant checkpointing"):
        training("llama", reentrant=True).run(IDS, save=[RESID_MID[1].grad], metric=metric)
    with pytest.raises(InputError, match="a backward pass runs the model again"):
        training("llama", reentrant=False).run(IDS, grad=True)


# --- other readers ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_that_the_model_returns_show_edits(family: str):
    for location in (RESID_POST[0], MLP_OUT[0]):
        graph = bound(family).hook(location, lambda x: 2 * x)
        with torch.no_grad(), graph.attached():
            states = model_of(graph)(input_ids=IDS, output_hidden_states=True).hidden_states
        run = graph.run(IDS, save=[RESID_PRE[1], RESID_POST[1]])
        for state, value in zip(states[1:3], run.values(), strict=True):
            assert torch.equal(state, value)


def test_a_model_in_another_thread_is_bit_for_bit_itself():
    graph, other = edited(bind(build("llama"), check=False)), build("llama")
    expected, ours = other(input_ids=IDS).logits, graph.run(IDS).logits
    wrong, done = list[str](), threading.Event()

    def run_other() -> None:
        while not done.is_set():
            if not torch.equal(other(input_ids=IDS).logits, expected):
                wrong.append("other")

    thread = threading.Thread(target=run_other)
    thread.start()
    with torch.no_grad(), graph.attached():
        for _ in range(10):
            if not torch.equal(model_of(graph)(input_ids=IDS, use_cache=False).logits, ours):
                wrong.append("ours")
    done.set()
    thread.join()
    assert not wrong


# --- compiled -------------------------------------------------------------------------------------


class Compiler:
    """A backend that runs what it is given, and counts how often it was called for that."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, module: nn.Module, example: object) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return module(*args)

        return run


@pytest.mark.parametrize("part", ["the model", "a layer"])
def test_a_model_compiled_in_place_runs_as_written_under_hooks_and_compiled_without(part: str):
    compiler, model = Compiler(), build("llama")
    module = model if part == "the model" else model.get_submodule("model.layers.1")
    module.compile(backend=compiler)
    with torch.no_grad():
        expected = model(IDS).logits
    runs = compiler.runs
    assert runs > 0
    graph, plain = bind(model, check=False), bound("llama")
    found = edited(graph).run(IDS, save=ASKED, metric=metric)
    assert_same(found, edited(plain).run(IDS, save=ASKED, metric=metric))
    with edited(graph).attached(), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, found.logits)
    assert compiler.runs == runs
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    assert compiler.runs == 2 * runs


@pytest.mark.parametrize("before", [True, False], ids=["compiled before", "compiled within"])
def test_what_torch_compile_returned_runs_as_written_while_a_graph_is_attached(before: bool):
    compiler, model = Compiler(), build("llama")
    compiled = torch.compile(model, backend=compiler)
    graph = edited(bind(model, check=False))
    with torch.no_grad():
        plain, found = model(IDS).logits, graph.run(IDS).logits
        if before:
            assert torch.equal(compiled(IDS).logits, plain)
        runs = compiler.runs
        with graph.attached():
            torch.testing.assert_close(compiled(IDS).logits, found)
        assert compiler.runs == runs
        assert torch.equal(compiled(IDS).logits, plain)
    assert compiler.runs > runs
    assert not torch.allclose(found, plain)


def test_what_torch_compile_returns_is_refused_with_the_remedy():
    model = build("llama")
    with pytest.raises(BindingError, match=r"OptimizedModule .* bind the model that it was given"):
        bind(torch.compile(model, backend="eager"))  # pyright: ignore[reportArgumentType] (a module all the same)


# --- adapters ---------------------------------------------------------------------------------


def test_a_model_with_adapters_is_bound_wrapped_or_not():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain = bind(build("llama"))
    wrapped = peft.get_peft_model(copy.deepcopy(model_of(plain)), config)
    expected = wrapped(input_ids=IDS).logits
    for model in (wrapped, wrapped.get_base_model()):
        graph: Any = bind(model)  # pyright: ignore[reportArgumentType]
        assert graph.report.ok
        assert torch.equal(graph.run(IDS).logits, expected)
        assert {ATTN_Z[1], RESID_MID[1], MLP_POST[2], ATTN_K[0]} <= set(graph.locations)
        with graph.hook(RESID_POST[1], torch.zeros_like).attached():
            steered = wrapped(input_ids=IDS).logits
        assert torch.equal(steered, graph.hook(RESID_POST[1], torch.zeros_like).run(IDS).logits)
    assert not torch.equal(expected, plain.run(IDS).logits)


def test_edits_reach_a_projection_and_the_adapter_beside_it():
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    plain = bind(build("llama"))
    model: Any = peft.get_peft_model(copy.deepcopy(model_of(plain)), config).get_base_model().double()
    graph = bind(model)
    assert {x for x in plain.locations if x not in graph.locations} == set()
    layer = model.model.layers[1]
    projections = {ATTN_Z[1]: layer.self_attn.o_proj, MLP_POST[1]: layer.mlp.down_proj}
    projections[ATTN_Q_IN[1]] = layer.self_attn.q_proj
    for place, module in projections.items():
        with installed(
            lambda module=module: module.register_forward_pre_hook(lambda m, args: (0.5 * args[0],))
        ):
            expected = model(input_ids=IDS, use_cache=False).logits
        found = graph.hook(place, lambda x: 0.5 * x).run(IDS).logits
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    merged = model.model.layers[1].self_attn.o_proj
    delta = merged.get_delta_weight("default") + merged.base_layer.weight
    weight = graph.weight(W_O, layer=1)
    torch.testing.assert_close(weight.flatten(0, 1).mT, delta, rtol=1e-9, atol=1e-9)
    run = graph.run(IDS, save=[ATTN_RESULT[1], ATTN_OUT[1]])
    together = run[ATTN_RESULT[1]].sum(2) + graph.weight(b_O, layer=1)
    torch.testing.assert_close(together, run[ATTN_OUT[1]], rtol=1e-9, atol=1e-9)


def test_learnt_prompts_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped: Any = peft.get_peft_model(build("llama"), config)
    with pytest.raises(BindingError, match="puts learnt prompts before its inputs"):
        bind(wrapped)
