"""Pictures one after another on one axis: towers without an axis for the batch, alone and beside text."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.binding import bind
from hookgraph.errors import InputError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import (
    ATTN_K,
    ATTN_Q,
    ATTN_RESULT,
    ATTN_V,
    ATTN_V_IN,
    ATTN_Z,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    VISION,
)
from hookgraph.ontology.weights import W_O
from hookgraph_tests.families import binding_of
from hookgraph_tests.tiny import build


@pytest.fixture(scope="module")
def tower() -> HookGraph:
    """A tower that is given the patches of pictures and a table of their sizes, proven."""
    return bind(build("base", "glm4v_vision"), cached=False)


def test_a_packed_stream_has_batch_and_positions_as_axes(tower: HookGraph):
    example = tower.binding.example
    run = tower.run(example, save=[RESID_PRE[0], RESID_MID[0], MLP_OUT[0], RESID_POST[0]])
    assert run[RESID_POST[0]].shape == (2, 16, 32)
    torch.testing.assert_close(run[RESID_MID[0]] + run[MLP_OUT[0]], run[RESID_POST[0]])


def test_an_edit_of_one_picture_leaves_the_other_as_it_is(tower: HookGraph):
    example = tower.binding.example

    def doubled(stream: torch.Tensor) -> torch.Tensor:
        return torch.cat([stream[:1], 2 * stream[1:]])

    plain = tower.run(example, save=[RESID_POST[1]])[RESID_POST[1]]
    edited = tower.hook(RESID_PRE[0], doubled).run(example, save=[RESID_POST[1]])[RESID_POST[1]]
    assert edited[0].equal(plain[0])
    assert not torch.isclose(edited[1], plain[1]).all()


def test_heads_of_a_packed_stream_attend_picture_by_picture(tower: HookGraph):
    run = tower.run(tower.binding.example, save=[ATTN_Q[0], ATTN_K[0], ATTN_V[0], ATTN_Z[0], ATTN_RESULT[0]])
    q, k, v, z = (run[kind[0]] for kind in (ATTN_Q, ATTN_K, ATTN_V, ATTN_Z))
    pattern = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(z, torch.einsum("bhqk,bkhd->bqhd", pattern, v), atol=1e-5, rtol=1e-4)
    wide = torch.einsum("bphd,hdm->bphm", z, tower.binding.weight(W_O, 0))
    torch.testing.assert_close(run[ATTN_RESULT[0]], wide)


def test_an_edit_of_the_heads_of_one_picture_leaves_the_other_as_it_is(tower: HookGraph):
    example = tower.binding.example
    plain = tower.run(example, save=[RESID_POST[0]])[RESID_POST[0]]
    for kind in (ATTN_Q, ATTN_V, ATTN_V_IN, ATTN_RESULT):
        hooked = tower.hook(kind[0], lambda x: torch.cat([x[:1], 2 * x[1:]]))
        edited = hooked.run(example, save=[RESID_POST[0]])[RESID_POST[0]]
        torch.testing.assert_close(edited[0], plain[0])
        assert not torch.allclose(edited[1], plain[1])


def test_examples_end_to_end_in_one_row_are_told_apart():
    graph = bind(build("base", "pixtral"), cached=False)
    run = graph.run(graph.binding.example, save=[RESID_POST[1]])
    assert run[RESID_POST[1]].shape == (2, 16, 32)
    assert run.logits.shape == (1, 32, 32)
    assert "there are two examples" in graph.report.absent[ATTN_Q[0]]


@pytest.fixture(scope="module")
def qwen() -> HookGraph:
    """A model that reads text with pictures among it, in double precision, proven."""
    return bind(build("image-text", "qwen2_vl").double(), cached=False)


def with_sizes(example: dict[str, Any], sizes: list[list[int]]) -> dict[str, Any]:
    """Text with pictures of other sizes; each takes a place for four patches, and a word follows it."""
    table, count = torch.tensor(sizes), len(example["input_ids"])
    token = 126
    assert token in example["input_ids"]
    pictures = [torch.tensor([token] * (int(n) // 4) + [40 + i]) for i, n in enumerate(table.prod(-1))]
    each = len(pictures) // count
    rows = [torch.cat(pictures[i * each : (i + 1) * each]) for i in range(count)]
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([row, torch.zeros(longest - len(row)).long()]) for row in rows])
    mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in rows])
    generator = torch.Generator().manual_seed(3)
    patches = torch.randn(int(table.prod(-1).sum()), 384, generator=generator, dtype=torch.float64)
    text = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == token).long()}
    return {**text, "pixel_values": patches, "image_grid_thw": table}


def test_a_tower_beside_text_is_bound_with_pictures_that_bind_makes(qwen: HookGraph):
    assert qwen.report.ok
    assert [qwen.binding.layers(stack) for stack in ("decoder", "vision")] == [2, 2]
    example = qwen.binding.example
    run = qwen.run(example, save=[VISION.RESID_POST[1], RESID_POST[1]])
    assert run[VISION.RESID_POST[1]].shape == (2, 16, 32)
    assert run[RESID_POST[1]].shape == (*example["input_ids"].shape, 32)


def test_what_is_read_and_edited_in_the_tower_is_what_hooks_by_hand_see(qwen: HookGraph):
    example, model = qwen.binding.example, qwen.binding.model
    layer = model.get_submodule("model.visual.blocks.1")
    seen: list[Tensor] = []

    def by_hand(module: nn.Module, args: object, output: Tensor) -> Tensor:
        seen.append(output)
        changed = output.clone()
        changed[16:] *= 2  # the second picture
        return changed

    handle = layer.register_forward_hook(by_hand)
    expected = model(**example).logits
    handle.remove()

    def second(stream: Tensor) -> Tensor:
        return torch.cat([stream[:1], 2 * stream[1:]])

    place = VISION.RESID_POST[1]
    assert qwen.run(example, save=[place])[place].flatten(0, 1).equal(seen[0])
    edited = qwen.hook(place, second).run(example).logits
    assert edited.equal(expected)
    plain = qwen.run(example).logits
    assert edited[0].equal(plain[0])
    assert not torch.isclose(edited[1], plain[1]).all()


def test_effects_of_a_tower_are_those_of_one_pass_for_each(qwen: HookGraph):
    clean = qwen.binding.example
    corrupt = {**clean, "pixel_values": clean["pixel_values"].flip(0)}
    nodes = [VISION.MLP_OUT[0], VISION.RESID_POST[1].at(pos=3), MLP_OUT[0]]

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 11] - logits[:, -1, 40]

    def brute(node: Any) -> Tensor:
        value = qwen.run(corrupt, save=[node])[node]
        return metric(qwen.hook(node, lambda _: value).run(clean).logits) - metric(qwen.run(clean).logits)

    expected = torch.stack([brute(node) for node in nodes])
    assert bool((expected.abs() > 1e-9).any(1).all())
    for rows in (2, 3, 256):
        found = exact_effects(qwen, clean, corrupt, metric, nodes, batch_size=rows)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    whole = patching_effect(qwen, clean, corrupt, metric, [VISION.RESID_POST[1]], "exact").effects
    assert whole[VISION.RESID_POST[1]].shape[:2] == (2, 16)


def test_several_pictures_of_an_example_lie_on_one_axis_of_positions(qwen: HookGraph):
    example = with_sizes(dict(qwen.binding.example), [[1, 4, 4], [1, 2, 4], [1, 2, 4], [1, 4, 4]])
    run = qwen.run(example, save=[VISION.RESID_PRE[0]])
    assert run[VISION.RESID_PRE[0]].shape == (2, 24, 32)
    alone = {k: v[:1] for k, v in example.items() if k not in ("pixel_values", "image_grid_thw")}
    alone |= {"pixel_values": example["pixel_values"][:24], "image_grid_thw": example["image_grid_thw"][:2]}
    torch.testing.assert_close(qwen.run(alone).logits, run.logits[:1])


def test_pictures_of_several_sizes_have_no_axis_for_the_batch(qwen: HookGraph):
    example = with_sizes(dict(qwen.binding.example), [[1, 4, 4], [1, 4, 8]])
    assert qwen.run(example, save=[RESID_POST[0]])[RESID_POST[0]].isfinite().all()  # of the text
    with pytest.raises(InputError, match=r"16, 32 patches, by image_grid_thw.*as many patches"):
        qwen.run(example, save=[VISION.RESID_POST[0]])


def test_pictures_that_generate_looks_at_before_its_passes_belong_to_its_examples(qwen: HookGraph):
    inputs = {k: v for k, v in qwen.binding.example.items() if k != "use_cache"}
    one = {k: v[: len(v) // 2] for k, v in inputs.items()}
    place = VISION.RESID_POST[1]
    hooked = qwen.hook(place, lambda stream: 3 * stream)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    both, alone = (hooked.generate(x, save=[place], **options) for x in (inputs, one))
    assert both.tokens[:1].equal(alone.tokens)
    torch.testing.assert_close(both[place][:1], alone[place])
    with qwen.hook(place, lambda stream: 3 * stream).attached():
        qwen.binding.model(**one)  # its one example is not that of what comes next
        with pytest.raises(InputError, match=r"outside of a pass.*use graph.generate"):
            qwen.binding.model.generate(**inputs, **options)


def test_arguments_by_position_are_counted_by_their_names(tower: HookGraph, qwen: HookGraph):
    seen: list[tuple[int, ...]] = []
    example = tower.binding.example
    with tower.hook(RESID_POST[0], lambda x: seen.append(tuple(x.shape))).attached(), torch.no_grad():
        tower.binding.model(example["hidden_states"], example["grid_thw"])
    both = dict(qwen.binding.example)
    with qwen.hook(VISION.RESID_POST[0], lambda x: seen.append(tuple(x.shape))).attached(), torch.no_grad():
        qwen.binding.model(both.pop("input_ids"), **both)
    assert seen == [(2, 16, 32)] * 2


def test_an_example_whose_pictures_have_other_sizes_is_refused(qwen: HookGraph):
    example = with_sizes(dict(qwen.binding.example), [[1, 4, 4], [1, 4, 8]])
    with pytest.raises(InputError, match="16, 32 patches, by image_grid_thw"):
        bind(qwen.binding.model, example=example)


def test_a_text_as_long_as_there_are_patches_is_not_packed(qwen: HookGraph):
    example = dict(qwen.binding.example)
    filling = torch.full((2, 32 - example["input_ids"].shape[1]), 20)
    text = {
        "input_ids": filling,
        "attention_mask": torch.ones_like(filling),
        "mm_token_type_ids": 0 * filling,
    }
    example |= {k: torch.cat([example[k], more], 1) for k, more in text.items()}
    graph = bind(qwen.binding.model, example=example, check=False)
    assert binding_of(graph).findings.packed == ["vision"]
