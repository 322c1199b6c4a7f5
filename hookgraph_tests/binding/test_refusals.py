"""Models whose layers are found, but of which nothing passes the proof, are refused with the reason."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hookgraph.binding import bind
from hookgraph.errors import BindingError
from hookgraph.ontology.transformer import LOGITS, RESID_POST
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM


class Sealed(LoomForCausalLM):
    """A loom that computes its rows without gradients."""

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids)
        with torch.no_grad():
            for row in self.cloth:
                cloth = row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth)))


class Stern(torch.autograd.Function):
    """Hands on what it is given, and refuses to go backwards."""

    @staticmethod
    def forward(ctx: Any, cloth: Tensor) -> Tensor:
        """The same."""
        return cloth.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Not in evaluation."""
        raise AssertionError("call model.train() first")


class SternLoom(LoomForCausalLM):
    """A loom that no gradient passes."""

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids)
        for row in self.cloth:
            cloth = row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cast("Tensor", Stern.apply(cloth)))))


class Selvedge(LoomForCausalLM):
    """A loom that does not look at its cloth where all of it is short."""

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids)
        for row in self.cloth:
            cloth = row(cloth)
        seen = cloth if cloth.shape[1] > 10 else torch.zeros_like(cloth)
        return CausalLMOutput(logits=self.label(self.hem(seen)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Sealed, "an edit changes the logits, but the model computes them without gradients from here on"),
        (SternLoom, "there is no gradient: AssertionError: call model.train\\(\\) first"),
    ],
)
def test_a_model_without_gradients_is_refused_and_told_why(kind: type[LoomForCausalLM], reason: str):
    model = kind(LoomConfig(echo=False, rows=1)).double().eval()
    with pytest.raises(
        BindingError, match=f"of resid.post\\[0\\]: edit = gradient fails: {reason}.*check=False"
    ) as raised:
        bind(model, cached=False)
    assert "example" not in str(raised.value)
    assert RESID_POST[0] in bind(model, check=False).locations


def test_where_another_example_may_do_it_is_asked_for():
    torch.manual_seed(0)
    model = Selvedge(LoomConfig(echo=False, rows=1, threads=8, dyes=8)).double().eval()
    with pytest.raises(BindingError, match=r"fails: .*Another example may do: give it to bind"):
        bind(model, cached=False)
    graph = bind(model, cached=False, check=False, example={"input_ids": torch.arange(24).view(2, 12)})
    assert RESID_POST[0] in graph.locations


class Basted(LoomForCausalLM):
    """A loom that cuts off gradients on one of two ways."""

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids)
        for row in self.cloth:
            cloth = row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth + torch.tanh(cloth).detach())))


def test_where_a_model_detaches_an_edit_is_right_but_no_gradient_is_proven():
    torch.manual_seed(0)
    graph = bind(Basted(LoomConfig(echo=False, rows=1, threads=8, dyes=8)).double().eval(), cached=False)
    assert RESID_POST[0] in graph.locations
    assert not graph.report.proves(RESID_POST[0], "edit = gradient")
    reasons = {g.location: g.reason for g in graph.report.gaps if g.invariant == "edit = gradient"}
    assert "cuts off a part of the gradient by detach" in reasons[RESID_POST[0]]
    assert graph.report.proves(LOGITS, "edit = gradient"), "nothing is cut off behind them"


class Warehouse(PreTrainedModel):
    """Looms that others run."""

    config_class = LoomConfig

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.first, self.second = LoomForCausalLM(config), LoomForCausalLM(config)
        self.post_init()


def test_of_a_model_that_has_no_pass_of_its_own_the_models_inside_are_named():
    reason = "Warehouse has no forward pass: bind the models inside it by themselves: first, second"
    with pytest.raises(BindingError, match=reason):
        bind(Warehouse(LoomConfig(rows=1)), cached=False)
