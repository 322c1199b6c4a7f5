"""Streams and activations that are changed in place: what modules are given and return is what it was."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from hookgraph.binding import bind
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.replay import can_start
from hookgraph.ontology.transformer import (
    ATTN_IN,
    ATTN_LN_SCALE,
    ATTN_OUT,
    MLP_PRE,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
)
from hookgraph_tests.binding.made_up import LoomConfig
from hookgraph_tests.binding.resolving.test_chains import TOKENS, KnottedLoom, KnottedRow

Way: TypeAlias = Callable[[KnottedRow, Tensor], Tensor]


class Choir(nn.Module):
    """PyTorch's attention, given one tensor three times."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.voices = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """What the voices add."""
        return self.voices(x, x, x, need_weights=False)[0]


class Joined(nn.Module):
    """An update with its norm, if it has one, which adds itself to the stream."""

    def __init__(self, update: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.update, self.norm = update, norm

    def forward(self, x: Tensor, way: str) -> Tensor | None:
        """The stream with the update; `silent`, in place, and nothing is returned."""
        update = self.update(x if self.norm is None else self.norm(x))
        if way == "plain":
            return x + update
        x += update
        return None if way == "silent" else x


class Threads(nn.Module):
    """Attention that adds itself to the stream, without a module for what it adds."""

    def __init__(self, row: KnottedRow, *, normed: bool) -> None:
        super().__init__()
        self.weft, self.norm = row.weft, row.before if normed else nn.Identity()

    def forward(self, x: Tensor, way: str) -> Tensor | None:
        """The stream with what it mixed."""
        weft, given = self.weft, self.norm(x)
        over, under, through = (
            f(given).unflatten(-1, (weft.shuttles, -1)).transpose(1, 2)
            for f in (weft.over, weft.under, weft.through)
        )
        mixed = weft.tie((torch.softmax(over @ under.mT, -1) @ through).transpose(1, 2).flatten(2))
        if way == "plain":
            return x + mixed
        x += mixed
        return None if way == "silent" else x


class InPlaceRow(KnottedRow):
    """A layer of such parts."""

    def __init__(self, config: LoomConfig, way: Way, *, choir: bool = False, normed: bool = True) -> None:
        super().__init__(config, way)
        if choir:
            self.weft = Choir(config.threads, config.shuttles)
        self.first, self.second = Joined(self.weft, self.before), Joined(self.dye, self.between)
        self.threads = self.first if choir else Threads(self, normed=normed)
        self.act = nn.ReLU()


def directly(row: InPlaceRow, x: Tensor, way: str) -> Tensor:
    """Both modules are given the stream itself."""
    if way == "plain":
        x = x + row.weft(x)
        return x + row.dye(x)
    x += row.weft(x)
    x += row.dye(x)
    return x


def by_modules(row: InPlaceRow, x: Tensor, way: str) -> Tensor:
    if way in ("plain", "returned"):
        return row.second(row.first(x, way), way)
    row.first(x, way)
    row.second(x, way)
    return x


def by_attention(row: InPlaceRow, x: Tensor, way: str) -> Tensor:
    if way in ("plain", "returned"):
        x = row.threads(x, way)
    else:
        row.threads(x, way)
    return x + row.dyed(x)


def activated(row: InPlaceRow, x: Tensor, way: str) -> Tensor:
    """Only the nonlinearity works in place."""
    row.act.inplace = way != "plain"
    x = x + row.woven(x)
    return x + row.dye.rinse(row.act(row.dye.soak(row.between(x))))


class Deaf(KnottedLoom):
    """Goes on with what it gave its rows, whatever they return."""

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids)
        for row in self.cloth:
            row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth)))


def loom(
    way: Way, *, check: bool = False, kind: type[KnottedLoom] = KnottedLoom, **options: bool
) -> HookGraph:
    torch.manual_seed(0)
    model = kind(way)
    model.cloth = nn.ModuleList(InPlaceRow(model.config, way, **options) for _ in range(2))
    return bind(model.double().eval(), cached=False, check=check)


