"""Layers that do not add to what they are given: the stream begins in them anew."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_outputs import CausalLMOutput

from hookgraph.binding import bind
from hookgraph.errors import BindingError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import ATTN_OUT, MLP_OUT, RESID_MID, RESID_POST, RESID_PRE
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM, Row
from hookgraph_tests.tiny import build, example_of

TOKENS = torch.arange(12).view(2, 6) + 8


class Taste(nn.Module):
    """Weighs the cloth and earlier pieces at each position by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(width))

    def forward(self, cloth: Tensor, pieces: Tensor | None) -> Tensor:
        """A mean of them."""
        own = cloth[:, :, None]
        pieces = own if pieces is None else torch.cat([pieces, own], dim=2)
        query = self.query.expand(*cloth.shape[:2], 1, -1)
        return scaled_dot_product_attention(query, pieces, pieces)[:, :, 0]


class QuiltedRow(Row):
    """A layer whose MLP reads a mean of the cloth and of earlier pieces."""

    def __init__(self, config: LoomConfig, *, anew: bool) -> None:
        super().__init__(config)
        self.anew = anew
        self.taste = Taste(config.threads)

    def forward(self, cloth: Tensor, pieces: Tensor | None = None) -> Tensor:
        """Begin a new piece, or go on with one."""
        woven = self.weft(self.before(cloth))
        woven = woven if self.anew else cloth + woven
        return woven + self.dye(self.between(self.taste(woven, pieces)))


class Quilt(LoomForCausalLM):
    """A loom whose rows work on pieces of cloth; what was woven before a new piece is kept beside it."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.cloth = nn.ModuleList(QuiltedRow(config, anew=n == 1) for n in range(config.rows))

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth, pieces = self.spool(input_ids), None
        for row in self.cloth:
            given, cloth = cloth, row(cloth, pieces)
            pieces = given[:, :, None] if row.anew else pieces
        whole = cloth if pieces is None else cloth + pieces.sum(2)
        return CausalLMOutput(logits=self.label(self.hem(whole)))


@pytest.fixture(scope="module")
def quilt() -> HookGraph:
    """Three rows, the second of which begins a new piece."""
    torch.manual_seed(0)
    return bind(Quilt(LoomConfig(echo=False)).double().eval(), cached=False)


def test_a_layer_that_begins_anew_is_the_sum_of_its_updates_alone(quilt: HookGraph):
    assert quilt.report.ok
    kinds = (RESID_PRE, ATTN_OUT, RESID_MID, MLP_OUT, RESID_POST)
    assert all([x.layer for x in quilt.every(kind)] == [0, 1, 2] for kind in kinds)
    run = quilt.run({"input_ids": TOKENS}, save=quilt.locations)
    assert torch.equal(run[RESID_MID[1]], run[ATTN_OUT[1]])
    torch.testing.assert_close(run[RESID_POST[1]], run[ATTN_OUT[1]] + run[MLP_OUT[1]])
    torch.testing.assert_close(run[RESID_MID[2]], run[RESID_PRE[2]] + run[ATTN_OUT[2]])
    proven = {p.note for p in quilt.report.proofs if p.location == ATTN_OUT[1] and p.invariant == "conserved"}
    assert "resid.mid = attn.out" in proven


def test_what_enters_a_layer_that_begins_anew_is_edited_also_where_it_is_kept(quilt: HookGraph):
    places = (RESID_POST[0], RESID_PRE[1])
    before, at = (quilt.hook(x, torch.zeros_like).run({"input_ids": TOKENS}) for x in places)
    assert torch.equal(before.logits, at.logits)
    assert not quilt.binding.why_closed("decoder", 1)
    assert "later layers read what layer 0 computed" in quilt.binding.why_closed("decoder", 2)


def test_a_layer_that_is_given_something_of_another_width_begins_the_stream():
    model = build("base", "fun_asr_nano_encoder")
    graph = bind(model, check=False, example=example_of(model))
    assert RESID_PRE[0] not in graph.locations
    assert "the layer is given no stream: it begins one" in graph.binding.why_absent(RESID_PRE[0])
    assert {RESID_MID[0], RESID_POST[0], RESID_PRE[1], RESID_POST[1]} <= set(graph.locations)


def test_a_stage_that_changes_positions_begins_no_stream():
    with pytest.raises(BindingError, match="no list of layers feeds"):
        bind(build("base", "convnextv2"), cached=False)
