"""Attention in code of a model's own: its products, its softmax, its fused attention."""

from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hookgraph import HookGraph, bind
from hookgraph.binding.running.huggingface import HuggingFaceBinding
from hookgraph.binding.running.kernels import other_kernel
from hookgraph.errors import BindingError
from hookgraph.ontology.locations import LocationType
from hookgraph.ontology.transformer import (
    ATTN_IN,
    ATTN_K,
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Q,
    ATTN_RESULT,
    ATTN_SCORES,
    ATTN_V,
    ATTN_Z,
)
from hookgraph_tests.binding.test_hand_written import (
    HEADS,
    Attention,
    Heads,
    head_by_head,
    joined,
    softmax,
    teller,
)
from hookgraph_tests.families import binding_of, tokens
from hookgraph_tests.tiny import build

IDS = tokens(2, 6)
EVERY = (ATTN_Q, ATTN_K, ATTN_V, ATTN_SCORES, ATTN_PATTERN, ATTN_Z)
OWN = ("gptj", "gpt_neox_japanese", "mvp", "falcon", "openai-gpt")
"""Rotary heads; a product of three axes; a softmax of three axes; a fused attention; keys turned round."""


@pytest.fixture(scope="module", params=OWN)
def graph(request: pytest.FixtureRequest) -> HookGraph:
    return bind(build("causal", request.param).double(), check=False)


def module_of(graph: HookGraph, kind: LocationType) -> torch.nn.Module:
    assert isinstance(graph.binding, HuggingFaceBinding)
    return graph.binding.model.get_submodule(graph.binding.findings.anchors[kind[0]].module)


