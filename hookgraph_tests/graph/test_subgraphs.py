from dataclasses import dataclass
from typing import final

import pytest
import torch
from torch import Tensor

from hookgraph.errors import SubgraphError, UnknownLocationError
from hookgraph.graph.abstract import AbstractSubgraph, Frame
from hookgraph.ontology.autoencoder import ERROR, LATENTS
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import LOGITS, MLP_OUT, RESID_MID, RESID_POST, RESID_PRE
from hookgraph_tests.families import FAMILIES, bound, tokens
from hookgraph_tests.toy import Coordinates, orthonormal, toy_graph, toy_of, toy_tokens

IDS = toy_tokens()
READOUT = torch.linspace(-1, 1, 7, dtype=torch.float64)
SITE = MLP_OUT[1]
Q = orthonormal(4, 2)


def metric(logits: Tensor) -> Tensor:
    return (logits * READOUT).sum((1, 2))


@final
class Made(AbstractSubgraph):
    """A subgraph that says of itself whatever a test wants, and hands values on."""

    def __init__(self, name: str, sites: tuple[Location, ...], *locations: Location) -> None:
        self._name, self._sites, self._locations = name, sites, locations

    @property
    def name(self) -> str:
        return self._name

    @property
    def sites(self) -> tuple[Location, ...]:
        return self._sites

    @property
    def locations(self) -> tuple[Location, ...]:
        return self._locations

    def visit(self, site: Location, value: Tensor, frame: Frame) -> Tensor:
        return value


@final
class Bridge(AbstractSubgraph):
    """Reads at one site and adds what it read at another: memory in use."""

    def __init__(self, read: Location, write: Location) -> None:
        self._read, self._write = read, write
        self.carried = LATENTS().within(write, "bridge")

    @property
    def name(self) -> str:
        return "bridge"

    @property
    def sites(self) -> tuple[Location, ...]:
        return (self._read, self._write)

    @property
    def locations(self) -> tuple[Location, ...]:
        return (self.carried,)

    def visit(self, site: Location, value: Tensor, frame: Frame) -> Tensor:
        if site == self._read:
            frame.memory["read"] = value
            return value
        return value + frame.tap(self.carried, frame.memory["read"])


# --- what a subgraph brings -------------------------------------------------------------------


def test_its_locations_are_saved_hooked_and_differentiated_like_any_other():
    subgraph = Coordinates(SITE, "c", Q)
    graph = toy_graph()
    injected = graph.inject(subgraph)
    plain = graph.run(IDS, save=[SITE, SITE.grad], metric=metric)
    run = injected.run(IDS, save=[subgraph.latents, subgraph.latents.grad, SITE], metric=metric)
    torch.testing.assert_close(run[subgraph.latents], plain[SITE] @ Q)
    torch.testing.assert_close(run[subgraph.latents.grad], plain[SITE.grad] @ Q)
    torch.testing.assert_close(run.logits, plain.logits)
    edited = injected.hook(subgraph.latents.at(latent=1), lambda z: z + 1).run(IDS).logits
    expected = graph.hook(SITE, lambda x: x + Q[:, 1]).run(IDS).logits
    torch.testing.assert_close(edited, expected)


def test_gradient_hooks_reach_into_a_subgraph():
    subgraph = Coordinates(SITE, "c", Q)
    graph = toy_graph().inject(subgraph).hook(subgraph.latents.grad, torch.zeros_like)
    run = graph.run(IDS, save=[subgraph.latents.grad, SITE.grad], metric=metric)
    assert run[subgraph.latents.grad].unique().tolist() == [0]
    closed = toy_of(toy_graph()).closed_form(IDS, READOUT)[SITE.grad]
    torch.testing.assert_close(run[SITE.grad], closed - closed @ Q @ Q.T)


def test_an_injected_subgraph_that_nobody_asks_leaves_the_pass_bit_identical():
    graph = toy_graph()
    assert torch.equal(graph.inject(Coordinates(SITE, "c", Q)).run(IDS).logits, graph.run(IDS).logits)


