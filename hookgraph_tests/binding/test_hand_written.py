"""Attention as people write it by hand: what it multiplies is found, or absent with the reason."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2Config, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hookgraph import HookGraph, bind
from hookgraph.errors import UnknownLocationError
from hookgraph.locations import (
    ATTN_K,
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Q,
    ATTN_RESULT,
    ATTN_SCORES,
    ATTN_V,
    ATTN_Z,
    RESID_MID,
)
from hookgraph.ontology.locations import LocationType
from hookgraph_tests.families import binding_of, tokens
from hookgraph_tests.tiny import build

HEADS, WIDTH = 4, 32
IDS = tokens(2, 6)

Attention = Callable[["Heads", Tensor, Tensor, Tensor, Tensor], Tensor]
"""What heads make of x, and of queries, keys and values, each (batch, head, pos, d_head)."""


def softmax(scores: Tensor) -> Tensor:
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -1e9).softmax(-1)


def joined(z: Tensor) -> Tensor:
    return z.transpose(1, 2).flatten(2)


def keys_first(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(softmax((k @ q.mT / k.shape[-1] ** 0.5).mT) @ v)


def head_by_head(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    each = [softmax(q[:, i : i + 1] @ k[:, i : i + 1].mT) @ v[:, i : i + 1] for i in range(HEADS)]
    return joined(torch.cat(each, 1))


def in_chunks(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Some queries at a time, as where memory is short."""
    scores = (q @ k.mT).masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -1e9)
    return joined(torch.cat([chunk.softmax(-1) @ v for chunk in scores.chunk(3, 2)], 2))


