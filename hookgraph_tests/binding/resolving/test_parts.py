"""Streams that are taken apart by positions, added to in parts, and put together again."""

import pytest
import torch
from torch import Tensor, nn

from hookgraph.binding import bind
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import ATTN_OUT, ATTN_PATTERN, MLP_IN, MLP_OUT, RESID_POST, RESID_PRE
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM, Row

TOKENS = torch.arange(12).view(2, 6) + 8


class HemmedRow(Row):
    """A layer whose MLP leaves out the first position, which is cut off before and sewn on again."""

    def forward(self, cloth: Tensor) -> Tensor:
        """Attention, then the MLP of the rest."""
        cloth = cloth + self.weft(self.before(cloth))
        edge, rest = cloth[:, 0], cloth[:, 1:]
        rest = rest + self.dye(self.between(rest))
        return torch.cat([edge.unsqueeze(1), rest], dim=1)


class PatchedRow(Row):
    """A layer whose MLP is written into some positions, chosen by a mask."""

    def forward(self, cloth: Tensor) -> Tensor:
        """Attention, then the MLP of every second position."""
        cloth = cloth + self.weft(self.before(cloth))
        chosen = (torch.arange(cloth.shape[1]) % 2 == 0).expand(cloth.shape[:2])
        cloth[chosen] += self.dye(self.between(cloth[chosen][None]))[0]
        return cloth


@pytest.fixture(scope="module")
def patchwork() -> HookGraph:
    """A hemmed row and a patched one."""
    torch.manual_seed(0)
    config = LoomConfig(echo=False, rows=2)
    model = LoomForCausalLM(config)
    model.cloth = nn.ModuleList([HemmedRow(config), PatchedRow(config)])
    return bind(model.double().eval(), cached=False)


def test_a_stream_is_followed_through_its_parts(patchwork: HookGraph):
    assert patchwork.report.ok
    for kind in (RESID_PRE, ATTN_OUT, ATTN_PATTERN, RESID_POST):
        assert [x.layer for x in patchwork.every(kind)] == [0, 1]
    run = patchwork.run({"input_ids": TOKENS}, save=patchwork.locations)
    for layer, untouched in ((0, slice(0, 1)), (1, slice(1, None, 2))):
        whole = run[RESID_PRE[layer]] + run[ATTN_OUT[layer]]
        changed = (run[RESID_POST[layer]] - whole).abs().amax(-1) > 1e-9
        assert not changed[:, untouched].any()
        assert changed.any()


def test_what_is_added_at_some_positions_only_is_no_update_of_all(patchwork: HookGraph):
    for layer in (0, 1):
        assert patchwork.binding.why_absent(MLP_OUT[layer]) == "it is added at some positions only"
        assert patchwork.binding.why_absent(MLP_IN[layer]) == "it is computed at some positions only"
