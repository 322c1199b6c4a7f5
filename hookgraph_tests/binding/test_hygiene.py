"""The model is itself again, whatever happened while it was attached; and an empty graph is nothing."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hookgraph.errors import AlreadyAttachedError, MetricError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import ATTN_PATTERN, MLP_OUT, RESID_POST, RESID_PRE
from hookgraph_tests.families import FAMILIES, bound, build, layers_of, model_of, tokens

IDS = tokens()
INSIDE_KERNELS = ("attn.scores", "attn.pattern")
"""Where a fused kernel is replaced by the model's eager function."""


# --- what a model is --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Same:
    """An object that is equal to itself only."""

    thing: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    def __repr__(self) -> str:
        return f"{type(self.thing).__name__} at {id(self.thing):x}"


def contents(thing: object) -> Any:
    """What a container holds, in order; of anything else nothing."""
    if isinstance(thing, dict):
        return [(key, Same(value)) for key, value in thing.items()]
    return [Same(item) for item in thing] if isinstance(thing, list | tuple | set) else None


@dataclass(frozen=True)
class Snapshot:
    """Everything about a model that a graph could touch: of each module every attribute and what it
    holds, of each tensor its identity, version, gradient and values, and the configuration.
    """

    attributes: list[tuple[str, str, Same, Any]]
    scalars: list[tuple[str, str, object]]
    tensors: list[tuple[str, Same, int, bool, Same]]
    values: dict[str, list[float]]
    config: dict[str, Any]

    @staticmethod
    def of(model: PreTrainedModel) -> "Snapshot":
        attributes = [
            (path, name, value)
            for path, module in model.named_modules()
            for name, value in module.__dict__.items()
        ]
        plain = (bool, int, float, str, type(None))
        named = [*model.named_parameters(), *model.named_buffers()]
        return Snapshot(
            [(p, n, Same(v), contents(v)) for p, n, v in attributes if not isinstance(v, plain)],
            [(p, n, v) for p, n, v in attributes if isinstance(v, plain)],
            [(name, Same(t), t._version, t.requires_grad, Same(t.grad)) for name, t in named],
            {name: t.detach().flatten().tolist() for name, t in model.state_dict().items()},
            copy.deepcopy(model.config.to_dict()),
        )


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Fail unless the model is the same after this context as before, and computes the same."""
    before, logits = Snapshot.of(model), plain(model)
    yield
    assert Snapshot.of(model) == before
    assert torch.equal(plain(model), logits)


def plain(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: setattr(m.config, "use_cache", not m.config.use_cache),
        lambda m: setattr(next(m.children()), "config", copy.copy(m.config)),
        lambda m: next(m.parameters()).requires_grad_(False),
        lambda m: next(m.parameters()).data.add_(1.0),
        lambda m: next(m.modules()).train(),
        lambda m: m.__dict__.__setitem__("forward", m.forward),
        lambda m: m.generation_config.__dict__.__setitem__("eos_token_id", 5) or setattr(m, "x", 1),
    ],
)
def test_a_snapshot_tells_changed_models_apart(change: Callable[[PreTrainedModel], object]):
    model = build("gpt2")
    before = Snapshot.of(model)
    assert Snapshot.of(model) == before
    change(model)
    assert Snapshot.of(model) != before


# --- every way in and out ---------------------------------------------------------------------


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


def everywhere(graph: HookGraph, layer: int | None = 1) -> HookGraph:
    """Something at every location, of one layer or of all: a forward hook that replaces, a gradient hook."""
    for location in graph.locations:
        if layer is None or location.layer in (layer, None):
            graph = graph.hook(location, torch.clone).hook(location.grad, torch.clone)
    return graph


class MineError(Exception):
    """Raised by the tests' own hooks and metrics."""


def broken(x: Tensor) -> Tensor:
    raise MineError


def normally(graph: HookGraph) -> None:
    graph.run(IDS, save=[x.grad for x in graph.locations], metric=metric)


def after_stopping_early(graph: HookGraph) -> None:
    graph.run(IDS, save=[RESID_PRE[1]])


def after_a_replay(graph: HookGraph) -> None:
    run = graph.run(IDS, save=[RESID_PRE[2]])
    graph.replay(run, RESID_PRE[2], save=[RESID_POST[2].grad], metric=metric)


def after_generating(graph: HookGraph) -> None:
    with graph.attached():
        model_of(graph).generate(input_ids=IDS, max_new_tokens=3, do_sample=False)