@pytest.mark.parametrize(
    ("layer", "way", "choir"),
    [
        (directly, "in place", False),
        (directly, "in place", True),
        (by_modules, "returned", False),
        (by_modules, "ignored", False),
        (by_modules, "silent", False),
        (by_attention, "returned", False),
        (by_attention, "ignored", False),
        (activated, "in place", False),
    ],
)
def test_what_is_changed_in_place_has_the_locations_values_and_gradients_of_a_sum(
    layer: Callable[[InPlaceRow, Tensor, str], Tensor], way: str, choir: bool
):
    plain, graph = (loom(partial(layer, way=x), choir=choir) for x in ("plain", way))
    assert graph.locations == plain.locations
    assert {ATTN_IN[1], ATTN_OUT[1], MLP_PRE[1]} <= set(graph.locations)
    assert RESID_MID[1] in graph.locations
    saves = [*plain.locations, *(x.grad for x in plain.locations)]
    expected, run = (
        x.run({"input_ids": TOKENS}, save=saves, metric=lambda x: x[:, -1, 3]) for x in (plain, graph)
    )
    for location in saves:
        torch.testing.assert_close(run[location], expected[location])
    for location in (RESID_MID[1], ATTN_IN[1], MLP_PRE[1]):
        edited = [x.hook(location, lambda v: 2 * v).run({"input_ids": TOKENS}).logits for x in (plain, graph)]
        torch.testing.assert_close(edited[1], edited[0])
        assert not edited[0].equal(expected.logits)


@pytest.mark.parametrize(("layer", "way"), [(directly, "in place"), (by_modules, "ignored")])
def test_they_are_proven(layer: Callable[[InPlaceRow, Tensor, str], Tensor], way: str):
    graph = loom(partial(layer, way=way), check=True, choir=True)
    assert {ATTN_IN[1], RESID_MID[1]} <= set(graph.locations)


def test_layers_that_change_what_they_are_given_have_every_location_if_what_they_return_is_ignored():
    graph = loom(partial(directly, way="in place"), check=True, kind=Deaf)
    plain = loom(partial(directly, way="plain"))
    assert graph.locations == plain.locations
    for location in (RESID_PRE[0], RESID_PRE[1], RESID_POST[0], RESID_POST[1]):
        runs = [
            x.hook(location, lambda v: 2 * v).run(
                {"input_ids": TOKENS}, save=[location.grad], metric=lambda x: x[:, -1, 3]
            )
            for x in (plain, graph)
        ]
        torch.testing.assert_close(runs[1].logits, runs[0].logits)
        torch.testing.assert_close(runs[1][location.grad], runs[0][location.grad])
    assert not can_start(graph.binding, RESID_POST[0])


@pytest.mark.parametrize(("layer", "way"), [(directly, "in place"), (by_modules, "ignored")])
def test_a_replay_leaves_what_it_starts_from_as_it_was(
    layer: Callable[[InPlaceRow, Tensor, str], Tensor], way: str
):
    graph = loom(partial(layer, way=way))
    for after in (RESID_PRE[0], RESID_PRE[1]):
        run = graph.run({"input_ids": TOKENS}, save=[after])
        before = run[after].clone()
        torch.testing.assert_close(graph.replay(run, after=after).logits, run.logits)
        assert run[after].equal(before)


def test_of_attention_that_adds_itself_to_the_stream_an_edit_of_what_it_reads_leaves_the_stream():
    graph = loom(partial(by_attention, way="plain"))
    plain = graph.run({"input_ids": TOKENS}, save=[RESID_PRE[1]])[RESID_PRE[1]]
    edited = graph.hook(ATTN_IN[1], torch.zeros_like)
    run = edited.run({"input_ids": TOKENS}, save=[ATTN_OUT[1], RESID_MID[1]])
    torch.testing.assert_close(run[RESID_MID[1]] - run[ATTN_OUT[1]], plain)
    assert ATTN_LN_SCALE[1] in graph.locations


def test_without_a_norm_what_it_reads_is_absent_with_the_reason():
    graph = loom(partial(by_attention, way="plain"), normed=False)
    with pytest.raises(Exception, match="also adds the update to it: an edit would move both"):
        graph.check(ATTN_IN[1])
