"""Layers that lie in no list, residual sums in other words, and models whose stream cannot be followed."""

import re
from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers.modeling_outputs import CausalLMOutput

from hookgraph.binding import bind
from hookgraph.errors import BindingError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import ATTN_OUT, MLP_OUT, RESID_MID, RESID_POST, RESID_PRE
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM, Row

TOKENS = torch.arange(12).view(2, 6) + 8
STREAM = (RESID_PRE[1], RESID_MID[1], RESID_POST[1])
UPDATES = (ATTN_OUT[1], MLP_OUT[1])


Way: TypeAlias = Callable[["KnottedRow", Tensor], Tensor]
"""How a row adds its updates to its stream."""


class KnottedRow(Row):
    """A layer that adds to its stream in other words."""

    def __init__(self, config: LoomConfig, way: Way) -> None:
        super().__init__(config)
        self.way = way
        self.share = nn.Parameter(torch.rand(config.threads))
        self.gate = nn.Linear(config.threads, config.threads)

    def woven(self, cloth: Tensor) -> Tensor:
        """What attention adds."""
        return self.weft(self.before(cloth))

    def dyed(self, cloth: Tensor) -> Tensor:
        """What the MLP adds."""
        return self.dye(self.between(cloth))

    def forward(self, cloth: Tensor) -> Tensor:
        """The stream with both."""
        return self.way(self, cloth)


class KnottedLoom(LoomForCausalLM):
    """A loom of such rows, held in a list, in a dictionary, or each by itself."""

    def __init__(self, way: Way, hold: str = "list") -> None:
        super().__init__(LoomConfig(echo=False, rows=2, threads=8, dyes=8, shuttles=2, vocab_size=24))
        rows = {f"row_{number}": KnottedRow(self.config, way) for number in range(self.config.rows)}
        self.order, self.hold = tuple(rows), hold
        del self.cloth
        if hold == "alone":
            for name, row in rows.items():
                self.add_module(name, row)
        else:
            self.cloth = nn.ModuleList(rows.values()) if hold == "list" else nn.ModuleDict(rows)

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids)
        for number, name in enumerate(self.order):
            place = {"list": f"cloth.{number}", "dictionary": f"cloth.{name}", "alone": name}[self.hold]
            cloth = self.get_submodule(place)(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth)))


def plain(row: KnottedRow, x: Tensor) -> Tensor:
    x = x + row.woven(x)
    return x + row.dyed(x)


def in_place(row: KnottedRow, x: Tensor) -> Tensor:
    x += row.woven(x)
    return x.add_(row.dyed(x))


def in_place_of_a_copy(row: KnottedRow, x: Tensor) -> Tensor:
    return in_place(row, x.clone())


def stacked(row: KnottedRow, x: Tensor) -> Tensor:
    x = torch.stack([x, row.woven(x)]).sum(0)
    return torch.sum(torch.stack((x, row.dyed(x)), -1), -1)


def summed(row: KnottedRow, x: Tensor) -> Tensor:
    x = torch.add(sum([x, row.woven(x)]), 0.5) - 0.5
    return sum([x, row.dyed(x)], torch.zeros_like(x))


def scaled(row: KnottedRow, x: Tensor) -> Tensor:
    x = torch.add(x, row.woven(x), alpha=0.7)
    return torch.sub(x, row.dyed(x), alpha=0.5)


def between(row: KnottedRow, x: Tensor) -> Tensor:
    x = torch.lerp(x, row.woven(x), 0.3)
    return torch.lerp(x, row.dyed(x), 0.6)


def about(row: KnottedRow, x: Tensor) -> Tensor:
    x = torch.add(row.woven(x), x, alpha=0.7)
    return torch.lerp(row.dyed(x), x, 0.6)


def averaged(row: KnottedRow, x: Tensor) -> Tensor:
    x = torch.sub(row.woven(x), x, alpha=-0.5)
    return torch.stack([x, row.dyed(x)]).mean(0)


def weighed(row: KnottedRow, x: Tensor) -> Tensor:
    x = torch.addcmul(x, row.share, row.woven(x))
    return torch.addcmul(x, row.dyed(x), row.share, value=0.5)


def onto(row: KnottedRow, x: Tensor) -> Tensor:
    x = x + row.woven(x)
    inner, out = gelu(row.dye.soak(row.between(x))), row.dye.rinse.weight.T
    return torch.addmm(x.flatten(0, 1), inner.flatten(0, 1), out).view_as(x)