def when_a_hook_raises(graph: HookGraph) -> None:
    with pytest.raises(MineError):
        graph.hook(ATTN_PATTERN[1], broken).run(IDS)


def when_a_gradient_hook_raises(graph: HookGraph) -> None:
    with pytest.raises(MineError):
        graph.hook(MLP_OUT[1].grad, broken).run(IDS, save=[RESID_PRE[0].grad], metric=metric)


def when_the_metric_raises(graph: HookGraph) -> None:
    with pytest.raises(MineError):
        graph.run(IDS, save=[RESID_PRE[0].grad], metric=broken)


def when_the_metric_has_no_gradient(graph: HookGraph) -> None:
    with pytest.raises(MetricError):
        graph.run(IDS, save=[RESID_PRE[0].grad], metric=lambda logits: metric(logits).detach())


def when_the_model_raises(graph: HookGraph) -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        graph.run(
            {"input_ids": IDS, "attention_mask": torch.ones(2, 17)}, save=[RESID_PRE[0].grad], metric=metric
        )


def when_a_replay_raises(graph: HookGraph) -> None:
    run = graph.run(IDS, save=[RESID_PRE[2]])
    with pytest.raises(MineError):
        graph.hook(RESID_POST[2], broken).replay(run, RESID_PRE[2])


def when_it_is_attached_already(graph: HookGraph) -> None:
    with graph.attached():
        for again in (graph, HookGraph(graph.binding)):
            with pytest.raises(AlreadyAttachedError, match="is attached already: leave the other `with`"):
                again.run(IDS)
    with pytest.raises(AlreadyAttachedError), graph.attached(), graph.attached():
        pytest.fail("attached twice")


def when_interrupted_while_generating(graph: HookGraph) -> None:
    calls: list[int] = []

    def interrupt(x: Tensor) -> None:
        calls.append(x.shape[1])
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), graph.hook(RESID_POST[1], interrupt).attached():
        model_of(graph).generate(input_ids=IDS, max_new_tokens=9, do_sample=False)
    assert calls == [IDS.shape[1], 1, 1]


EXITS = (
    normally,
    after_stopping_early,
    after_a_replay,
    after_generating,
    when_a_hook_raises,
    when_a_gradient_hook_raises,
    when_the_metric_raises,
    when_the_metric_has_no_gradient,
    when_the_model_raises,
    when_a_replay_raises,
    when_it_is_attached_already,
    when_interrupted_while_generating,
)


