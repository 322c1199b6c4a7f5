"""Positions and steps across the passes of a generation, on every family."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hookgraph.binding import bind
from hookgraph.binding.running.positions import spans_of
from hookgraph.errors import LocationError
from hookgraph.hooks.positions import Span
from hookgraph.ontology.transformer import ATTN_PATTERN, RESID_POST
from hookgraph_tests.families import FAMILIES, bound, model_of, tokens
from hookgraph_tests.tiny import build

IDS = tokens(2, 6)
NEW = 6
MASK = torch.ones_like(IDS)
DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(0))


def logits_of(family: str, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """The logits of every generated token."""
    out = model_of(bound(family)).generate(
        **batch,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(out.logits)


def padded(left: tuple[int, int]) -> dict[str, Tensor]:
    """The two rows, each without its first tokens, padded on the left."""
    mask = (torch.arange(6) >= torch.tensor(left)[:, None]).long()
    return {"input_ids": IDS * mask, "attention_mask": mask}


@pytest.mark.parametrize("pos", [3, 8, [2, 9], slice(4, 8), slice(7, None)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_at_positions_is_the_same_with_and_without_a_cache(family: str, pos: Any):
    calls = list[int]()
    location = RESID_POST[1].at(pos=pos)
    graph = bound(family).hook(location, lambda x: calls.append(1) or x + DIRECTION)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    plain = logits_of(family, batch)
    found = list[Tensor]()
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        with graph.attached():
            found.append(logits_of(family, batch, **options))
    assert not torch.allclose(found[0], plain, rtol=1e-3, atol=1e-3)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("pos", [1, 6], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_of_each_row_whatever_its_padding(
    family: str, pos: int, implementation: str | None
):
    graph = bound(family).hook(RESID_POST[1].at(pos=pos), lambda x: x + DIRECTION)
    options = {} if implementation is None else {"cache_implementation": implementation}
    with graph.attached():
        together = logits_of(family, padded((0, 2)), **options)
        alone = [
            logits_of(family, {"input_ids": IDS[i : i + 1, cut:], "attention_mask": MASK[i : i + 1, cut:]})
            for i, cut in enumerate((0, 2))
        ]
    for row, expected in enumerate(alone):
        torch.testing.assert_close(together[:, row : row + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_counts_positions_of_each_row_too(family: str):
    graph = bound(family)
    here = RESID_POST[1].at(pos=2)
    run = graph.run(padded((0, 2)), save=[here])
    for row, cut in enumerate((0, 2)):
        alone = graph.run(IDS[row : row + 1, cut:], save=[here])
        torch.testing.assert_close(run[here][row : row + 1], alone[here], rtol=1e-4, atol=1e-5)
    with pytest.raises(LocationError, match="row 1 holds pos 0 to 3"):
        graph.run(padded((0, 2)), save=[RESID_POST[1].at(pos=4)])


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_count_passes_from_the_prefill(family: str, options: dict[str, Any]):
    widths = dict[str, list[int]]()
    graph = bound(family)
    for name, step in (("prefill", 0), ("some", [1, 3]), ("rest", slice(2, None))):
        seen = widths.setdefault(name, [])
        graph = graph.hook(RESID_POST[1].at(step=step), lambda x, seen=seen: seen.append(x.shape[1]))
    with graph.attached():
        for _ in range(2):  # a second generation counts anew
            for seen in widths.values():
                seen.clear()
            logits_of(family, {"input_ids": IDS, "attention_mask": MASK}, **options)
    whole = options.get("use_cache", True) is False
    passes = [6, *(6 + i if whole else 1 for i in range(1, NEW))]
    assert widths == {"prefill": passes[:1], "some": [passes[1], passes[3]], "rest": passes[2:]}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_counted_from_the_start_of_the_sequence(family: str):
    found = list[Tensor]()
    key = ATTN_PATTERN[1].at(key_pos=5, pos=slice(6, 8))
    graph = bound(family).hook(key, lambda x: found.append(x.clone()))
    with graph.attached():
        out = model_of(graph).generate(IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False)
        decoded = torch.cat(found, dim=-1)
    whole = graph.run(out[:, :-1], save=[key])[key]
    torch.testing.assert_close(decoded, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_step_0(family: str):
    graph = bound(family)
    never = graph.hook(RESID_POST[1].at(step=slice(1, None)), torch.zeros_like)
    assert torch.equal(never.run(IDS).logits, graph.run(IDS).logits)
    with pytest.raises(LocationError, match="a run is one pass, step 0"):
        graph.run(IDS, save=[RESID_POST[1].at(step=1)])


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 3}, {"penalty_alpha": None}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_under_hooks_that_change_nothing_is_what_it_was(family: str, options: dict[str, Any]):
    graph = bound(family)
    options = {"do_sample": False, **options}
    for location in (x for x in graph.locations if "scores" not in str(x) and "pattern" not in str(x)):
        graph = graph.hook(location.at(step=slice(1, None)), torch.clone)
    torch.manual_seed(0)
    plain = model_of(graph).generate(**padded((0, 2)), max_new_tokens=NEW, **options)
    torch.manual_seed(0)
    with graph.attached():
        assert torch.equal(model_of(graph).generate(**padded((0, 2)), max_new_tokens=NEW, **options), plain)


def test_a_mask_of_four_axes_needs_position_ids():
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[1, :, :, :2] = False
    ids = torch.zeros(2, 6, dtype=torch.long)
    numbers = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    found = spans_of({"input_ids": ids, "attention_mask": mask, "position_ids": numbers})
    assert found["decoder"] == Span(0, 6, (0, 2))
    with pytest.raises(LocationError, match="positions cannot be told from attention_mask"):
        spans_of({"input_ids": ids, "attention_mask": mask})


def test_a_mask_of_four_axes_tells_positions_where_every_row_begins_at_once():
    ids = torch.zeros(2, 3, dtype=torch.long)
    seen = torch.ones(3, 8).tril()[None, None].expand(2, 1, -1, -1).bool()
    for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, -1e9)):
        found = spans_of({"input_ids": ids[:, :1], "decoder_input_ids": ids, "decoder_attention_mask": mask})
        assert found["decoder"] == Span(0, 3)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_with_a_static_cache_have_positions(name: str):
    model = build("seq2seq", name)
    assert model.generation_config is not None
    model.generation_config.update(eos_token_id=None, decoder_start_token_id=0)
    graph, ids = bind(model), torch.arange(10, 24).view(2, 7)
    here, later = RESID_POST[1], RESID_POST[1].at(pos=2)
    edited = graph.hook(RESID_POST[0].at(pos=slice(2, None)), lambda x: 2 * x)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    dynamic, static = (
        edited.generate(ids, save=[here, later], **options, **more)
        for more in ({}, {"cache_implementation": "static"})
    )
    assert torch.equal(dynamic.tokens, static.tokens)
    for place in (here, later):
        torch.testing.assert_close(static[place], dynamic[place], rtol=1e-4, atol=1e-5)


def test_a_mask_as_wide_as_a_static_cache_tells_padding_where_there_are_no_position_ids():
    graph = bind(build("causal", "bloom"))
    rows, cut = torch.arange(10, 24).view(2, 7), 3
    mask = torch.ones_like(rows)
    mask[0, :cut] = 0
    batch = {"input_ids": rows * mask, "attention_mask": mask}
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for pos in (1, 5):
        here = RESID_POST[0].at(pos=pos)
        edited = graph.hook(here, lambda x: -x)
        alone = edited.generate(rows[:1, cut:], save=[here], **options)
        for more in ({}, {"cache_implementation": "static"}):
            together = edited.generate(batch, save=[here], **options, **more)
            torch.testing.assert_close(together[here][:1], alone[here], rtol=1e-4, atol=1e-4)
            assert torch.equal(together.tokens[0, cut:], alone.tokens[0])


def test_a_row_of_padding_alone_holds_no_position():
    graph, here = bound("llama"), RESID_POST[1].at(pos=0)
    for left, who in (((6, 6), "this pass holds no positions"), ((2, 6), "row 1 holds no pos")):
        with pytest.raises(LocationError, match=f"{who}, as its mask says that all is padding"):
            graph.run(padded(left), save=[here])


def test_stacks_beside_the_decoder_read_its_tokens_where_nothing_else_is_given():
    ids, mask = torch.zeros(1, 6, dtype=torch.long), torch.tensor([[0, 1, 1, 1, 1, 1]])
    text = {"input_ids": ids, "attention_mask": mask}
    assert spans_of(text)["encoder"] == spans_of(text)["decoder"] == Span(0, 6, (1,))
    assert "encoder" not in spans_of({**text, "input_features": torch.zeros(1, 6, 4)})


def test_an_encoder_and_a_decoder_have_spans_of_their_own():
    ids = torch.zeros(1, 6, dtype=torch.long)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    found = spans_of({"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :2]})
    assert found == {"decoder": Span(0, 2), "encoder": Span(0, 6, (1,))}