def highway(row: KnottedRow, x: Tensor) -> Tensor:
    gate = row.gate(x).sigmoid()
    x = gate * x + (1 - gate) * row.woven(x)
    return torch.lerp(x, row.dyed(x), row.gate(x).sigmoid())


WHOLE = {plain, in_place, in_place_of_a_copy, stacked, summed, scaled, between, about, averaged}
"""Those of which each update is what a module returns, times a number."""


PROVEN = {in_place, highway, about}
"""Those of which the proof is of another kind than that of sums, for which one speaks: gates are not
replayed, autograd is given copies of what is changed, and the stream itself has a factor.
"""


def knotted(way: Way, hold: str = "list", *, check: bool = True) -> HookGraph:
    torch.manual_seed(0)
    return bind(KnottedLoom(way, hold).double().eval(), cached=False, check=check)


@pytest.mark.parametrize("hold", ["dictionary", "alone"])
def test_layers_that_lie_in_no_list_are_found(hold: str):
    graph = knotted(plain, hold, check=False)
    assert graph.locations == knotted(plain, check=False).locations


@pytest.mark.parametrize(
    "way",
    [in_place, in_place_of_a_copy, stacked, summed, scaled, between, about, averaged, weighed, onto, highway],
)
def test_sums_in_other_words_are_followed(way: Way):
    graph = knotted(way, check=way in PROVEN)
    assert set(STREAM) <= set(graph.locations)
    assert (set(UPDATES) <= set(graph.locations)) == (way in WHOLE)


def test_of_a_gated_stream_an_edit_moves_what_the_gate_lets_through():
    graph = knotted(highway, check=False)
    clean = graph.run({"input_ids": TOKENS}, save=STREAM)
    edited = graph.hook(RESID_PRE[1], torch.zeros_like).run({"input_ids": TOKENS}, save=STREAM)
    assert not edited[RESID_PRE[1]].any()
    row = graph.binding.model.get_submodule("cloth.1")  # pyright: ignore[reportAttributeAccessIssue]
    gate = row.gate(clean[RESID_PRE[1]]).sigmoid()
    expected = gate * clean[RESID_PRE[1]] + (1 - gate) * row.woven(clean[RESID_PRE[1]])
    torch.testing.assert_close(clean[RESID_MID[1]], expected.detach())


def test_values_and_gradients_of_a_stream_that_is_changed_in_place_are_those_of_a_sum():
    saves = [*STREAM, *UPDATES, *(x.grad for x in (*STREAM, *UPDATES))]
    runs = [
        knotted(way, check=False).run({"input_ids": TOKENS}, save=saves, metric=lambda x: x[:, -1, 3])
        for way in (plain, in_place, in_place_of_a_copy)
    ]
    for location in saves:
        for run in runs[1:]:
            torch.testing.assert_close(run[location], runs[0][location])


