"""Several token ids at each position, as text beside what is heard with it."""

import re

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from hookgraph.binding import bind
from hookgraph.errors import InputError
from hookgraph.ontology.transformer import ATTN_Z, LOGITS, RESID_POST
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM


class PliedLoom(LoomForCausalLM):
    """A loom of which each thread is spun of several."""

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids).sum(2)
        for row in self.cloth:
            cloth = row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth)))


def test_where_the_example_has_several_ids_at_each_position_so_have_all_inputs():
    torch.manual_seed(0)
    model = PliedLoom(LoomConfig(echo=False, rows=2, threads=8, shuttles=2, dyes=8)).eval()
    ids = torch.randint(0, 48, (2, 7, 3))
    graph = bind(model, example={"input_ids": ids}, cached=False)
    assert {ATTN_Z[0], RESID_POST[1], LOGITS} <= set(graph.locations)
    assert torch.equal(graph.run(ids).logits, model(ids).logits)
    changed = graph.hook(RESID_POST[0], lambda cloth: cloth + 1.0).run(ids, save=[RESID_POST[0]])
    assert changed[RESID_POST[0]].shape == (2, 7, 8)
    with pytest.raises(InputError, match=re.escape("(batch, pos, ids of each position), not (2, 7)")):
        graph.run(ids[..., 0])