def test_queries_and_keys_make_the_scores_and_these_the_pattern_and_z(graph: HookGraph):
    run = graph.run(IDS, save=[kind[0] for kind in EVERY])
    q, k, v, scores, pattern, z = (run[kind[0]] for kind in EVERY)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    made = torch.einsum("bqhd,bkhd->bhqk", q, k.expand_as(q))[..., seen]
    scale = (made * scores[..., seen]).sum() / made.square().sum()
    assert min(abs(scale - 1), abs(scale - q.shape[-1] ** -0.5)) < 1e-5
    torch.testing.assert_close(scores[..., seen], scale * made, atol=1e-5, rtol=0, check_dtype=False)
    torch.testing.assert_close(pattern, scores.softmax(-1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(z, torch.einsum("bhqk,bkhd->bqhd", pattern, v.expand_as(q)))


def test_what_hooks_compute_themselves_is_not_taken_for_the_models_own(graph: HookGraph):
    def computing(value: Tensor) -> Tensor:
        turned = (value.flatten(2).mT @ value.flatten(2).nan_to_num()).softmax(-1)
        return value + 0 * turned.nan_to_num().sum()

    asked = [ATTN_Q[0], ATTN_K[0], ATTN_SCORES[0], ATTN_RESULT[0], ATTN_OUT[0]]
    hooked = graph
    for location in asked:
        hooked = hooked.hook(location, computing)
    run, plain = hooked.run(IDS, save=asked), graph.run(IDS, save=asked)
    for location in asked:
        torch.testing.assert_close(run[location], plain[location])


@pytest.mark.parametrize("graph", OWN[:-1], indirect=True)
def test_an_edit_of_new_keys_is_in_the_cache(graph: HookGraph):
    """Generated with a cache or without one: the same tokens, and the same keys at every step."""
    edited = graph.hook(ATTN_K[0], lambda k: k * 1.5).hook(ATTN_V[0], lambda v: v - 0.5)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    cached = edited.generate(IDS, save=[ATTN_OUT[0]], use_cache=True, **options)
    whole = edited.generate(IDS, save=[ATTN_OUT[0]], use_cache=False, **options)
    assert torch.equal(cached.tokens, whole.tokens)
    for step, other in zip(cached.steps, whole.steps, strict=True):
        torch.testing.assert_close(step[ATTN_OUT[0]][:, -1], other[ATTN_OUT[0]][:, -1], atol=1e-5, rtol=0)


def test_hooks_of_others_that_compute_inside_are_noticed():
    graph = bind(build("causal", "gptj"), check=False)
    module = module_of(graph, ATTN_SCORES)
    inside = next(m for m in module.modules() if isinstance(m, torch.nn.Linear))
    handle = inside.register_forward_hook(lambda m, args, output: output + 0 * (output @ output.mT).sum())
    why = r"attn.q\[0\] as it did when it was bound: it calls matrix product 3 times, not 2: remove hooks"
    with pytest.raises(BindingError, match=why):
        graph.run(IDS, save=[ATTN_Q[0]], metric=lambda x: x[:, 0, 0])
    handle.remove()
    assert graph.run(IDS, save=[ATTN_Q[0]])[ATTN_Q[0]].shape == (2, 6, 4, 8)


def test_axes_of_a_mask_put_in_another_order_are_no_product():
    graph = bind(build("causal", "xlnet"), check=False)
    masks: tuple[dict[str, Tensor], ...] = ({}, {"attention_mask": torch.ones_like(IDS)})
    plain, masked = (graph.run({"input_ids": IDS, **mask}, save=[ATTN_Z[0]])[ATTN_Z[0]] for mask in masks)
    torch.testing.assert_close(plain, masked)


def plain(own: Heads, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(softmax(q @ k.mT) @ v)


def fused(own: Heads, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(scaled_dot_product_attention(q, k, v, is_causal=True))


def in_three_axes(own: Heads, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return joined((softmax(q @ k.mT) @ v).unflatten(0, (-1, HEADS)))


def with_more(own: Heads, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(own, x, q, k, v) + 0 * (x @ x.mT).sum()


CHANGED: dict[str, tuple[Attention, Attention, str]] = {
    "another kernel": (plain, fused, "it calls no softmax now, as with another attn_implementation: bind it"),
    "other axes": (plain, in_three_axes, "it has 3 axes there, not 4: bind the model on an example like"),
    "more": (plain, head_by_head, "it calls softmax 4 times, not 1: remove hooks of others that compute"),
}


@pytest.mark.parametrize(("before", "after", "why"), CHANGED.values(), ids=CHANGED)
def test_code_that_attends_in_another_way_than_when_it_was_bound_is_refused(
    before: Attention, after: Attention, why: str
):
    model = teller(before)
    graph = bind(model, check=False)
    assert graph.run(IDS, save=[ATTN_PATTERN[0]])[ATTN_PATTERN[0]].shape == (2, HEADS, 6, 6)
    cast(Heads, model.get_submodule("stories.0.heads")).attend = after
    with pytest.raises(BindingError, match=rf"Heads does not compute attn.pattern\[0\] as it did .*: {why}"):
        graph.run(IDS, save=[ATTN_PATTERN[0]], metric=lambda x: x[:, 0, 0])


def test_code_that_multiplies_less_often_than_when_it_was_bound_is_refused():
    model = teller(with_more)
    graph = bind(model, check=False)
    cast(Heads, model.get_submodule("stories.0.heads")).attend = plain
    with pytest.raises(BindingError, match="it calls matrix product 2 times, not 3: bind the model on an"):
        graph.run(IDS, save=[ATTN_Z[0], ATTN_K[0]], metric=lambda x: x[:, 0, 0])


def test_hooks_of_others_on_the_module_itself_see_what_it_returns_and_are_not_counted():
    graph = bind(build("causal", "gptj"), check=False)
    seen: list[Tensor] = []

    def beside(module: torch.nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
        seen.append((output[0] @ output[0].mT).softmax(-1))

    handle = module_of(graph, ATTN_SCORES).register_forward_hook(beside)
    run = graph.run(IDS, save=[ATTN_SCORES[0]], metric=lambda x: x[:, 0, 0])
    handle.remove()
    assert len(seen) == 1
    assert torch.equal(run[ATTN_SCORES[0]], graph.run(IDS, save=[ATTN_SCORES[0]])[ATTN_SCORES[0]])


def trained(*, checkpointed: bool) -> HookGraph:
    model = build("causal", "gptj").double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return (
        bind(model.train(), check=False)
        .hook(ATTN_SCORES[1], lambda x: 2 * x)
        .hook(ATTN_K[0], lambda k: k + 1)
    )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_own_code_of_checkpointed_layers_runs_again_with_its_edits():
    asked = [ATTN_SCORES[0], ATTN_Z[1], ATTN_Q[0].grad, ATTN_V[1].grad, ATTN_SCORES[1].grad]
    found, expected = (
        trained(checkpointed=x).run(IDS, save=asked, metric=lambda x: x[:, -1, 0]) for x in (True, False)
    )
    for location in asked:
        torch.testing.assert_close(found[location], expected[location])


def test_pieces_that_attend_each_alone_are_read_and_edited_as_a_whole():
    """Pictures of different examples lie in one row, which is split."""
    graph = bind(build("base", "glm4v_vision").double(), check=False)
    example = binding_of(graph).example
    asked = [kind[0] for kind in (ATTN_Q, ATTN_K, ATTN_V, ATTN_Z)]
    q, k, v, z = graph.run(example, save=asked).values()
    pattern = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(z, torch.einsum("bhqk,bkhd->bqhd", pattern, v))
    other = graph.hook(ATTN_K[0].at(batch=1), lambda k: 3 * k).run(example, save=asked)[ATTN_Z[0]]
    torch.testing.assert_close(other[0], z[0])
    assert not torch.allclose(other[1], z[1])


@pytest.mark.filterwarnings("error")
def test_a_pass_that_ends_before_attention_begins_leaves_nothing_behind():
    graph = bind(build("causal", "gptj"), check=False)
    hooked = graph.hook(ATTN_SCORES[1], lambda x: x)
    plain = graph.run(IDS, save=[ATTN_IN[1]])
    assert torch.equal(hooked.run(IDS, save=[ATTN_IN[1]])[ATTN_IN[1]], plain[ATTN_IN[1]])


def test_scores_that_are_a_sum_of_products_have_no_queries():
    """Of content and of position: each product has queries of its own, the values are those of all."""
    graph = bind(build("causal", "xlnet"), check=False)
    kinds = {x.type for x in graph.locations}
    assert ATTN_V in kinds
    assert ATTN_Q not in kinds


def test_a_fused_attention_is_looked_into_whichever_kernel_the_model_is_told_to_use():
    model = build("causal", "falcon").double()
    graph = bind(model, cached=False)
    assert graph.report.ok
    run = graph.run(IDS, save=[ATTN_PATTERN[0], ATTN_K[0]])
    with other_kernel(model), torch.no_grad():
        expected = model(IDS, output_attentions=True).attentions[0]
        again = graph.run(IDS, save=[ATTN_PATTERN[0], ATTN_K[0]])
    torch.testing.assert_close(run[ATTN_PATTERN[0]], expected)
    for location, value in run.items():
        torch.testing.assert_close(again[location], value)