class Squared(nn.Linear):
    """Multiplies what it is given itself with what its own child, and another argument, make of it."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.child = nn.Linear(width, width)

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """A product of three."""
        return self.child(input) * input.tanh() * (other @ self.weight)


class SquaredRow(Row):
    """Adds in place twice, to a stream that both modules were given as it was."""

    grown = True

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.square = Squared(config.threads)

    def forward(self, cloth: Tensor) -> Tensor:
        """One norm for both, and an MLP that is given the stream twice."""
        if not self.grown:
            cloth = cloth + self.weft(self.before(cloth))
            return cloth + self.square(cloth, cloth) + self.dye(self.before(cloth))
        cloth += self.weft(self.before(cloth))
        cloth += self.square(cloth, cloth) + self.dye(self.before(cloth))
        return cloth


def test_modules_with_children_and_those_given_a_stream_twice_are_given_copies_of_what_is_changed_in_place():
    torch.manual_seed(0)
    model = LoomForCausalLM(LoomConfig(rows=2)).double().eval()
    model.cloth = nn.ModuleList(SquaredRow(model.config) for _ in range(2)).double()
    graph = bind(model, check=False)
    saves = [RESID_POST[1], RESID_PRE[0].grad, RESID_POST[0].grad]
    in_place = graph.run({"input_ids": TOKENS}, save=saves, metric=lambda x: x[:, -1, 3])
    for row in model.cloth:
        row.grown = False
    plain = graph.run({"input_ids": TOKENS}, save=saves, metric=lambda x: x[:, -1, 3])
    for location in saves:
        torch.testing.assert_close(in_place[location], plain[location])


def through_an_index(row: KnottedRow, x: Tensor) -> Tensor:
    x[:, :] += row.woven(x)
    x += row.dyed(x)
    return x


def overwritten(row: KnottedRow, x: Tensor) -> Tensor:
    x[:] = x + row.woven(x)
    return x + row.dyed(x)


@pytest.mark.parametrize("way", [through_an_index, overwritten])
def test_a_stream_that_is_written_into_is_refused_for_that_reason(way: Way):
    with pytest.raises(BindingError, match=r"lost where cloth.0 writes into it in place .*write `x = x \+"):
        knotted(way)


def greatest(row: KnottedRow, x: Tensor) -> Tensor:
    x = x + row.woven(x)
    return torch.maximum(x, row.dyed(x))


def cumulated(row: KnottedRow, x: Tensor) -> Tensor:
    x = x + row.woven(x)
    return torch.stack([x, row.dyed(x)]).cumsum(0)[1]


def replaced(row: KnottedRow, x: Tensor) -> Tensor:
    return row.dyed(row.woven(x))


@pytest.mark.parametrize(
    ("way", "place"),
    [
        (greatest, "`maximum` in cloth.0 "),
        (cumulated, "`cumsum` in cloth.0 "),
        (replaced, "`addmm` in cloth.0.dye.rinse "),
    ],
)
def test_a_stream_that_cannot_be_followed_names_the_operation_at_which_it_ends(way: Way, place: str):
    reason = f"what cloth.0 (KnottedRow) returns to what it is given ends at {place}"
    with pytest.raises(BindingError, match=f"{re.escape(reason)}.*write what KnottedRow returns as"):
        knotted(way)


class RollingLoom(KnottedLoom):
    """A loom that moves positions between its rows."""

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids)
        for row in self.cloth:
            cloth = row(cloth).roll(1, 1)
        return CausalLMOutput(logits=self.label(self.hem(cloth)))


class HeapedLoom(KnottedLoom):
    """A loom whose rows all read the spool."""

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids)
        return CausalLMOutput(logits=self.label(self.hem(sum(row(cloth) for row in self.cloth))))


def halved(row: KnottedRow, cloth: Tensor) -> Tensor:
    """Of a long cloth, every other position."""
    return plain(row, cloth)[:, :: 2 if cloth.shape[1] > 4 else 1]


def test_a_layer_that_returns_fewer_positions_is_named():
    reason = "cloth.0 returns an activation of shape (2, 4, 8), and is given one of shape (2, 7, 8)"
    with pytest.raises(BindingError, match=re.escape(reason)):
        knotted(halved)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (RollingLoom, "cloth.1 is not given what cloth.0 returns, but what `roll` in RollingLoom made of it"),
        (HeapedLoom, "cloth.1 is not given what cloth.0 returns: hand on what a layer returns as it is"),
    ],
)
def test_layers_that_do_not_feed_each_other_are_told(kind: type[KnottedLoom], reason: str):
    with pytest.raises(BindingError, match=re.escape(reason)):
        bind(kind(plain), cached=False)


class Bolt(nn.Module):
    """Rows in one module, of one class, or one that holds a row's parts."""

    def __init__(self, *rows: nn.Module) -> None:
        super().__init__()
        self.rows = nn.ModuleList(rows)

    def forward(self, cloth: Tensor) -> Tensor:
        """The stream after all of them."""
        for row in self.rows:
            cloth = row(cloth)
        return cloth


class Woven(Row):
    """The part of a row that adds attention."""

    def forward(self, cloth: Tensor) -> Tensor:
        """The stream with it."""
        return cloth + self.weft(self.before(cloth))


class Dyed(Row):
    """The part of a row that adds the MLP."""

    def forward(self, cloth: Tensor) -> Tensor:
        """The stream with it."""
        return cloth + self.dye(self.between(cloth))


@pytest.mark.parametrize(("parts", "layers"), [((Row, Row), 2), ((Woven, Dyed), 1)])
def test_a_module_that_only_holds_layers_is_none_and_one_that_holds_its_parts_is(
    parts: tuple[type[Row], ...], layers: int
):
    config = LoomConfig(echo=False)
    model = LoomForCausalLM(config)
    model.cloth = nn.ModuleList([Bolt(*(part(config) for part in parts))])
    graph = bind(model.eval(), cached=False)
    assert graph.every(RESID_POST) == tuple(RESID_POST[i] for i in range(layers))
    assert {RESID_MID[0], ATTN_OUT[0], MLP_OUT[0]} <= set(graph.locations)