@pytest.mark.parametrize("leave", EXITS, ids=lambda leave: leave.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_itself_again(family: str, leave: Callable[[HookGraph], None]):
    graph = everywhere(bound(family))
    with unchanged(model_of(graph)):
        leave(graph)


@pytest.mark.parametrize("family", FAMILIES)
def test_flags_that_a_user_set_stay_set(family: str):
    graph = everywhere(bound(family))
    model = model_of(graph)
    some = list(model.parameters())[::2]
    first = layers_of(family, model)[0]
    try:
        for parameter in some:
            parameter.requires_grad_(False)
        first.training = True
        with unchanged(model):
            normally(graph)
            when_a_gradient_hook_raises(graph)
    finally:
        first.training = False
        for parameter in some:
            parameter.requires_grad_(True)


# --- hooks of others --------------------------------------------------------------------------


@contextmanager
def foreign_hooks(model: nn.Module, log: list[str]) -> Iterator[None]:
    """Hooks of every kind, two of each, on every module."""
    handles = []
    for path, module in model.named_modules():
        for number in (1, 2):

            def pre(*_: Any, name: str = f"pre{number} {path}") -> None:
                log.append(name)

            def post(*_: Any, name: str = f"post{number} {path}") -> None:
                log.append(name)

            handles += [
                module.register_forward_pre_hook(pre),
                module.register_forward_pre_hook(lambda *a, pre=pre: pre(), with_kwargs=True),
                module.register_forward_hook(post),
                module.register_forward_hook(lambda *a, post=post: post(), with_kwargs=True),
                module.register_forward_hook(lambda *a: None, always_call=True),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("leave", EXITS, ids=lambda leave: leave.__name__)
def test_hooks_of_others_stay_in_place_and_in_order(leave: Callable[[HookGraph], None]):
    graph = everywhere(bound("llama"))
    model, log = model_of(graph), []
    with foreign_hooks(model, log):
        plain(model)
        alone = list(log)
        with unchanged(model):
            leave(graph)
        log.clear()
        plain(model)
        assert log == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_others_are_called_as_always_while_attached(family: str):
    graph = bound(family)
    outside = HookGraph(graph.binding)
    for location in graph.locations:
        if location.type.name not in INSIDE_KERNELS:
            outside = outside.hook(location, torch.clone)
    model, log = model_of(graph), []
    with foreign_hooks(model, log):
        plain(model)
        alone = list(log)
        log.clear()
        with outside.attached():
            assert log == []
            plain(model)
        assert log == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_others_see_what_the_model_goes_on_with(family: str):
    graph = bound(family)
    model, seen = model_of(graph), []
    layer = layers_of(family, model)[1]

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = layer.register_forward_hook(keep)
    try:
        graph.hook(RESID_POST[1], torch.zeros_like).run(IDS)
    finally:
        handle.remove()
    assert seen[0].count_nonzero() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_full_backward_hooks_of_others_do_not_mind(family: str):
    graph = everywhere(bound(family))
    model, log = model_of(graph), []
    handles = [
        module.register_full_backward_hook(lambda *_, path=path: log.append(path))
        for layer in layers_of(family, model)
        for path, module in layer.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        asked = [x.grad for x in graph.locations if x.layer == 1]
        run = graph.run(IDS, save=asked, metric=metric, grad=True)
    finally:
        for handle in handles:
            handle.remove()
    assert log
    without = graph.run(IDS, save=asked, metric=metric)
    for place in asked:
        torch.testing.assert_close(run[place], without[place])


# --- nothing attached, nothing changed ----------------------------------------------------------


def outcome(model: PreTrainedModel) -> list[Tensor]:
    """Logits, the gradients of all parameters, and generated tokens."""
    logits = model(input_ids=IDS, labels=IDS, use_cache=False)
    gradients = torch.autograd.grad(logits.loss, list(model.parameters()))
    generated = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    assert isinstance(generated, Tensor)
    return [logits.logits.detach(), *gradients, generated]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attached_empty_graph_is_bit_identical(family: str):
    graph = bound(family)
    model = model_of(graph)
    before = outcome(model)
    with graph.attached():
        inside = outcome(model)
    for results in (inside, outcome(model)):
        assert all(map(torch.equal, results, before))


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_hooks_outside_kernels_are_bit_identical(family: str):
    graph = bound(family)
    model = model_of(graph)
    before = outcome(model)
    for location in graph.locations:
        if location.type.name not in INSIDE_KERNELS or FAMILIES[family].attention == "eager":
            graph = graph.hook(location, lambda x: x).hook(location.grad, lambda g: g)
    with graph.attached():
        inside = outcome(model)
    assert all(map(torch.equal, inside, before))


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_everywhere_change_nothing_beyond_rounding(family: str):
    graph = bound(family)
    model = model_of(graph)
    before = outcome(model)
    with everywhere(graph, layer=None).attached():
        inside = outcome(model)
    for got, expected in zip(inside, before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_outside_kernels_leave_logits_and_tokens_bit_identical(family: str):
    graph = bound(family)
    model = model_of(graph)
    before = outcome(model)
    for location in graph.locations:
        if location.type.name not in INSIDE_KERNELS:
            graph = graph.hook(location, torch.clone)
    with graph.attached():
        inside = outcome(model)
    assert torch.equal(inside[0], before[0])
    assert torch.equal(inside[-1], before[-1])


# --- other threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_another_model_in_another_thread_stays_bit_identical(family: str):
    graph = bound(family)
    other = build(family, seed=1)
    expected = plain(other)
    inside, done, results = threading.Event(), threading.Event(), list[Tensor]()

    def work() -> None:
        try:
            assert inside.wait(60)
            results.extend(plain(other) for _ in range(5))
        finally:
            done.set()

    thread = threading.Thread(target=work)
    thread.start()

    def while_the_other_runs(x: Tensor) -> Tensor:
        inside.set()
        assert done.wait(60)
        return torch.zeros_like(x)

    try:
        hooked = everywhere(graph).hook(ATTN_PATTERN[1], while_the_other_runs)
        logits = hooked.run(IDS).logits
    finally:
        inside.set()
        thread.join()
    assert len(results) == 5
    assert all(torch.equal(result, expected) for result in results)
    assert not torch.allclose(logits, plain(model_of(graph))), "the hooked model was not hooked"
