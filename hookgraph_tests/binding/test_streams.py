"""Several residual streams: hyper-connections, on an axis of their own or all on the last one."""

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from hookgraph.algorithms import activation_patching
from hookgraph.binding import bind
from hookgraph.errors import UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import (
    ATTN_OUT,
    ATTN_PATTERN,
    MIXER_OUT,
    MLP_OUT,
    RESID_POST,
    STREAMS_MID,
    STREAMS_POST,
    STREAMS_PRE,
)
from hookgraph_tests.binding.made_up import Dye, Even, LoomConfig, LoomForCausalLM, Weft
from hookgraph_tests.families import binding_of
from hookgraph_tests.tiny import build

TOKENS = torch.arange(12).view(2, 6) + 8
STREAMS = 3


class Plait(nn.Module):
    """From streams to what an update reads, what share each stream takes, and how the streams mix."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__()
        self.even = Even(STREAMS * config.threads)
        self.reads, self.shares = (nn.Linear(STREAMS * config.threads, STREAMS) for _ in range(2))
        self.mixes = nn.Linear(STREAMS * config.threads, STREAMS**2)

    def forward(self, cloths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(what is read, shares, mixing)."""
        given = self.even(cloths.flatten(2))
        read = (self.reads(given).sigmoid().unsqueeze(-1) * cloths).sum(2)
        mixing = self.mixes(given).unflatten(-1, (STREAMS, STREAMS)).softmax(-1)
        return read, self.shares(given), mixing