def test_a_pass_visits_the_subgraphs_that_act_or_are_asked_and_those_they_stand_in():
    log: list[str] = []
    outer, beside = Coordinates(SITE, "outer", Q, log.append), Coordinates(SITE, "beside", Q, log.append)
    inner = Coordinates(outer.latents, "inner", orthonormal(2, 1), log.append)
    graph = toy_graph().inject(outer, beside, inner)
    graph.run(IDS, save=[SITE])
    assert log == []
    run = graph.run(IDS, save=[inner.latents])
    assert log == ["outer", "inner"]
    assert run[inner.latents].shape == (2, 3, 1)
    acting = toy_graph().inject(Bridge(MLP_OUT[0], SITE))
    assert not torch.allclose(acting.run(IDS).logits, toy_graph().run(IDS).logits)


def test_a_save_at_the_site_is_of_the_value_before_the_subgraphs():
    subgraph = Coordinates(SITE, "c", Q)
    graph = toy_graph().inject(subgraph).hook(subgraph.latents, torch.zeros_like)
    saved = graph.run(IDS, save=[SITE, RESID_POST[1], RESID_PRE[2]])
    assert torch.equal(saved[SITE], toy_graph().run(IDS, save=[SITE])[SITE])
    assert torch.equal(saved[RESID_POST[1]], saved[RESID_PRE[2]])


# --- order ------------------------------------------------------------------------------------


def test_events_at_a_location_happen_in_the_documented_order():
    log: list[str] = []

    def logged(name: str, x: Tensor) -> None:
        log.append(name)

    late, early = Coordinates(SITE, "z", Q, log.append), Coordinates(SITE, "a", Q, log.append)
    nested = Coordinates(late.latents, "nested", orthonormal(2, 1), log.append)
    graph = toy_graph().inject(late, early, nested)
    for name, place in (
        ("latents of a", early.latents),
        ("latents of z", late.latents),
        ("second", SITE),
        ("latents of nested", nested.latents),
        ("gradient", SITE.grad),
        ("gradient of z", late.latents.grad),
        ("third", SITE),
    ):
        graph = graph.hook(place, lambda x, name=name: logged(name, x))
    graph.run(IDS, save=[SITE.grad], metric=metric)
    assert log == [
        "second",
        "third",
        "z",
        "latents of z",
        "nested",
        "latents of nested",
        "a",
        "latents of a",
        "gradient of z",
        "gradient",
    ]


def test_a_later_subgraph_reads_what_the_earlier_one_wrote():
    first, second = Coordinates(SITE, "first", Q), Coordinates(SITE, "second", Q)
    graph = toy_graph().inject(first, second).hook(first.latents, lambda z: 2 * z)
    run = graph.run(IDS, save=[first.latents, second.latents])
    torch.testing.assert_close(run[second.latents], run[first.latents])
    torch.testing.assert_close(run[first.latents], 2 * toy_graph().run(IDS, save=[SITE])[SITE] @ Q)


def test_a_nested_subgraph_edits_inside_the_outer_one():
    outer = Coordinates(SITE, "outer", Q)
    inner = Coordinates(outer.latents, "inner", torch.eye(2, dtype=torch.float64)[:, :1])
    assert str(inner.latents) == "mlp.out[1]/outer/latents/inner/latents"
    graph = toy_graph().inject(outer, inner)
    nested = graph.hook(inner.latents, torch.zeros_like).run(IDS).logits
    direct = graph.hook(outer.latents.at(latent=0), torch.zeros_like).run(IDS).logits
    torch.testing.assert_close(nested, direct)
    assert not torch.allclose(direct, toy_graph().run(IDS).logits)


