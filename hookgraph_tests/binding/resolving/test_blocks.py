"""The residual path of a layer, beyond additions, scalings and norms."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from hookgraph.binding import bind
from hookgraph.binding.running.huggingface import HuggingFaceBinding
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import ATTN_OUT, MLP_OUT, RESID_MID, RESID_POST, RESID_PRE
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM
from hookgraph_tests.tiny import build

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


class Between(LoomForCausalLM):
    """A loom that adds something to the cloth between its rows."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.dew = nn.Parameter(torch.randn(config.rows - 1, 6, config.threads))

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids)
        for number, row in enumerate(self.cloth):
            cloth = row(cloth)
            cloth = cloth + self.dew[number] if number < len(self.dew) else cloth
        return CausalLMOutput(logits=self.label(self.hem(cloth)))


def test_a_stream_to_which_something_is_added_between_layers_is_followed():
    torch.manual_seed(0)
    model = Between(LoomConfig(echo=False, rows=2)).double().eval()
    graph = bind(model, cached=False, example={"input_ids": TOKENS})
    assert graph.report.ok
    run = graph.run({"input_ids": TOKENS}, save=[RESID_POST[0], RESID_PRE[1]])
    torch.testing.assert_close(
        run[RESID_PRE[1]] - run[RESID_POST[0]], model.dew[:1].expand(2, -1, -1).detach()
    )
    assert graph.binding.why_closed("decoder", 1), "what the first layer returns is not what enters the next"


class Woven(NamedTuple):
    """What a row returns beside the cloth, by name."""

    cloth: Tensor
    threads: int


class FrayedRow(nn.Module):
    """A layer that leaves out some positions, is clamped by a buffer, and returns its output by name."""

    def __init__(self, row: nn.Module) -> None:
        super().__init__()
        self.row = row
        self.bound = nn.Buffer(torch.tensor(20.0))

    def forward(self, cloth: Tensor) -> Woven:
        """The row, without its last position."""
        kept = torch.arange(cloth.shape[1]) < cloth.shape[1] - 1
        cloth = torch.clamp(self.row(cloth), -self.bound, self.bound)
        return Woven(cloth * kept[None, :, None].to(cloth.dtype), cloth.shape[-1])


class FrayedLoom(LoomForCausalLM):
    """A loom that reads the output of its rows by name."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.cloth = nn.ModuleList(FrayedRow(row) for row in self.cloth)

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids)
        for row in self.cloth:
            cloth = row(cloth).cloth
        return CausalLMOutput(logits=self.label(self.hem(cloth)))


def test_a_stream_of_which_positions_are_masked_is_followed_and_names_of_outputs_are_kept():
    torch.manual_seed(0)
    graph = bind(FrayedLoom(LoomConfig(echo=False, rows=2)).double().eval(), cached=False)
    assert {x.type for x in graph.locations} >= {RESID_PRE, ATTN_OUT, RESID_MID, MLP_OUT, RESID_POST}
    edited = graph.hook(RESID_POST[0], torch.zeros_like).run({"input_ids": TOKENS}, save=[RESID_PRE[1]])
    assert not edited[RESID_PRE[1]].any()
    assert not graph.run({"input_ids": TOKENS}, save=[RESID_POST[1]])[RESID_POST[1]][:, -1].any()
    assert graph.binding.why_closed("decoder", 1), "a tuple with names cannot be made up"


@pytest.mark.parametrize(("architecture", "mechanism"), [("minimax", "output"), ("doge", "sum")])
def test_the_middle_of_a_stream_that_is_scaled_before_the_next_sum_is_where_the_mlp_reads_it(
    architecture: str, mechanism: str
):
    graph = bind(build("causal", architecture), cached=False)
    assert graph.report.ok
    assert isinstance(graph.binding, HuggingFaceBinding)
    assert {graph.binding.findings.anchors[RESID_MID[i]].mechanism for i in (0, 1)} == {mechanism}
