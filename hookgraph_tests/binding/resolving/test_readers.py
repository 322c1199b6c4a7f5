"""What each head reads: one copy of the projection's input per head, edited one by one."""

from collections.abc import Callable

import pytest
import torch
from einops import einsum
from torch import Tensor

import hookgraph as hg
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import (
    ATTN_IN,
    ATTN_K,
    ATTN_K_IN,
    ATTN_K_PRE,
    ATTN_Q,
    ATTN_Q_IN,
    ATTN_Q_PRE,
    ATTN_V,
    ATTN_V_IN,
    LOGITS,
)
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.weights import W_K, W_Q, W_V, WeightType, b_K, b_Q, b_V
from hookgraph_tests.families import FAMILIES, bound, tokens
from hookgraph_tests.tiny import build

LAYER = 1
IDS = tokens(2, 5)
READERS: tuple[tuple[LocationType, WeightType, WeightType], ...] = (
    (ATTN_Q_IN, W_Q, b_Q),
    (ATTN_K_IN, W_K, b_K),
    (ATTN_V_IN, W_V, b_V),
)
KINDS = [kind for kind, _, _ in READERS]


def made_of(graph: HookGraph, reader: LocationType) -> Location:
    """What the projection makes of a reader: queries, keys or values before any rotary embedding."""
    earlier, late = {
        ATTN_Q_IN: (ATTN_Q_PRE, ATTN_Q),
        ATTN_K_IN: (ATTN_K_PRE, ATTN_K),
        ATTN_V_IN: (ATTN_V, ATTN_V),
    }[reader]
    return earlier[LAYER] if earlier[LAYER] in graph.locations else late[LAYER]


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 7] - logits[:, -2, 9]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("reader", "weight", "bias"), READERS)
def test_an_edit_of_what_one_head_reads_moves_that_head_as_split_inputs_would(
    family: str, reader: LocationType, weight: WeightType, bias: WeightType
):
    graph = bound(family, torch.float64)
    made, head = made_of(graph, reader), 1
    name = reader.dims[2].value
    plain = graph.run(IDS, save=[made])
    new = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edited = graph.hook(reader[LAYER].at(**{name: head}), lambda _: new).run(IDS, save=[made])
    expected = plain[made].clone()
    matrix, offset = graph.weight(weight, LAYER), graph.weight(bias, LAYER)
    expected[:, :, head] = einsum(new, matrix[head], "b p m, m d -> b p d") + offset[head]
    torch.testing.assert_close(edited[made], expected, rtol=1e-10, atol=1e-10)
    others = [h for h in range(expected.shape[2]) if h != head]
    assert torch.equal(edited[made][:, :, others], plain[made][:, :, others])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_of_the_model_sees_the_head_that_was_moved(family: str):
    graph = bound(family, torch.float64)
    made = made_of(graph, ATTN_Q_IN)
    edited = graph.hook(ATTN_Q_IN[LAYER].at(head=2), lambda x: x * 1.5 + 0.1)
    run = edited.run(IDS, save=[made])
    direct = graph.hook(made, lambda _: run[made]).run(IDS)
    torch.testing.assert_close(run.logits, direct.logits, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(run.logits, graph.run(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_and_differentiating_change_nothing(family: str):
    graph = bound(family)
    plain = graph.run(IDS).logits
    places = [kind[LAYER] for kind in KINDS]
    run = graph.run(IDS, save=[*places, *(x.grad for x in places), LOGITS], metric=metric)
    assert torch.equal(run.logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_of_all_readers_add_up_to_that_of_what_attention_reads(family: str):
    graph = bound(family, torch.float64)
    places = [kind[LAYER].grad for kind in KINDS]
    run = graph.run(IDS, save=[*places, ATTN_IN[LAYER].grad], metric=metric)
    total = sum((run[x].sum(2) for x in places), torch.zeros(2, 5, 32, dtype=torch.float64))
    torch.testing.assert_close(total, run[ATTN_IN[LAYER].grad], rtol=1e-8, atol=1e-12)


def test_reading_holds_one_tensor_for_all_heads():
    graph = bound("gpt2")
    value = graph.run(IDS, save=[ATTN_Q_IN[LAYER]])[ATTN_Q_IN[LAYER]]
    assert value.shape == (2, 5, 4, 32)
    assert value.untyped_storage().nbytes() == 2 * 5 * 32 * value.element_size()


def test_an_edit_in_place_of_one_head_leaves_the_others():
    graph, made = bound("gpt2"), ATTN_Q[LAYER]

    def erase(x: Tensor) -> None:
        x[:, :, 0] = 0

    plain, run = (g.run(IDS, save=[made]) for g in (graph, graph.hook(ATTN_Q_IN[LAYER], erase)))
    assert torch.equal(run[made][:, :, 1:], plain[made][:, :, 1:])
    bias = graph.weight(b_Q, LAYER)[0]
    torch.testing.assert_close(run[made][:, :, 0], bias.expand(2, 5, -1), rtol=1e-5, atol=1e-5)


def test_queries_multiplied_by_a_number_after_their_projection_have_readers():
    graph = hg.bind(build("causal", "opt"))
    assert {kind[0] for kind in KINDS} <= set(graph.locations)


@pytest.mark.parametrize(
    ("family", "reader", "reason"),
    [
        ("deepseek_v3", ATTN_Q_IN, "a latent or another axis"),
        ("olmo2", ATTN_K_IN, "no single projection returns these heads"),
    ],
)
def test_what_has_no_reader_says_why(family: str, reader: LocationType, reason: str):
    graph = hg.bind(build("causal", family), check=False)
    refused: Callable[[], object] = lambda: graph.check(reader[0])  # noqa: E731
    with pytest.raises(hg.UnknownLocationError, match=reason):
        refused()
