"""The last MLP is computed where the metric reads, if nobody looks at the other positions."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from hookgraph.algorithms import metrics
from hookgraph.binding import bind
from hookgraph.binding.proving.narrowed import check_narrowed
from hookgraph.binding.running.narrowing import NARROWED, last_mlp
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric, Reads, put, take
from hookgraph.hooks.handles import installed
from hookgraph.ontology.locations import MAIN_STACK, Location, LocationType
from hookgraph.ontology.transformer import (
    ATTN_OUT,
    ATTN_Z,
    FINAL_LN_OUT,
    MLP_IN,
    MLP_OUT,
    MLP_POST,
    RESID_POST,
    RESID_PRE,
    ROUTER_LOGITS,
)
from hookgraph.subgraphs import AutoencoderGraph
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM
from hookgraph_tests.families import FAMILIES, binding_of, bound, build, model_of, tokens
from hookgraph_tests.subgraphs.planted import planted

READS: list[Reads] = [-1, 2, torch.tensor([4, -2])]


def last(graph: HookGraph, kind: LocationType) -> Location:
    """A location of the last layer."""
    return kind[graph.binding.layers(MAIN_STACK) - 1]


def last_mlp_of(graph: HookGraph) -> nn.Module:
    """The module that reads mlp.in of the last layer."""
    return model_of(graph).get_submodule(binding_of(graph).findings.anchors[last(graph, MLP_IN)].module)


@contextmanager
def lengths(module: nn.Module) -> Generator[list[int]]:
    """How many positions a module was given, call by call, seen without a hook on it."""
    seen: list[int] = []
    forward: Callable[..., Tensor] = type(module).forward

    def spying(self: nn.Module, x: Tensor) -> Tensor:
        if self is module:
            seen.append(x.shape[1])
        return forward(self, x)

    with patch.object(type(module), "forward", spying):
        yield seen


def metric(reads: Reads) -> Metric:
    """A metric that reads these positions."""
    return metrics.logit_diff(3, 5, pos=reads)


@pytest.mark.parametrize("reads", READS, ids=["last", "one", "one each"])
def test_what_was_taken_is_put_back_where_it_was(reads: Reads):
    x = torch.randn(2, 6, 3)
    whole = put(take(x, reads), reads, 6)
    assert torch.equal(take(whole, reads), take(x, reads))
    assert int(whole.count_nonzero()) == 2 * 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reads", READS, ids=["last", "one", "one each"])
def test_gradients_are_those_of_a_pass_that_computes_every_position(family: str, reads: Reads):
    graph, ids = bound(family, torch.float64), tokens()
    places = [RESID_PRE[0].grad, ATTN_Z[0].grad, ATTN_OUT[1].grad]
    with lengths(last_mlp_of(graph)) as seen:
        whole = graph.run(ids, save=places, metric=metric(reads))
        part = graph.run(ids, save=places, metric=metric(reads), logits=False)
    assert seen == [6, 1]
    assert part.metric is not None
    torch.testing.assert_close(part.metric, whole.metric, rtol=1e-9, atol=1e-9)
    for place in places:
        torch.testing.assert_close(part[place], whole[place], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(part.logits, whole.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("place", [MLP_IN, MLP_POST, MLP_OUT, RESID_POST], ids=str)
def test_who_looks_at_what_follows_sees_every_position(place: LocationType):
    graph, ids = bound("gpt2", torch.float64), tokens()
    wanted = last(graph, place)
    whole = graph.run(ids, save=wanted, metric=metric(-1))[wanted]
    assert torch.equal(graph.run(ids, save=wanted, metric=metric(-1), logits=False)[wanted], whole)
    with lengths(last_mlp_of(graph)) as seen:
        graph.hook(wanted, torch.clone).run(ids, metric=metric(-1), logits=False)
    assert seen == [6]


def test_a_dictionary_that_nobody_asks_looks_at_no_position():
    graph, ids = bound("gpt2", torch.float64), tokens()
    idle = AutoencoderGraph(planted(32, 96), last(graph, MLP_OUT))
    with lengths(last_mlp_of(graph)) as seen:
        graph.inject(idle).run(ids, metric=metric(-1), logits=False)
        graph.inject(idle).run(ids, save=[idle.latents], metric=metric(-1), logits=False)
        graph.inject(idle.with_gradient("frozen")).run(ids, metric=metric(-1), logits=False)
    assert seen == [1, 6, 6]


def test_hooks_of_others_and_training_see_every_position():
    graph, ids = bound("gpt2", torch.float64), tokens()
    module = last_mlp_of(graph)
    shapes: list[int] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes.append(args[0].shape[1])

    with installed(lambda: module.register_forward_pre_hook(look)):
        graph.run(ids, metric=metric(-1), logits=False)
    assert shapes == [6]
    try:
        module.train()
        with lengths(module) as seen:
            graph.run(ids, metric=metric(-1), logits=False)
    finally:
        module.eval()
    assert seen == [6]


def test_who_hooks_the_last_norm_sees_every_position():
    graph, ids = bound("gpt2", torch.float64), tokens()
    norm: nn.Module = model_of(graph).get_submodule("transformer.ln_f")
    given: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given.append(args[0])

    with installed(lambda: norm.register_forward_pre_hook(look)):
        graph.run(ids, metric=metric(-1))
        graph.run(ids, metric=metric(-1), logits=False)
    assert torch.equal(*given)


def test_an_mlp_that_looks_at_another_position_is_seen():
    graph = bound("gpt2", torch.float64)
    binding, module = binding_of(graph), last_mlp_of(graph)
    forward = type(module).forward

    def ahead(self: nn.Module, x: Tensor) -> Tensor:
        return forward(self, x + 0.1 * torch.cat([x[:, 1:], x[:, -1:]], 1))

    place = last(graph, MLP_IN)
    example = {"input_ids": tokens(1)}
    assert {p.location for p in check_narrowed(binding, example, [place])[0]} == {place}
    with patch.object(type(module), "forward", ahead):
        proofs, gaps = check_narrowed(binding, example, [place])
    assert not proofs
    assert [g.location for g in gaps] == [place]


def test_one_position_proves_nothing_of_others():
    graph = bound("gpt2", torch.float64)
    proofs, gaps = check_narrowed(binding_of(graph), {"input_ids": tokens(1, 1)}, [FINAL_LN_OUT])
    assert not proofs
    assert [g.location for g in gaps] == [FINAL_LN_OUT]


def test_routers_may_count_tokens_so_mixtures_see_every_position():
    findings = binding_of(bound("gpt2", torch.float64)).findings
    place = last(bound("gpt2", torch.float64), MLP_IN)
    assert last_mlp(findings) == place
    router = ROUTER_LOGITS[place.layer or 0]
    anchors = {**findings.anchors, router: replace(findings.anchors[place], location=router)}
    assert last_mlp(replace(findings, anchors=anchors)) is None


class Rerun(LoomForCausalLM):
    """Checkpoints its own layers."""

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        cloth = self.spool(input_ids)
        for row in self.cloth:
            if torch.is_grad_enabled():
                cloth = checkpoint(row, cloth, use_reentrant=False)
            else:
                cloth = row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth)))


def test_what_runs_again_for_the_gradient_runs_as_it_did():
    torch.manual_seed(0)
    graph, ids = bind(Rerun(LoomConfig(echo=False)).double().eval()), tokens()
    assert graph.report.proves(FINAL_LN_OUT, NARROWED)
    places = [RESID_PRE[0].grad, ATTN_Z[1].grad]
    whole = graph.run(ids, save=places, metric=metric(-1))
    part = graph.run(ids, save=places, metric=metric(-1), logits=False)
    for place in places:
        torch.testing.assert_close(part[place], whole[place], rtol=1e-9, atol=1e-12)


def test_several_positions_of_an_example_take_all_of_them():
    graph, ids = bound("gpt2", torch.float64), tokens()
    with lengths(last_mlp_of(graph)) as seen:
        several = metrics.kl_to(graph.run(ids).logits, pos=torch.tensor([[1, 2], [3, 3]]))
        graph.run(ids, metric=several, logits=False)
    assert seen == [6, 6]


class Blended(nn.LayerNorm):
    """A last norm after which each position has something of those before."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).cumsum(1)


def test_where_positions_are_mixed_after_the_last_layer_all_are_computed():
    model = build("gpt2", torch.float64)
    model.transformer.ln_f = Blended(model.config.n_embd, dtype=torch.float64)  # pyright: ignore
    graph, ids = bind(model), tokens()
    report = graph.report
    assert report.proves(last(graph, MLP_IN), NARROWED)
    assert not report.proves(FINAL_LN_OUT, NARROWED)
    assert "one position by itself" in report.why_unchecked(FINAL_LN_OUT, NARROWED)
    whole = graph.run(ids, save=ATTN_Z[0].grad, metric=metric(-1))
    with lengths(last_mlp_of(graph)) as seen:
        part = graph.run(ids, save=ATTN_Z[0].grad, metric=metric(-1), logits=False)
    assert seen == [6]
    assert torch.equal(part[ATTN_Z[0].grad], whole[ATTN_Z[0].grad])
