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
from hookgraph.locations import ATTN_K, ATTN_OUT, ATTN_PATTERN, ATTN_Q, ATTN_RESULT, ATTN_V, ATTN_Z
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


def difference(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((softmax(q @ k.mT) - 0.5 * softmax(k @ q.mT)) @ v)


def gated(own: "Heads", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(scaled_dot_product_attention(q, k, v, is_causal=True)) * own.gate(x).sigmoid()


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


def told(attend: Attention) -> HookGraph:
    torch.manual_seed(0)
    model = Teller(attend).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return bind(model, cached=False)


def expected(graph: HookGraph) -> Mapping[str, Tensor]:
    """Queries, keys and values of the first layer, by its projections alone."""
    model = binding_of(graph).model
    story = model.get_submodule("stories.0")
    x = story.first(model.words(IDS))  # pyright: ignore[reportCallIssue]
    names = {"attn.q": "ask", "attn.k": "tell", "attn.v": "give"}
    return {n: story.get_submodule(f"heads.{m}")(x).unflatten(-1, (HEADS, -1)) for n, m in names.items()}


@pytest.mark.parametrize("attend", [keys_first, gated])
def test_what_is_listed_as_queries_and_keys_is_that(attend: Attention):
    graph = told(attend)
    kinds = [x for x in (ATTN_Q, ATTN_K, ATTN_V) if x[0] in graph.locations]
    run = graph.run(IDS, save=[x[0] for x in kinds])
    for kind in kinds:
        torch.testing.assert_close(run[kind[0]], expected(graph)[kind.name])
    assert ATTN_V in kinds


@pytest.mark.parametrize(("attend", "times"), [(head_by_head, 4), (difference, 2)])
def test_where_the_softmax_is_taken_more_than_once_no_one_of_them_is_the_pattern(
    attend: Attention, times: int
):
    graph = told(attend)
    for kind in (ATTN_Q, ATTN_PATTERN, ATTN_Z):
        with pytest.raises(UnknownLocationError, match=f"the softmax is taken {times} times"):
            graph.check(kind[0])
    assert graph.every(ATTN_OUT)


def test_heads_behind_a_gate_add_up_to_the_update():
    graph = told(gated)
    run = graph.run(IDS, save=[ATTN_RESULT[1], ATTN_OUT[1], ATTN_Z[1]])
    bias = binding_of(graph).model.get_submodule("stories.1.heads.put").bias
    torch.testing.assert_close(run[ATTN_RESULT[1]].sum(2) + bias, run[ATTN_OUT[1]])


def test_fused_queries_keys_and_values_of_a_head_are_told_apart():
    """DeBERTa keeps the three of each head side by side."""
    graph = bind(build("masked", "deberta").double(), cached=False)
    run = graph.run(binding_of(graph).example, save=[ATTN_K[0], ATTN_V[0], ATTN_Z[0]])
    assert run[ATTN_K[0]].shape == run[ATTN_V[0]].shape == run[ATTN_Z[0]].shape
