"""Streams with positions or features first, and layers that are called past their hooks."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from hookgraph.binding import bind
from hookgraph.binding.data.layouts import Layout, arranged, restored
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import (
    ATTN_OUT,
    ENCODER,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    XATTN_OUT,
)
from hookgraph_tests.binding.made_up import Dye, Even, LoomConfig, LoomForCausalLM, Weft
from hookgraph_tests.families import binding_of
from hookgraph_tests.tiny import build

TOKENS = torch.arange(12).view(2, 6) + 8


class TurnedWeft(Weft):
    """Attention over (positions, batch, width)."""

    def forward(self, cloth: Tensor) -> Tensor:
        """Mix positions."""
        return super().forward(cloth.transpose(0, 1)).transpose(0, 1)


class TurnedLoom(LoomForCausalLM):
    """A loom with positions before batch, between spool and label."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        for row in self.cloth:
            row.weft = TurnedWeft(config)

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids.T)
        for row in self.cloth:
            cloth = row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth).transpose(0, 1)))


class Upright(nn.Module):
    """A module over (batch, positions, width) that is given (batch, width, positions)."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, cloth: Tensor) -> Tensor:
        """What the module inside makes of it."""
        return self.inside(cloth.transpose(1, 2)).transpose(1, 2)


class Seam(nn.Module):
    """Adds an update and norms the sum over its second axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.even = UprightEven(width)

    def forward(self, update: Tensor, cloth: Tensor) -> Tensor:
        """norm(cloth + update)."""
        return self.even(cloth + update)


class UprightEven(Even):
    """A norm over the second axis."""

    def forward(self, cloth: Tensor) -> Tensor:
        """Divide by the root of the mean square."""
        return super().forward(cloth.transpose(1, 2)).transpose(1, 2)


class UprightRow(nn.Module):
    """A layer with features before positions and norms after each sum."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__()
        self.weft, self.dye = Upright(Weft(config)), Upright(Dye(config.threads, config.dyes))
        self.first, self.last = Seam(config.threads), Seam(config.threads)

    def forward(self, cloth: Tensor) -> Tensor:
        """Attention, then the MLP."""
        cloth = self.first(self.weft(cloth), cloth)
        return self.last(self.dye(cloth), cloth)


class UprightLoom(LoomForCausalLM):
    """A loom with features before positions, whose rows are called past their hooks."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.cloth = nn.ModuleList(UprightRow(config) for _ in range(config.rows))

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids).transpose(1, 2)
        for row in self.cloth:
            cloth = row.forward(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth.transpose(1, 2))))


def made(kind: type[LoomForCausalLM]) -> LoomForCausalLM:
    """All of a kind have the same weights, and looms with positions first those of plain ones."""
    torch.manual_seed(0)
    model = kind(LoomConfig())
    if kind is TurnedLoom:
        model.load_state_dict(made(LoomForCausalLM).state_dict())
    return model.double().eval()


@cache
def proven(kind: type[LoomForCausalLM]) -> HookGraph:
    return bind(made(kind), cached=False)


@pytest.mark.parametrize("layout", ["", "flat", "positions first", "features first", "streams first"])
def test_a_layout_is_undone(layout: Layout):
    x = torch.randn(2, 3, 4, 5)
    assert arranged(layout, restored(layout, x), 2).equal(x)


def test_a_stream_with_positions_first_is_the_stream_with_batch_first():
    plain, turned = proven(LoomForCausalLM), proven(TurnedLoom)
    assert turned.report.ok
    assert {x.type.name for x in plain.locations} == {x.type.name for x in turned.locations}
    shared = [x for x in plain.locations if x in turned.locations]
    runs = [g.run({"input_ids": TOKENS}, save=shared) for g in (plain, turned)]
    for location in shared:
        torch.testing.assert_close(runs[1][location], runs[0][location])
    torch.testing.assert_close(runs[1].logits, runs[0].logits)


@pytest.mark.parametrize(
    "location", [RESID_PRE[1], ATTN_OUT[0], RESID_MID[1], MLP_OUT[2], RESID_POST[0]], ids=str
)
def test_an_edit_of_a_part_means_the_same_whatever_lies_first(location: Location):
    part = location.at(pos=[1, 3], d_model=slice(0, 5))
    graphs = [proven(kind).hook(part, lambda x: x * 2 + 1) for kind in (LoomForCausalLM, TurnedLoom)]
    logits = [g.run({"input_ids": TOKENS}).logits for g in graphs]
    torch.testing.assert_close(logits[1], logits[0])


def test_a_model_with_positions_first_is_entered_between_its_layers():
    graph = proven(TurnedLoom)
    run = graph.run({"input_ids": TOKENS}, save=[RESID_POST[0]])
    assert not binding_of(graph).why_closed("decoder", 1)
    torch.testing.assert_close(graph.replay(run, RESID_POST[0]).logits, run.logits)


def test_layers_called_past_their_hooks_are_reached_by_their_parts():
    graph = proven(UprightLoom)
    assert graph.report.ok
    for kind in (RESID_PRE, ATTN_OUT, RESID_MID, MLP_OUT, RESID_POST):
        assert [x.layer for x in graph.every(kind)] == [0, 1, 2]
    assert binding_of(graph).why_closed("decoder", 1)


