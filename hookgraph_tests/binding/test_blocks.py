"""The residual path of a layer, beyond additions, scalings and norms."""

import torch
from torch import Tensor, nn

from hookgraph.binding import bind
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import ATTN_OUT, MLP_OUT, RESID_MID, RESID_POST, RESID_PRE
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM

TOKENS = torch.arange(12).view(2, 6) + 8


class PressedRow(nn.Module):
    """A layer whose stream is clamped at its end."""

    def __init__(self, row: nn.Module, bound: float) -> None:
        super().__init__()
        self.row, self.bound = row, bound

    def forward(self, cloth: Tensor) -> Tensor:
        """The row, pressed."""
        return torch.clamp(self.row(cloth), -self.bound, self.bound)


def pressed_loom(bound: float, *, check: bool) -> HookGraph:
    torch.manual_seed(0)
    model = LoomForCausalLM(LoomConfig(echo=False))
    model.cloth = nn.ModuleList(PressedRow(row, bound) for row in model.cloth)
    return bind(model.double().eval(), cached=False, check=check)


def test_a_stream_that_is_clamped_is_followed_and_its_locations_are_proven():
    graph = pressed_loom(0.5, check=True)
    assert graph.report.ok
    for kind in (RESID_PRE, ATTN_OUT, RESID_MID, MLP_OUT, RESID_POST):
        assert [x.layer for x in graph.every(kind)] == [0, 1, 2]


def test_what_leaves_a_clamped_layer_is_the_clamped_sum():
    bound = 0.03
    graph = pressed_loom(bound, check=False)
    run = graph.run({"input_ids": TOKENS}, save=[RESID_MID[1], MLP_OUT[1], RESID_POST[1]])
    added = run[RESID_MID[1]] + run[MLP_OUT[1]]
    assert (added.abs() > bound).any()
    torch.testing.assert_close(run[RESID_POST[1]], added.clamp(-bound, bound))
