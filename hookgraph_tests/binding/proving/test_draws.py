"""Models that draw random numbers in evaluation are proven with these held still."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.modeling_outputs import CausalLMOutput

from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.binding import bind
from hookgraph.binding.proving.draws import HeldDraws
from hookgraph.errors import HookGraphError
from hookgraph.ontology.transformer import RESID_POST
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM

TOKENS = torch.arange(12).view(2, 6) + 8


class Dusty(nn.Module):
    """Adds noise to what it is given."""

    def forward(self, cloth: Tensor) -> Tensor:
        """The cloth, dusty."""
        return cloth + 0.1 * torch.randn_like(cloth)


class DustyLoom(LoomForCausalLM):
    """A loom that is dusty in evaluation too."""

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = Dusty()(self.spool(input_ids))
        for row in self.cloth:
            cloth = row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth)))


def test_a_model_that_draws_noise_is_proven_and_the_report_says_so():
    torch.manual_seed(0)
    graph = bind(DustyLoom(LoomConfig(echo=False, rows=1)).double().eval(), cached=False)
    assert graph.report.ok
    assert "with its 1 random draws a pass held still" in graph.report.metadata["proven on"]
    one, other = (graph.run({"input_ids": TOKENS}).logits for _ in range(2))
    assert not torch.equal(one, other), "only the proof holds them"
    with pytest.raises(HookGraphError, match="draws random numbers of its own in every pass"):
        patching_effect(graph, TOKENS, TOKENS, logit_diff(1, 2), [RESID_POST[0]])


def drawn(rows: int) -> list[Tensor]:
    """What each way to draw gives for so many rows."""
    like = torch.full((rows, 40), 0.5)
    return [
        torch.randn(rows, 40),
        torch.rand(rows, 40),
        torch.randint(0, 9, (rows, 40)),
        torch.randn_like(like),
        like.clone().normal_(),
        torch.bernoulli(like),
        torch.multinomial(like, 5),
        torch.normal(like, 1.0),
    ]


def test_draws_are_the_same_in_each_pass_and_each_row_and_disturb_no_others():
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    with HeldDraws() as draws:
        one, several = drawn(1), drawn(3)
    assert draws.count == 16
    assert_close(torch.randn(2), expected)
    for alone, rows in zip(one, several, strict=True):
        assert_close(rows, alone.expand_as(rows), rtol=0, atol=0)
        assert alone.unique().numel() > 1


def test_draws_of_a_generator_of_their_own_are_held_too():
    generator = torch.Generator().manual_seed(1)
    with HeldDraws() as draws:
        one, other = (torch.randn([2, 3], generator=generator) for _ in range(2))
    assert draws.count == 2
    assert torch.equal(one, other)
    assert torch.equal(one[0], one[1])