def test_what_one_such_layer_returns_is_what_the_next_one_is_given():
    """pre[1] = post[0], also when post[0] is replaced; an edit of pre[1] leaves post[0] alone."""
    graph = proven(UprightLoom)
    wanted = [RESID_POST[0], RESID_PRE[1], RESID_MID[1], ATTN_OUT[1]]
    for edited, alike in ((RESID_POST[0], True), (RESID_PRE[1], False)):
        run = graph.hook(edited, lambda x: x.flip(2)).run({"input_ids": TOKENS}, save=wanted)
        assert run[RESID_PRE[1]].equal(run[RESID_POST[0]]) == alike
        seam = binding_of(graph).model.get_submodule("cloth.1.first.even")
        with torch.no_grad():
            mid = seam((run[RESID_PRE[1]] + run[ATTN_OUT[1]]).transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(mid, run[RESID_MID[1]])


@pytest.mark.parametrize(
    ("table", "architecture"), [("causal", "xlnet"), ("seq2seq", "fsmt"), ("masked", "squeezebert")]
)
def test_architectures_with_other_layouts_are_bound(table: str, architecture: str):
    graph = bind(build(table, architecture), cached=False)
    assert graph.report.ok
    kinds = [RESID_PRE, RESID_MID, RESID_POST, MLP_OUT]
    kinds += [ENCODER.RESID_POST, XATTN_OUT, ATTN_OUT] if table == "seq2seq" else []
    for kind in kinds:
        assert len(graph.every(kind)) == 2


class Spun(LoomForCausalLM):
    """A loom that is given fibres, not tokens: two features per position."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.spool = nn.Linear(2, config.threads)

    def forward(self, input_values: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_values)
        for row in self.cloth:
            cloth = row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth)))


class TurnedSpun(Spun):
    """Fibres of which the positions come before the batch."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        for row in self.cloth:
            row.weft = TurnedWeft(config)

    def forward(self, input_values: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        logits = super().forward(input_values.transpose(0, 1)).logits
        return CausalLMOutput(logits=None if logits is None else logits.transpose(0, 1))


class UprightSpun(Spun):
    """Fibres of which the features come before the positions."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.cloth = nn.ModuleList(UprightRow(config) for _ in range(config.rows))

    def forward(self, input_values: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_values).transpose(1, 2)
        for row in self.cloth:
            cloth = row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth.transpose(1, 2))))


@pytest.mark.parametrize("kind", [TurnedSpun, UprightSpun])
def test_how_a_stream_lies_is_found_where_no_tokens_tell(kind: type[LoomForCausalLM]):
    model = kind(LoomConfig(echo=False, rows=1)).double().eval()
    fibres = torch.randn(2, 6, 2, dtype=torch.float64)
    graph = bind(model, cached=False, example={"input_values": fibres})
    assert graph.report.ok
    run = graph.run({"input_values": fibres}, save=[RESID_PRE[0], RESID_POST[0]])
    assert run[RESID_PRE[0]].shape == run[RESID_POST[0]].shape == (2, 6, 32)
    torch.testing.assert_close(run[RESID_PRE[0]], model.get_submodule("spool")(fibres).detach())


class Flat(nn.Module):
    """A module over positions on one axis that is given rows and columns of them."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, cloth: Tensor) -> Tensor:
        """What the module inside makes of it."""
        return self.inside(cloth.flatten(1, 2)).unflatten(1, cloth.shape[1:3])


class Carpet(Spun):
    """Fibres in rows and columns."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        for row in self.cloth:
            row.weft = Flat(Weft(config))


class Tile(nn.Module):
    """Adds what a convolution makes of a picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.even, self.press = nn.GroupNorm(1, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, cloth: Tensor) -> Tensor:
        """The picture with its update."""
        return cloth + self.press(self.even(cloth))


class Mosaic(Spun):
    """Fibres in rows and columns, behind their features."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.cloth = nn.ModuleList(Tile(config.threads) for _ in range(config.rows))

    def forward(self, input_values: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_values).movedim(-1, 1)
        for row in self.cloth:
            cloth = row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth.movedim(1, -1))))


class Film(Spun):
    """Fibres in frames, which the layers take for examples of their own."""

    def forward(self, input_values: Tensor) -> CausalLMOutput:
        """Logits for every position of every frame."""
        logits = super().forward(input_values.flatten(0, 1)).logits
        return CausalLMOutput(logits=None if logits is None else logits.unflatten(0, input_values.shape[:2]))


@pytest.mark.parametrize("kind", [Carpet, Mosaic, Film])
def test_positions_on_two_axes_are_positions(kind: type[LoomForCausalLM]):
    model = kind(LoomConfig(echo=False, rows=2)).double().eval()
    fibres = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    graph = bind(model, cached=False, example={"input_values": fibres})
    assert {x.layer for x in graph.locations if x.type in (RESID_PRE, RESID_POST)} == {0, 1}
    run = graph.run({"input_values": fibres}, save=[RESID_PRE[0], RESID_POST[1]])
    spun = model.get_submodule("spool")(fibres).detach()
    torch.testing.assert_close(run[RESID_PRE[0]], spun.flatten(1, 2))
    assert run[RESID_POST[1]].shape == (2, 12, 32)
    zeroed = graph.hook(RESID_POST[1].at(pos=5), torch.zeros_like).run({"input_values": fibres})
    other = (zeroed.logits != graph.run({"input_values": fibres}).logits).any(-1).flatten(1)
    assert other.nonzero()[:, 1].tolist() == [5, 5], "an edit of one position is one of that position"
    assert graph.binding.why_closed("decoder", 1)
