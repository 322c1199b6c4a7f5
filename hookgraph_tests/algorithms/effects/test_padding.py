"""In a left-padded batch a named position counts tokens of each row, an axis of effects counts columns."""

import pytest
import torch
from torch import Tensor

from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import ATTN_Z, RESID_POST
from hookgraph.ontology.locations import Location
from hookgraph_tests.families import bound, tokens

METRIC = logit_diff(3, 5)


def padded(ids: Tensor) -> dict[str, object]:
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def graph() -> HookGraph:
    return bound("gpt2", torch.float64)


def by_hand(node: Location) -> Tensor:
    clean, corrupt = padded(tokens()), padded(tokens().flip(0))
    other = graph().run(corrupt, save=[node])[node]
    after = graph().hook(node, lambda _: other).run(clean, metric=METRIC).metric
    before = graph().run(clean, metric=METRIC).metric
    assert after is not None
    assert before is not None
    return after - before


@pytest.mark.parametrize(
    "node",
    [
        ATTN_Z[1].at(head=2, pos=1),
        ATTN_Z[1].at(head=2, pos=-1),
        RESID_POST[0].at(pos=[0, 2]),
        RESID_POST[0].at(pos=slice(1, 3)),
    ],
    ids=str,
)
def test_exact_patching_counts_tokens_of_each_row(node: Location):
    clean, corrupt = padded(tokens()), padded(tokens().flip(0))
    (found,) = exact_effects(graph(), clean, corrupt, METRIC, [node])
    assert torch.allclose(found, by_hand(node), rtol=0, atol=1e-12)
    effect = patching_effect(graph(), clean, corrupt, METRIC, [node], "exact", joint=node.dims[1:])
    assert torch.allclose(effect.effects[node], by_hand(node), rtol=0, atol=1e-12)


def test_the_position_axis_of_effects_counts_columns():
    clean, corrupt = padded(tokens()), padded(tokens().flip(0))
    effect = patching_effect(graph(), clean, corrupt, METRIC, [RESID_POST[0]], "exact", joint=["d_model"])
    length = tokens().shape[1]
    other = graph().run(corrupt, save=[RESID_POST[0]])[RESID_POST[0]]
    before = graph().run(clean, metric=METRIC).metric
    for column in range(2, length):

        def put(x: Tensor, column: int = column) -> Tensor:
            x[:, column] = other[:, column]
            return x

        after = graph().hook(RESID_POST[0], put).run(clean, metric=METRIC).metric
        assert after is not None
        assert before is not None
        found = effect.effects[RESID_POST[0]][:, column]
        assert torch.allclose(found, after - before, rtol=0, atol=1e-12)
    for node in effect.mean("batch").check(top=3):
        assert node.exact == pytest.approx(node.effect, abs=1e-12)