def test_memory_carries_a_value_from_one_site_to_a_later_one():
    bridge = Bridge(MLP_OUT[0], MLP_OUT[2])
    graph = toy_graph().inject(bridge)
    early = toy_graph().run(IDS, save=[MLP_OUT[0]])[MLP_OUT[0]]
    expected = toy_graph().hook(MLP_OUT[2], lambda x: x + early).run(IDS).logits
    assert torch.equal(graph.run(IDS).logits, expected)
    assert torch.equal(
        graph.hook(bridge.carried, torch.zeros_like).run(IDS).logits, toy_graph().run(IDS).logits
    )


def test_a_frame_tells_what_is_asked_for():
    asked: list[tuple[bool, bool]] = []

    class Asking(AbstractSubgraph):
        name = "asking"
        sites = (SITE,)
        locations = (LATENTS().within(SITE, "asking"), ERROR().within(SITE, "asking"))

        def visit(self, site: Location, value: Tensor, frame: Frame) -> Tensor:
            asked.extend((frame.wanted(x), frame.edited(x)) for x in self.locations)
            assert all(frame.tap(x, value) is value for x in self.locations)
            return value

    latents, error = Asking.locations
    graph = toy_graph().inject(Asking())
    graph.run(IDS)
    graph.run(IDS, save=[latents, LOGITS])
    graph.hook(error, lambda x: None).run(IDS)
    assert asked == [
        (False, False),
        (False, False),
        (True, False),
        (False, False),
        (False, False),
        (True, True),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subgraph_works_alike_on_every_model(family: str):
    graph, q = bound(family, torch.float64), orthonormal(32, 3)
    subgraph = Coordinates(SITE, "c", q)
    injected = graph.inject(subgraph)
    asked = [subgraph.latents, subgraph.latents.grad]
    run = injected.run(tokens(), save=asked, metric=lambda logits: logits[:, -1, 3])
    plain = graph.run(tokens(), save=[SITE, SITE.grad], metric=lambda logits: logits[:, -1, 3])
    torch.testing.assert_close(run[subgraph.latents], plain[SITE] @ q)
    torch.testing.assert_close(run[subgraph.latents.grad], plain[SITE.grad] @ q)
    torch.testing.assert_close(run.logits, plain.logits)
    edited = injected.hook(subgraph.latents.at(latent=1), lambda z: z + 1).run(tokens()).logits
    torch.testing.assert_close(edited, graph.hook(SITE, lambda x: x + q[:, 1]).run(tokens()).logits)


# --- how a class may state its name and its sites ----------------------------------------------


class Moving(AbstractSubgraph):
    """Adds one at its site, and nothing else: the base of classes that say who they are in many ways."""

    def visit(self, site: Location, value: Tensor, frame: Frame) -> Tensor:
        return value + 1


@dataclass(frozen=True)
class Fields(Moving):
    sites: tuple[Location, ...]
    name: str
    locations: tuple[Location, ...] = ()


@dataclass(frozen=True)
class Derived(Moving):
    site: Location
    name: str = "default"

    @property
    def locations(self) -> tuple[Location, ...]:
        return (LATENTS().within(self.site, self.name), ERROR().within(self.site, self.name))


class Attributes(Moving):
    name = "attributes"
    sites = (SITE,)
    locations = ()


class Nameless(Moving):
    sites = (SITE,)
    locations = ()


@pytest.mark.parametrize(
    "subgraph", [Fields((SITE,), "fields"), Derived(SITE), Attributes()], ids=lambda x: x.name
)
def test_name_and_sites_are_fields_or_attributes_or_follow_from_the_locations(subgraph: Moving):
    assert subgraph.sites == (SITE,)
    expected = toy_graph().hook(SITE, lambda x: x + 1).run(IDS).logits
    assert torch.equal(toy_graph().inject(subgraph).run(IDS).logits, expected)


def test_a_field_without_a_default_has_to_be_given():
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'sites' and 'name'"):
        Fields()  # pyright: ignore[reportCallIssue]


def test_a_subgraph_without_a_name_is_an_error():
    with pytest.raises(SubgraphError, match="Nameless has no name: give it a field or a property `name`"):
        toy_graph().inject(Nameless())


# --- what is handed to a tap -------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False)
class Careless(AbstractSubgraph):
    """x + (z' - z) Qᵀ, handing out the very z that it goes on to subtract."""

    site: Location
    name: str = "careless"

    @property
    def locations(self) -> tuple[Location, ...]:
        return (LATENTS().within(self.site, self.name),)

    def visit(self, site: Location, value: Tensor, frame: Frame) -> Tensor:
        before = value @ Q
        return value + (frame.tap(self.locations[0], before) - before) @ Q.T


def test_what_is_handed_to_a_tap_is_apart_from_other_uses_of_it():
    careful, careless = Coordinates(SITE, "c", Q), Careless(SITE)
    (latents,) = careless.locations
    asked = [careful.latents.grad, latents.grad, SITE.grad]
    run = toy_graph().inject(careful, careless).run(IDS, save=asked, metric=metric)
    assert run[latents.grad].abs().min() > 1e-3
    torch.testing.assert_close(run[latents.grad], run[SITE.grad] @ Q)
    torch.testing.assert_close(run[latents.grad], run[careful.latents.grad])


def test_a_hook_that_edits_in_place_edits_what_goes_on_alone():
    careless = Careless(SITE)
    (latents,) = careless.locations
    graph = toy_graph().inject(careless)
    in_place = graph.hook(latents.at(latent=0), Tensor.zero_).run(IDS).logits
    torch.testing.assert_close(in_place, graph.hook(latents.at(latent=0), torch.zeros_like).run(IDS).logits)
    assert not torch.allclose(in_place, toy_graph().run(IDS).logits)


def test_a_hook_on_the_parent_sees_the_total_gradient_through_what_was_injected():
    subgraph = Coordinates(SITE, "c", Q)
    seen: list[Tensor] = []
    graph = toy_graph().inject(subgraph).hook(subgraph.latents, lambda z: 3 * z)
    graph = graph.hook(SITE.grad, lambda g: seen.append(g.clone()))
    run = graph.run(IDS, save=[SITE.grad, RESID_POST[1].grad], metric=metric)
    # The output is x + 2 z Qᵀ with z = x Q: of the gradient behind it, the part along Q counts three times.
    behind = run[RESID_POST[1].grad]
    torch.testing.assert_close(seen[0], behind + 2 * behind @ Q @ Q.T)
    assert torch.equal(seen[0], run[SITE.grad])


# --- replay and early stop ---------------------------------------------------------------------


def test_a_pass_stops_inside_a_subgraph_when_all_that_is_asked_for_has_fired():
    graph = toy_graph().inject(Coordinates(SITE, "c", Q))
    toy_of(graph).executed.clear()
    run = graph.run(IDS, save=[LATENTS().within(SITE, "c")])
    assert toy_of(graph).executed == [0, 1]
    assert torch.equal(run.logits, toy_graph().run(IDS).logits)


def test_a_replay_reaches_subgraphs_whole_or_not_at_all():
    early, bridge = Coordinates(MLP_OUT[0], "early", Q), Bridge(MLP_OUT[0], MLP_OUT[2])
    first = toy_graph().run(IDS, save=[RESID_PRE[0], RESID_PRE[1], RESID_PRE[2]])
    graph = toy_graph().inject(early)
    assert torch.equal(graph.replay(first, RESID_PRE[1]).logits, first.logits)
    with_bridge = graph.inject(bridge)
    expected = with_bridge.run(IDS).logits
    assert torch.equal(with_bridge.replay(first, RESID_PRE[0]).logits, expected)
    with pytest.raises(
        SubgraphError,
        match=r"a replay from resid.pre\[1\] would reach subgraph 'bridge' without mlp.out\[0\], which it",
    ):
        with_bridge.replay(first, RESID_PRE[1])


def test_a_graph_tells_where_a_replay_that_reaches_a_location_may_enter():
    graph = toy_graph()
    assert [graph.entry(x) for x in (MLP_OUT[2], RESID_PRE[1], LOGITS)] == [
        RESID_PRE[2],
        RESID_PRE[1],
        RESID_PRE[2],
    ]
    bridge = Bridge(MLP_OUT[0], MLP_OUT[1])
    bridged = graph.inject(bridge)
    assert bridged.entry(bridge.carried) == RESID_PRE[0]
    assert bridged.entry(RESID_POST[1]) == RESID_PRE[0]
    assert bridged.entry(RESID_POST[2]) == RESID_PRE[2]


# --- errors -----------------------------------------------------------------------------------

LATENT = LATENTS().within(SITE, "x")
WRONG: dict[str, tuple[Made, str]] = {
    "no site": (Made("x", ()), "subgraph 'x' names no site at which to inject it"),
    "part": (Made("x", (SITE.at(pos=0),)), r"a site is a whole location, not mlp.out\[1\]@pos=0"),
    "gradient": (Made("x", (SITE.grad,)), r"a site is a whole location, not mlp.out\[1\].grad"),
    "unknown site": (
        Made("x", (RESID_MID[0],)),
        r"subgraph 'x' cannot be injected: this model has no location resid.mid\[0\]",
    ),
    "unknown subgraph": (
        Made("x", (LATENTS().within(SITE, "absent"),)),
        "'x' cannot be injected: .* inject its subgraph first",
    ),
    "name taken": (Made("taken", (SITE,)), r"a subgraph called 'taken' is at mlp.out\[1\] already"),
    "elsewhere": (
        Made("x", (SITE,), LATENTS().within(MLP_OUT[2], "x")),
        r"subgraph 'x' declares mlp.out\[2\]/x/latents: its locations stand at one of its sites",
    ),
    "other name": (Made("y", (SITE,), LATENT), r"subgraph 'y' declares mlp.out\[1\]/x/latents"),
    "layered": (
        Made("x", (SITE,), MLP_OUT[2].within(SITE, "x")),
        "inside a subgraph the layer is that of the site; declare mlp.out with layered=False",
    ),
    "no scope": (Made("x", (SITE,), RESID_POST[0]), r"declares resid.post\[0\]: its locations stand at"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_a_subgraph_that_cannot_be_injected_says_why(wrong: Made, message: str):
    graph = toy_graph().inject(Coordinates(SITE, "taken", Q))
    with pytest.raises(SubgraphError, match=message):
        graph.inject(wrong)


def test_a_location_that_an_injected_subgraph_lacks_is_told_from_one_that_is_not_injected():
    graph = toy_graph().inject(Coordinates(SITE, "c", Q))
    with pytest.raises(UnknownLocationError, match=r"subgraph 'c' brings none such into being; did you mean"):
        graph.check(ERROR().within(SITE, "c"))
    with pytest.raises(UnknownLocationError, match="inject its subgraph first"):
        graph.check(ERROR().within(SITE, "d"))


def test_subgraphs_of_one_name_stand_at_different_sites():
    graph = toy_graph().inject(Coordinates(MLP_OUT[0], "sae", Q), Coordinates(MLP_OUT[1], "sae", Q))
    assert len([x for x in graph.locations if x.subgraph == "sae"]) == 2


def test_locations_of_two_subgraphs_must_not_overlap():
    other = LATENTS().within(MLP_OUT[2], "x")
    first, second = Made("x", (SITE, MLP_OUT[2]), other), Made("x", (MLP_OUT[2],), other)
    with pytest.raises(SubgraphError, match=r"a subgraph called 'x' is at mlp.out\[2\] already"):
        toy_graph().inject(first, second)


def test_a_location_is_declared_once():
    with pytest.raises(SubgraphError, match=r"subgraph 'x' declares mlp.out\[1\]/x/latents twice"):
        toy_graph().inject(Made("x", (SITE,), LATENT, LATENT))


def test_a_graph_into_which_nothing_could_be_injected_is_as_it_was():
    graph = toy_graph()
    with pytest.raises(SubgraphError):
        graph.inject(Coordinates(SITE, "c", Q), Made("x", ()))
    assert graph.subgraphs == ()
