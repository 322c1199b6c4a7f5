"""Layers and attention that PyTorch brings: they are looked into, and leave no fast path half taken."""

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from hookgraph import HookGraph, bind
from hookgraph.locations import ATTN_IN, ATTN_K, ATTN_OUT, ATTN_PATTERN, ATTN_Q, ATTN_RESULT, ATTN_V, ATTN_Z
from hookgraph.ontology.transformer import ATTN_SCORES, MLP_POST, RESID_MID, RESID_POST, RESID_PRE
from hookgraph_tests.binding.test_hand_written import HEADS, WIDTH, Story, Teller, keys_first, teller
from hookgraph_tests.families import binding_of, tokens

IDS = tokens(2, 6)
INSIDE = (ATTN_IN, ATTN_Q, ATTN_K, ATTN_V, ATTN_SCORES, ATTN_PATTERN, ATTN_Z, ATTN_OUT)


class Choir(nn.Module):
    """PyTorch's attention, causal, given positions first or not, with or without the weights it returns."""

    def __init__(self, *, batch_first: bool, weights: bool) -> None:
        super().__init__()
        self.voices = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.turned, self.weights = not batch_first, weights

    def forward(self, x: Tensor) -> Tensor:
        """What the voices add."""
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x.transpose(0, 1) if self.turned else x
        sung = self.voices(x, x, x, attn_mask=later, need_weights=self.weights)[0]
        return sung.transpose(0, 1) if self.turned else sung


class Song(Story):
    """A layer whose attention is PyTorch's."""

    def __init__(self, *, batch_first: bool, weights: bool) -> None:
        super().__init__(keys_first)
        self.heads = Choir(batch_first=batch_first, weights=weights)


class Encoded(Teller):
    """PyTorch's encoder between words and words."""

    def __init__(self) -> None:
        super().__init__(keys_first)
        del self.stories
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True, activation="gelu")
        self.tower = nn.TransformerEncoder(layer, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Logits for every position."""
        padding = None if attention_mask is None else attention_mask == 0
        x = self.tower(self.words(input_ids), src_key_padding_mask=padding)
        return CausalLMOutput(logits=self.say(self.end(x)))


def random(model: Teller) -> Teller:
    torch.manual_seed(0)
    for parameter in model.double().eval().parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def song(*, batch_first: bool, weights: bool) -> Teller:
    model = teller(keys_first)
    model.stories = nn.ModuleList(Song(batch_first=batch_first, weights=weights) for _ in range(2))
    return random(model)


@pytest.fixture(scope="module")
def encoded() -> HookGraph:
    return bind(random(Encoded()), cached=False)


@pytest.mark.parametrize(("batch_first", "weights"), [(True, False), (False, True)])
def test_the_inside_of_attention_that_pytorch_brings_is_there(batch_first: bool, weights: bool):
    graph = bind(song(batch_first=batch_first, weights=weights), check=False)
    run = graph.run(IDS, save=[kind[0] for kind in INSIDE])
    voices = binding_of(graph).model.get_submodule("stories.0.heads.voices")
    assert isinstance(voices, nn.MultiheadAttention)
    made = nn.functional.linear(run[ATTN_IN[0]], voices.in_proj_weight, voices.in_proj_bias)
    q, k, v = (x.unflatten(-1, (HEADS, -1)) for x in made.chunk(3, -1))
    factor = q.shape[-1] ** -0.5 if weights else 1.0  # with weights it scales queries before it multiplies
    torch.testing.assert_close(run[ATTN_Q[0]], q * factor)
    torch.testing.assert_close(run[ATTN_K[0]], k)
    torch.testing.assert_close(run[ATTN_V[0]], v)
    torch.testing.assert_close(run[ATTN_PATTERN[0]], run[ATTN_SCORES[0]].softmax(-1))
    z = torch.einsum("bhqk,bkhd->bqhd", run[ATTN_PATTERN[0]], v)
    torch.testing.assert_close(run[ATTN_Z[0]], z)
    torch.testing.assert_close(run[ATTN_OUT[0]], voices.out_proj(z.flatten(2)))


@pytest.mark.parametrize("added", ["bias_k", "zero"])
def test_keys_of_no_token_are_none_of_the_keys_and_the_last_columns_of_the_scores(added: str):
    model = song(batch_first=True, weights=True)
    for story in model.stories:
        more = {"add_bias_kv": added == "bias_k", "add_zero_attn": added == "zero"}
        story.heads.voices = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **more)
    graph = bind(random(model), cached=False)
    run = graph.run(IDS, save=[kind[0] for kind in INSIDE])
    voices = binding_of(graph).model.get_submodule("stories.0.heads.voices")
    made = nn.functional.linear(run[ATTN_IN[0]], voices.in_proj_weight, voices.in_proj_bias)  # pyright: ignore
    k, v = (x.unflatten(-1, (HEADS, -1)) for x in made.chunk(3, -1)[1:])
    torch.testing.assert_close(run[ATTN_K[0]], k)
    torch.testing.assert_close(run[ATTN_V[0]], v)
    assert run[ATTN_PATTERN[0]].shape == run[ATTN_SCORES[0]].shape == (2, HEADS, 6, 7)
    torch.testing.assert_close(graph.run(IDS, save=[ATTN_K[0].at(pos=-1)])[ATTN_K[0].at(pos=-1)], k[:, -1])
    zeroed = graph.hook(ATTN_V[0].at(pos=-1), torch.zeros_like).run(IDS, save=[ATTN_Z[0]])[ATTN_Z[0]]
    lost = torch.einsum("bhq,bhd->bqhd", run[ATTN_PATTERN[0]][..., 5], v[:, -1])
    torch.testing.assert_close(run[ATTN_Z[0]] - zeroed, lost)


def test_what_each_head_of_it_writes_is_absent_with_the_reason():
    with pytest.raises(Exception, match="no module is the output projection: the code that attends"):
        bind(song(batch_first=True, weights=False), check=False).check(ATTN_RESULT[0])


def test_an_edit_of_what_is_given_as_queries_keys_and_values_is_one_edit():
    graph = bind(song(batch_first=True, weights=False), check=False)
    given = graph.run(IDS, save=[ATTN_IN[0]])[ATTN_IN[0]]
    hooked = graph.hook(ATTN_IN[0], lambda x: 2 * x)
    run, plain = hooked.run(IDS, save=[ATTN_K[0]]), graph.run(IDS, save=[ATTN_K[0]])
    voices = binding_of(graph).model.get_submodule("stories.0.heads.voices")
    moved = nn.functional.linear(given, voices.in_proj_weight[WIDTH : 2 * WIDTH])  # pyright: ignore
    torch.testing.assert_close(run[ATTN_K[0]] - plain[ATTN_K[0]], moved.unflatten(-1, (HEADS, -1)))


def test_a_layer_of_pytorch_is_proven_and_is_left_as_it_was(encoded: HookGraph):
    assert encoded.report.ok, encoded.report
    kinds = {x.type for x in encoded.locations}
    assert {*INSIDE, RESID_PRE, RESID_MID, RESID_POST, MLP_POST} <= kinds
    model = binding_of(encoded).model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_beside_padding_a_layer_of_pytorch_computes_what_its_fast_path_does(encoded: HookGraph):
    """That leaves padding out, of nested tensors, which hooks inside would fail on."""
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    run = encoded.run({"input_ids": IDS, "attention_mask": mask}, save=[ATTN_PATTERN[1]])
    with torch.no_grad():
        expected = binding_of(encoded).model(IDS, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(run.logits[real], expected[real])
    assert not run[ATTN_PATTERN[1]][0, :, :, 4:].any()
