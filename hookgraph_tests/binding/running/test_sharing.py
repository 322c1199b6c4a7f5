"""Copies of a batch attend to one past, and come out as if each had one of its own."""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hookgraph.binding import bind
from hookgraph.binding.proving import shared
from hookgraph.binding.proving.shared import check_shared
from hookgraph.binding.running import sharing
from hookgraph.binding.running.sharing import SHARED, TOGETHER, SharedPast, attending, side_by_side
from hookgraph.errors import BindingError
from hookgraph.graph.abstract import Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import (
    ATTN_K,
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Q,
    ATTN_RESULT,
    ATTN_SCORES,
    ATTN_V,
    ATTN_Z,
    LOGITS,
)
from hookgraph_tests.families import FAMILIES, binding_of, bound, build, tokens

START = 3
COPIES = TOGETHER // 2 + 2
"""More than stand side by side, of two positions each."""


def copies_of(graph: HookGraph, last: int, copies: int = COPIES) -> Prepared:
    """The last positions of copies of a batch of two with other tokens in each, and one past."""
    ids = tokens()
    rest = graph.remember(ids, ids.shape[1] - last)
    assert rest is not None
    inputs = dict(graph.binding.prepare(dict(rest), copies=copies))
    generator = torch.Generator().manual_seed(5)
    inputs["input_ids"] = torch.randint(1, 11, (copies * len(ids), last), generator=generator)
    return inputs


def unshared(graph: HookGraph):
    """A past of its own for each copy."""
    return patch.object(type(graph.binding), "_past", return_value=None)


def assert_equal(a: Run, b: Run):
    assert a.keys() == b.keys()
    for x in a:
        assert a[x].shape == b[x].shape
        assert torch.allclose(a[x], b[x], rtol=0, atol=1e-6 * float(b[x].abs().max())), x


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("last", [1, 2])
def test_copies_that_share_a_past_come_out_as_with_one_each(family: str, last: int):
    graph = bound(family, torch.float64)
    inputs = copies_of(graph, last)
    with unshared(graph):
        expected = graph.run(inputs, save=[ATTN_OUT[0], LOGITS])
    with patch.object(SharedPast, "attend", autospec=True, side_effect=SharedPast.attend) as attend:
        found = graph.run(inputs, save=[ATTN_OUT[0], LOGITS])
    assert attend.call_count == len(attending(binding_of(graph).findings)) == 3
    assert_equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [ATTN_Q, ATTN_K, ATTN_V, ATTN_SCORES, ATTN_PATTERN, ATTN_Z, ATTN_RESULT])
def test_locations_inside_are_seen_and_edited_alike(family: str, kind: Any):
    graph = bound(family, torch.float64)
    inputs = copies_of(graph, 2)
    edited = graph.hook(kind[1], lambda x: x * torch.linspace(0.5, 1.5, len(x)).to(x).view(-1, 1, 1, 1))
    saved = [kind[1], LOGITS]
    with unshared(graph):
        expected = edited.run(inputs, save=saved)
    assert_equal(edited.run(inputs, save=saved), expected)


def test_no_keys_and_values_are_copied():
    graph = bound("llama", torch.float64)
    inputs = copies_of(graph, 1)
    lengths = set[int]()
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def seeing(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.add(key.shape[0] * key.shape[2])
        return sdpa(module, query, key, *args, **kwargs)

    with patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {"sdpa": seeing}):  # pyright: ignore
        graph.run(inputs)
        batch, past = 2, tokens().shape[1] - 1
        assert lengths == {batch * (past + COPIES)}
        with unshared(graph):
            graph.run(inputs)
    assert lengths == {batch * (past + COPIES), batch * COPIES * (past + 1)}


