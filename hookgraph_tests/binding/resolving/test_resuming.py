"""A pass begins between two layers where all that later layers read is the stream, and nowhere else."""

from functools import cache

import pytest
import torch

from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.binding import bind
from hookgraph.errors import LocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.locations import ATTN_Z, RESID_PRE
from hookgraph_tests.families import binding_of
from hookgraph_tests.tiny.models import build


@cache
def graph_of(table: str, architecture: str) -> HookGraph:
    return bind(build(table, architecture), check=False)


def run_of(graph: HookGraph) -> Run:
    return graph.run(binding_of(graph).example, save=graph.every(RESID_PRE))


@pytest.mark.parametrize(
    ("table", "architecture", "running"),
    [
        ("seq2seq", "t5", (0,)),  # its first layer makes the table of relative positions
        ("causal", "rwkv", ()),  # its layers return tuples with things that are no tensors
        ("causal", "xlnet", ()),
        ("causal", "gpt2", ()),
    ],
)
def test_a_pass_that_begins_later_ends_alike(table: str, architecture: str, running: tuple[int, ...]):
    graph = graph_of(table, architecture)
    run = run_of(graph)
    for place in graph.every(RESID_PRE)[1:]:
        again = graph.replay(run, place).logits
        assert torch.allclose(again, run.logits, rtol=1e-5, atol=1e-6)
        other = graph.replay(run, place, value=run[place].flip(-1)).logits
        assert not torch.allclose(other, run.logits, atol=1e-3)
        layer = place.layer or 0
        assert binding_of(graph).findings.layers["decoder"][layer - 1].after.needed == running


def test_a_layer_that_runs_all_the_same_is_not_hooked():
    graph, seen = graph_of("seq2seq", "t5"), list[int]()
    run = run_of(graph)
    graph.hook(ATTN_Z[0], lambda x: seen.append(1)).replay(run, RESID_PRE[1])
    assert not seen


def test_where_later_layers_read_keys_of_earlier_ones_no_pass_begins_between_them():
    graph = graph_of("causal", "gemma4_text")
    run = run_of(graph)
    with pytest.raises(LocationError, match=r"after layer 1 of its decoder: .* read what layer 0 computed"):
        graph.replay(run, RESID_PRE[2])
    assert graph.entry(ATTN_Z[3]) == RESID_PRE[0]


def test_algorithms_go_back_to_where_a_pass_can_begin():
    graph, metric = graph_of("causal", "gemma4_text"), logit_diff(3, 5)
    clean = binding_of(graph).example
    corrupt = {**clean, "input_ids": clean["input_ids"].flip(1)}
    node = ATTN_Z[3].at(head=0)
    effect = exact_effects(graph, clean, corrupt, metric, [node])[0]
    value = graph.run(corrupt, save=[node])[node]
    base, patched = (g.run(clean, metric=metric).metric for g in (graph, graph.hook(node, lambda _: value)))
    assert base is not None
    assert patched is not None
    assert torch.allclose(effect, patched - base, atol=1e-6)
    assert (patched - base).abs().max() > 1e-4