def difference(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((softmax(q @ k.mT) - 0.5 * softmax(k @ q.mT)) @ v)


def gated(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(scaled_dot_product_attention(q, k, v, is_causal=True)) * own.gate(x).sigmoid()


def gated_in_three_axes(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads on one axis."""
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    z = torch.bmm(softmax(torch.bmm(q, k.mT) / q.shape[-1] ** 0.5), v)
    return joined(z.unflatten(0, (-1, HEADS))) * own.gate(x).sigmoid()


def grouped(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two queries for each key, on an axis of their own."""
    q, k, v = q.unflatten(1, (2, 2)), k[:, ::2].unsqueeze(2), v[:, ::2].unsqueeze(2)
    return joined((softmax(q @ k.mT / q.shape[-1] ** 0.5) @ v).flatten(1, 2))


def grouped_in_einstein_sums(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bghqd,bgkd->bghqk", q.unflatten(1, (2, 2)), k[:, ::2])
    return joined(torch.einsum("bghqk,bgkd->bghqd", softmax(scores), v[:, ::2]).flatten(1, 2))


def grouped_and_fused(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, ::2].unsqueeze(2).expand(-1, -1, 2, -1, -1) for t in (k, v))
    z = scaled_dot_product_attention(q.unflatten(1, (2, 2)), k, v, is_causal=True)
    return joined(z.flatten(1, 2))


def grouped_with_groups_second(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same heads, the axis of groups behind that of the heads of a group."""
    q, k, v = q.unflatten(1, (2, 2)).transpose(1, 2), k[:, ::2].unsqueeze(1), v[:, ::2].unsqueeze(1)
    z = softmax(q @ k.mT / q.shape[-1] ** 0.5) @ v
    return joined(z.transpose(1, 2).flatten(1, 2))


def grouped_and_shuffled(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The second head writes where the third one does else."""
    q, k, v = q.unflatten(1, (2, 2)), k[:, ::2].unsqueeze(2), v[:, ::2].unsqueeze(2)
    return joined((softmax(q @ k.mT) @ v).transpose(1, 2).flatten(1, 2))


def shared_in_turn(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first and the third head have the same keys."""
    q, k, v = q.unflatten(1, (2, 2)), k[:, :2].unsqueeze(1), v[:, :2].unsqueeze(1)
    return joined((softmax(q @ k.mT) @ v).flatten(1, 2))


def remembering(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With two learned keys and values before those of tokens."""
    learned = own.gate.weight[:2].view(2, HEADS, -1).transpose(0, 1).expand(len(x), -1, -1, -1)
    k, v = torch.cat([learned, k], 2), torch.cat([learned, v], 2)
    later = torch.ones(x.shape[1], x.shape[1] + 2, dtype=torch.bool).triu(3)
    return joined((q @ k.mT).masked_fill(later, -1e9).softmax(-1) @ v)


def sum_of_products(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(softmax(q @ k.mT + k @ q.mT) @ v)


def over_queries(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((k @ q.mT / WIDTH**0.5).softmax(-2).mT @ v)


def heads_last(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pattern = torch.einsum("bhqd,bhkd->bqkh", q, k).softmax(2)
    return joined(torch.einsum("bqkh,bhkd->bhqd", pattern, v))


def running_sum(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(softmax(q @ k.mT) @ v).cumsum(1)


def two_uses(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pattern = softmax(q @ k.mT)
    return joined(pattern @ v + pattern @ k)


def own_output(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(softmax(q @ k.mT) @ v) @ own.gate.weight


class Heads(nn.Module):
    """An attention whose queries, keys and values are three projections."""

    def __init__(self, attend: Attention) -> None:
        super().__init__()
        self.ask, self.tell, self.give, self.gate, self.put = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        """What the heads add."""
        q, k, v = (m(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.ask, self.tell, self.give))
        return self.put(self.attend(self, x, q, k, v))


class Story(nn.Module):
    """Attention, then an MLP."""

    def __init__(self, attend: Attention) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.heads = Heads(attend)
        self.think = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """The stream after it."""
        x = x + self.heads(self.first(x))
        return x + self.think(self.second(x))


class Teller(PreTrainedModel):
    """Two stories between words and words."""

    def __init__(self, attend: Attention) -> None:
        super().__init__(GPT2Config(n_embd=WIDTH, n_head=HEADS, n_layer=2, vocab_size=48))
        self.words = nn.Embedding(48, WIDTH)
        self.stories = nn.ModuleList(Story(attend) for _ in range(2))
        self.end, self.say = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of words."""
        return self.words

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        x = self.words(input_ids)
        for story in self.stories:
            x = story(x)
        return CausalLMOutput(logits=self.say(self.end(x)))


def teller(attend: Attention) -> Teller:
    torch.manual_seed(0)
    model = Teller(attend).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def told(attend: Attention) -> HookGraph:
    return bind(teller(attend), cached=False)


def unproven(attend: Attention) -> HookGraph:
    return bind(teller(attend), check=False)


def expected(graph: HookGraph) -> Mapping[str, Tensor]:
    """Queries, keys and values of the first layer, by its projections alone."""
    model = binding_of(graph).model
    story = model.get_submodule("stories.0")
    x = story.first(model.words(IDS))  # pyright: ignore[reportCallIssue]
    names = {"attn.q": "ask", "attn.k": "tell", "attn.v": "give"}
    return {n: story.get_submodule(f"heads.{m}")(x).unflatten(-1, (HEADS, -1)) for n, m in names.items()}


@pytest.mark.parametrize("attend", [keys_first, gated, remembering])
def test_what_is_listed_as_queries_and_keys_is_that(attend: Attention):
    graph = told(attend)
    kinds = [x for x in (ATTN_Q, ATTN_K, ATTN_V) if x[0] in graph.locations]
    run = graph.run(IDS, save=[x[0] for x in kinds])
    for kind in kinds:
        torch.testing.assert_close(run[kind[0]], expected(graph)[kind.name])
    assert ATTN_V in kinds


@pytest.mark.parametrize(("attend", "times"), [(head_by_head, 4), (difference, 2), (in_chunks, 3)])
def test_where_the_softmax_is_taken_more_than_once_no_one_of_them_is_the_pattern(
    attend: Attention, times: int
):
    graph = unproven(attend)
    for kind in (ATTN_Q, ATTN_PATTERN, ATTN_Z):
        with pytest.raises(UnknownLocationError, match=f"the softmax is taken {times} times"):
            graph.check(kind[0])
    assert graph.every(ATTN_OUT)


@pytest.mark.parametrize("attend", [gated, gated_in_three_axes])
def test_heads_behind_a_gate_add_up_to_the_update(attend: Attention):
    graph = unproven(attend)
    run = graph.run(IDS, save=[ATTN_RESULT[1], ATTN_OUT[1], ATTN_Z[1]])
    bias = binding_of(graph).model.get_submodule("stories.1.heads.put").bias
    torch.testing.assert_close(run[ATTN_RESULT[1]].sum(2) + bias, run[ATTN_OUT[1]])


@pytest.mark.parametrize(
    "attend", [grouped, grouped_in_einstein_sums, grouped_and_fused, grouped_with_groups_second]
)
def test_heads_in_groups_are_heads(attend: Attention):
    graph = unproven(attend)
    kinds = (ATTN_Q, ATTN_K, ATTN_V, ATTN_PATTERN, ATTN_SCORES, ATTN_Z)
    run = graph.run(IDS, save=[x[0] for x in kinds])
    shared = 1 if attend is grouped_and_fused else 2  # repeated before they are multiplied, or not
    assert run[ATTN_K[0]].shape == run[ATTN_V[0]].shape == (2, 6, HEADS // shared, WIDTH // HEADS)
    torch.testing.assert_close(run[ATTN_Q[0]], expected(graph)["attn.q"])
    for kind in (ATTN_K, ATTN_V):
        torch.testing.assert_close(run[kind[0]][:, :, :: 2 // shared], expected(graph)[kind.name][:, :, ::2])
    v = run[ATTN_V[0]].repeat_interleave(shared, 2)
    torch.testing.assert_close(run[ATTN_Z[0]], torch.einsum("bhqk,bkhd->bqhd", run[ATTN_PATTERN[0]], v))
    torch.testing.assert_close(run[ATTN_PATTERN[0]], run[ATTN_SCORES[0]].softmax(-1))
    k = run[ATTN_K[0]].repeat_interleave(shared, 2)
    ratios = (run[ATTN_SCORES[0]] / torch.einsum("bqhd,bkhd->bhqk", run[ATTN_Q[0]], k))[..., :, 0]
    torch.testing.assert_close(ratios, ratios[0, 0, 0].expand_as(ratios))
    given = module_input(graph, "stories.0.heads.put").unflatten(-1, (HEADS, -1))
    torch.testing.assert_close(run[ATTN_Z[0]], given)


def module_input(graph: HookGraph, path: str) -> Tensor:
    """What a module is given by the model alone."""
    model, seen = binding_of(graph).model, list[Tensor]()
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(IDS)
    handle.remove()
    return seen[0]


REASONS: dict[str, tuple[Attention, LocationType, str]] = {
    "over queries": (over_queries, ATTN_Q, "the softmax is not over the last axis"),
    "heads last": (heads_last, ATTN_K, "the softmax is not over the last axis"),
    "turned": (
        keys_first,
        ATTN_Q,
        "the axes of the scores change places between",
    ),
    "queries": (
        sum_of_products,
        ATTN_Q,
        "the scores are the sum of 2 products, each with queries and",
    ),
    "order": (
        grouped_and_shuffled,
        ATTN_SCORES,
        "of the queries are counted in another order than z's",
    ),
    "in turn": (shared_in_turn, ATTN_K, "heads share keys and values in turn: heads in a row have others"),
    "learned": (remembering, ATTN_SCORES, "keys of no token stand before those of tokens: 2 of them"),
    "result": (running_sum, ATTN_RESULT, "more is done to z before the output projection than to weigh its"),
    "weight": (own_output, ATTN_RESULT, "the code that attends multiplies with its weight"),
    "z": (two_uses, ATTN_Z, "the pattern is multiplied with 2 tensors"),
}


@pytest.mark.parametrize(("attend", "absent", "why"), REASONS.values(), ids=REASONS)
def test_the_reason_for_an_absence_is_what_the_code_does(attend: Attention, absent: LocationType, why: str):
    with pytest.raises(UnknownLocationError, match=why):
        unproven(attend).check(absent[0])


class Twice(Story):
    """Two attentions beside each other."""

    def __init__(self) -> None:
        super().__init__(keys_first)
        self.more = Heads(keys_first)

    def forward(self, x: Tensor) -> Tensor:
        """The stream after both, and an MLP."""
        given = self.first(x)
        x = x + self.heads(given) + self.more(given)
        return x + self.think(self.second(x))


def test_attention_that_is_there_in_parts_is_not_said_to_be_missing():
    model = teller(keys_first)
    model.stories = nn.ModuleList(Twice().double() for _ in range(2))
    graph = bind(model, check=False)
    for kind in (ATTN_OUT, ATTN_Q):
        with pytest.raises(UnknownLocationError, match=r"\[0\]: layer 0 adds 2 updates of this kind"):
            graph.check(kind[0])


class Weighed(Story):
    """Weighs what attention adds by what it makes of a weight."""

    def __init__(self) -> None:
        super().__init__(keys_first)
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """The stream after it."""
        x = x + self.weight.tanh() * self.heads(self.first(x))
        return x + self.think(self.second(x))


def test_an_update_that_the_layer_weighs_itself_is_absent_with_the_reason_and_the_rest_is_there():
    model = teller(keys_first)
    model.stories = nn.ModuleList(Weighed().double() for _ in range(2))
    graph = bind(model, check=False)
    with pytest.raises(UnknownLocationError, match="the layer multiplies what a module returns with weights"):
        graph.check(ATTN_OUT[0])
    assert {ATTN_RESULT[0], RESID_MID[0]} <= set(graph.locations)


def test_fused_queries_keys_and_values_of_a_head_are_told_apart():
    """DeBERTa keeps the three of each head side by side."""
    graph = bind(build("masked", "deberta").double(), cached=False)
    run = graph.run(binding_of(graph).example, save=[ATTN_K[0], ATTN_V[0], ATTN_Z[0]])
    assert run[ATTN_K[0]].shape == run[ATTN_V[0]].shape == run[ATTN_Z[0]].shape