def test_attention_gets_its_configuration_back_after_an_error():
    graph = bound("gpt2", torch.float64)
    model = binding_of(graph).model
    inputs, before = copies_of(graph, 1), [vars(m).get("config") for m in model.modules()]

    def failing(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        graph.hook(ATTN_Z[1], failing).run(inputs)
    assert all(a is b for a, b in zip(before, (vars(m).get("config") for m in model.modules()), strict=True))
    assert graph.run(inputs).logits.isfinite().all()


def test_a_kernel_that_takes_no_mask_is_given_the_past_for_each_copy():
    graph = bound("llama", torch.float64)
    inputs = copies_of(graph, 1)
    expected = graph.run(inputs, save=[ATTN_Z[0], LOGITS])
    with (
        patch.object(sharing, "MASKED", frozenset[str]()),
        patch("hookgraph.binding.running.attention.MASKED", frozenset[str]()),
        patch.object(SharedPast, "attend", side_effect=AssertionError("shared")),
    ):
        assert_equal(graph.run(inputs, save=[ATTN_Z[0], LOGITS]), expected)


def test_with_gradients_each_copy_has_a_past_of_its_own():
    graph = bound("llama", torch.float64)
    inputs = copies_of(graph, 1)
    with patch.object(SharedPast, "attend", side_effect=AssertionError("shared")):
        assert graph.run(inputs, grad=True).logits.requires_grad


def test_nothing_is_shared_that_is_not_proven():
    graph = bind(build("gpt2"), check=False)
    inputs = copies_of(graph, 1)
    with patch.object(SharedPast, "attend", side_effect=AssertionError("shared")):
        assert graph.run(inputs).logits.isfinite().all()


def blind(mask: Tensor, copies: int, past: int) -> Tensor:
    """A mask that hides no copy from another."""
    made = side_by_side(mask, copies, past)
    return torch.ones_like(made) if made.dtype == torch.bool else torch.zeros_like(made)


def example() -> Mapping[str, Tensor]:
    return {"input_ids": tokens()[:1]}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_proof_notices_copies_that_see_each_other(family: str):
    graph = bound(family, torch.float64)
    places: list[Location] = graph.every(ATTN_PATTERN)
    assert all(graph.report.proves(x, SHARED) for x in places)
    with patch.object(sharing, "side_by_side", blind):
        proofs, gaps = check_shared(binding_of(graph), example(), places)
    assert not proofs
    assert {gap.location for gap in gaps} == set(places)
    assert all("share a past" in gap.reason for gap in gaps)


def test_what_cannot_be_run_is_a_gap():
    graph = bound("gpt2", torch.float64)
    with patch.object(SharedPast, "attend", side_effect=ZeroDivisionError):
        proofs, gaps = check_shared(binding_of(graph), example(), graph.every(ATTN_PATTERN))
    assert not proofs
    assert len(gaps) == 3


def test_of_too_few_positions_nothing_is_said():
    graph = bound("gpt2", torch.float64)
    few = {"input_ids": tokens()[:1, : max(shared.LAST) + 1]}
    assert check_shared(binding_of(graph), few, graph.every(ATTN_PATTERN)) == ([], [])


def test_keys_that_went_astray_are_reported():
    past, states = SharedPast(2), torch.zeros(1, 2, 3, 4)
    past.update((states, states), states[:, :, :1], states[:, :, :1])
    with pytest.raises(BindingError, match="not given the keys that its cache handed back"):
        past.holds(states[:, :, :1])


@given(
    copies=st.integers(1, 4),
    past=st.integers(1, 5),
    length=st.integers(1, 3),
    boolean=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_copy_sees_the_past_and_itself(copies: int, past: int, length: int, boolean: bool, seed: int):
    generator = torch.Generator().manual_seed(seed)
    cells = torch.rand(2 * copies, 1, length, past + length, generator=generator, dtype=torch.float64)
    mask = cells > 0.5 if boolean else cells
    made = side_by_side(mask, copies, past)
    assert made.shape == (2, 1, copies * length, past + copies * length)
    hidden = ~made if boolean else made < -1e30
    for i, own in enumerate(mask.split(2)):
        here = slice(i * length, (i + 1) * length)
        there = slice(past + i * length, past + (i + 1) * length)
        assert torch.equal(made[:, :, here, :past], own[..., :past])
        assert torch.equal(made[:, :, here, there], own[..., past:])
        others = torch.ones(made.shape[-1], dtype=torch.bool)
        others[:past], others[there] = False, False
        assert hidden[:, :, here][..., others].all()


@pytest.mark.parametrize("rows", [1, 2 * COPIES])
def test_a_mask_of_each_copy_is_its_own(rows: int):
    """Sparse attention chooses keys query by query."""
    generator = torch.Generator().manual_seed(0)
    past, length, batch = 4, 2, 2
    shape = (batch * COPIES, 3, length, 8)
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    old = [torch.randn(batch, 3, past, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    mask = torch.rand(rows, 1, length, past + length, generator=generator) > 0.3
    mask[..., 0] = True
    whole = [torch.cat((a.repeat(COPIES, 1, 1, 1), b), 2) for a, b in zip(old, (key, value), strict=True)]
    expected = nn.functional.scaled_dot_product_attention(query, *whole, attn_mask=mask).transpose(1, 2)
    shared = SharedPast(COPIES)
    shared.update((old[0], old[1]), key, value)
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    found = shared.attend(function, nn.Identity(), query, key, value, mask)[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_a_cache_of_the_model_itself_is_left_alone():
    graph = bound("llama", torch.float64)
    ids, cache = tokens(), DynamicCache(config=binding_of(graph).model.config)
    with torch.no_grad():
        whole = binding_of(graph).model(ids).logits
        binding_of(graph).model(ids[:, :START], past_key_values=cache)
    inputs = graph.binding.prepare({"input_ids": ids[:, START:], "past_key_values": cache}, copies=3)
    found = graph.run(inputs).logits
    assert torch.allclose(found, whole[:, START:].repeat(3, 1, 1), rtol=0, atol=1e-9)
    assert cache.get_seq_length() == START