class PlaitedRow(nn.Module):
    """A layer over (batch, positions, streams, width)."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__()
        self.weft, self.dye = Weft(config), Dye(config.threads, config.dyes)
        self.first, self.last = Plait(config), Plait(config)
        self.before, self.between = Even(config.threads), Even(config.threads)

    def forward(self, cloths: Tensor) -> Tensor:
        """Attention and the MLP read one mixture of the streams each, and write to all of them."""
        read, shares, mixing = self.first(cloths)
        cloths = shares.unsqueeze(-1) * self.weft(self.before(read)).unsqueeze(-2) + mixing @ cloths
        read, shares, mixing = self.last(cloths)
        return shares.unsqueeze(-1) * self.dye(self.between(read)).unsqueeze(-2) + mixing @ cloths


class PlaitedLoom(LoomForCausalLM):
    """A loom of several streams, which mix."""

    row = PlaitedRow

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.cloth = nn.ModuleList(self.row(config) for _ in range(config.rows))

    def spread(self, cloth: Tensor) -> Tensor:
        """The streams at first."""
        return cloth.unsqueeze(2).expand(-1, -1, STREAMS, -1).contiguous()

    def gathered(self, cloths: Tensor) -> Tensor:
        """One stream of all."""
        return cloths.sum(2)

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloths = self.spread(self.spool(input_ids))
        for row in self.cloth:
            cloths = row(cloths)
        return CausalLMOutput(logits=self.label(self.hem(self.gathered(cloths))))


class JoinedRow(PlaitedRow):
    """A layer over (batch, positions, streams · width), whose streams do not mix."""

    def forward(self, cloths: Tensor) -> Tensor:
        """The streams one after another on the last axis."""
        read, shares, _ = self.first(cloths.unflatten(-1, (STREAMS, -1)))
        cloths = cloths + (shares.unsqueeze(-1) * self.weft(self.before(read)).unsqueeze(-2)).flatten(-2)
        read, shares, _ = self.last(cloths.unflatten(-1, (STREAMS, -1)))
        return cloths + (shares.unsqueeze(-1) * self.dye(self.between(read)).unsqueeze(-2)).flatten(-2)


class JoinedLoom(PlaitedLoom):
    """A loom of several streams on one axis."""

    row = JoinedRow

    def spread(self, cloth: Tensor) -> Tensor:
        """The streams at first."""
        return cloth.repeat(1, 1, STREAMS)

    def gathered(self, cloths: Tensor) -> Tensor:
        """One stream of all."""
        return cloths.unflatten(-1, (STREAMS, -1)).sum(2)


def proven(kind: type[PlaitedLoom]) -> HookGraph:
    torch.manual_seed(0)
    return bind(kind(LoomConfig()).double().eval(), cached=False)


@pytest.mark.parametrize("kind", [PlaitedLoom, JoinedLoom])
def test_every_stream_is_reached_on_an_axis_of_its_own(kind: type[PlaitedLoom]):
    graph = proven(kind)
    assert graph.report.ok
    run = graph.run(
        {"input_ids": TOKENS}, save=[STREAMS_PRE[1], ATTN_OUT[1], STREAMS_MID[1], STREAMS_POST[1]]
    )
    assert run[STREAMS_MID[1]].shape == (2, 6, STREAMS, 32)
    assert run[STREAMS_PRE[1]].dim() == len(STREAMS_PRE.dims)
    first = binding_of(graph).model.get_submodule("cloth.1.first")
    with torch.no_grad():
        _, shares, mixing = first(run[STREAMS_PRE[1]])
        mixed = mixing @ run[STREAMS_PRE[1]] if kind is PlaitedLoom else run[STREAMS_PRE[1]]
    torch.testing.assert_close(mixed + shares[..., None] * run[ATTN_OUT[1]][:, :, None], run[STREAMS_MID[1]])


@pytest.mark.parametrize("location", [STREAMS_PRE[1], STREAMS_MID[0], STREAMS_POST[2]], ids=str)
def test_an_edit_of_one_stream_is_the_same_on_its_own_axis_and_on_a_shared_one(location: Location):
    graph = proven(JoinedLoom)
    part = location.at(stream=1, pos=-1)
    run = graph.hook(part, lambda x: x * 0).run({"input_ids": TOKENS}, save=[location])
    clean = graph.run({"input_ids": TOKENS}, save=[location])
    expected = clean[location].clone()
    expected[:, -1, 1] = 0
    torch.testing.assert_close(run[location], expected)
    assert not torch.allclose(run.logits, clean.logits)


@pytest.mark.parametrize("kind", [PlaitedLoom, JoinedLoom])
def test_a_model_of_several_streams_is_entered_between_its_layers(kind: type[PlaitedLoom]):
    graph = proven(kind)
    run = graph.run({"input_ids": TOKENS}, save=[STREAMS_POST[0]])
    torch.testing.assert_close(graph.replay(run, STREAMS_POST[0]).logits, run.logits)


def test_streams_are_patched_one_by_one():
    graph = proven(PlaitedLoom)
    clean, corrupt = {"input_ids": TOKENS}, {"input_ids": TOKENS.flip(1)}
    places = graph.every(STREAMS_POST)
    found = activation_patching(graph, clean, corrupt, lambda x: x[:, -1, 8], places, over=["stream"])
    assert found.effects[places[0]].shape == (2, STREAMS)
    other = graph.run(corrupt, save=[places[0]])[places[0]]
    part = places[0].at(stream=2)
    patched = graph.hook(part, lambda _: other[:, :, 2]).run(clean).logits - graph.run(clean).logits
    torch.testing.assert_close(found.effects[places[0]][:, 2], patched[:, -1, 8])


def test_a_model_of_several_streams_says_so_and_one_of_one_too():
    with pytest.raises(UnknownLocationError, match=r"several residual streams: see streams\.post"):
        proven(PlaitedLoom).every(RESID_POST)
    with pytest.raises(UnknownLocationError, match=r"keeps one residual stream: see resid\.post"):
        bind(LoomForCausalLM(LoomConfig()), check=False).check(STREAMS_POST[0])


@pytest.mark.parametrize(
    ("table", "architecture", "mixing"),
    [
        ("causal", "deepseek_v4", {ATTN_OUT}),
        ("causal", "hy_v4", {ATTN_OUT}),
        ("causal", "qwen4_exp_text", {ATTN_OUT, MIXER_OUT}),
        ("image-text", "glm5_next", {ATTN_OUT, MIXER_OUT}),
        ("causal", "gemma3n_text", set()),
    ],
)
def test_architectures_of_several_streams_are_bound(table: str, architecture: str, mixing: set[object]):
    graph = bind(build(table, architecture), cached=False)
    assert graph.report.ok
    found = {x.type for x in graph.locations}
    assert {STREAMS_PRE, STREAMS_POST, ATTN_PATTERN} <= found
    assert not mixing or mixing | {STREAMS_MID, MLP_OUT} <= found
    assert Dimension.STREAM in STREAMS_POST.dims
    assert RESID_POST not in found
