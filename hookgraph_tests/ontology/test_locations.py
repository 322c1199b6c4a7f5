from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hookgraph.errors import LocationError
from hookgraph.ontology.autoencoder import ERROR, LATENTS, LATENTS_PRE, RECONSTRUCTION
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import STACKS, Location, LocationType, declared
from hookgraph.ontology.passes import PassType
from hookgraph.ontology.transformer import (
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Q,
    ATTN_SCORES,
    ATTN_Z,
    EMBED,
    ENCODER,
    FINAL_LN_OUT,
    LOGITS,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    VISION,
)
from hookgraph_tests.unchecked import unchecked

# --- printing and parsing ---------------------------------------------------------------------

numbers = st.integers(-30, 30)
bounds = st.none() | numbers
slices = st.builds(slice, bounds, bounds, st.none() | st.integers(1, 5))
indices = numbers | slices | st.lists(numbers, min_size=1, max_size=4)
names = st.from_regex(r"[A-Za-z0-9_.\-]{1,8}", fullmatch=True)


@dataclass(frozen=True)
class Recipe:
    """A location as plain data: hypothesis must not call code whose types are checked at random."""

    nesting: list[tuple[LocationType, int, str]]
    index: dict[Dimension, int | slice | list[int]]
    gradient: bool

    def location(self) -> Location:
        made: Location | None = None
        for kind, layer, name in self.nesting:
            inner = Location(kind, layer if kind.layered else None)
            made = inner if made is None else inner.within(made, name)
        assert made is not None
        made = made.at(**{d.value: i for d, i in self.index.items() if d in made.type.dims})
        return made.grad if self.gradient else made


recipes = st.builds(
    Recipe,
    st.lists(st.tuples(st.sampled_from(declared()), st.integers(0, 99), names), min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(list(Dimension)), indices, max_size=6),
    st.booleans(),
)


@given(recipes)
def test_what_is_printed_parses_to_an_equal_location(recipe: Recipe):
    location = recipe.location()
    parsed = Location.parse(str(location))
    assert parsed == location
    assert hash(parsed) == hash(location)
    assert str(parsed) == str(location)


@pytest.mark.parametrize("kind", declared(), ids=str)
def test_every_declared_type_is_parsed_by_its_name(kind: LocationType):
    location = Location(kind, 3 if kind.layered else None)
    assert Location.parse(f"{kind}{'[3]' if kind.layered else ''}") == location
    assert Location.parse(str(location.grad)).pass_type is PassType.BACKWARD


LATENT = LATENTS().within(MLP_OUT[8], "sae")
TEXTS = (
    ("embed", EMBED),
    ("logits", LOGITS),
    ("resid.post[6]", RESID_POST[6]),
    ("resid.post[6].grad", RESID_POST[6].grad),
    ("attn.z[9]@head=6,9;pos=-1", ATTN_Z[9].at(head=[6, 9], pos=-1)),
    ("attn.z[9].grad@head=6,", ATTN_Z[9].at(head=[6]).grad),
    ("attn.scores[0]@key_pos=:4;pos=-2:", ATTN_SCORES[0].at(pos=slice(-2, None), key_pos=slice(4))),
    ("attn.pattern[0]@head=::2", ATTN_PATTERN[0].at(head=slice(None, None, 2))),
    ("encoder.attn.z[2]", ENCODER.ATTN_Z[2]),
    ("vision.resid.post[0]", VISION.RESID_POST[0]),
    ("mlp.out[8]/sae/latents@latent=123", LATENT.at(latent=123)),
    ("mlp.out[8]/sae/latents.grad", LATENT.grad),
    ("mlp.out[8]/sae/latents/inner-1.0/error", ERROR().within(LATENT, "inner-1.0")),
)


@pytest.mark.parametrize(("text", "location"), TEXTS, ids=[text for text, _ in TEXTS])
def test_a_location_prints_as_documented(text: str, location: Location):
    assert str(location) == text
    assert Location.parse(text) == location
    assert repr(location) == f"Location({text!r})"


def test_white_space_around_a_text_does_not_matter():
    assert Location.parse(" resid.post[6]\n") == RESID_POST[6]


def test_a_type_declared_by_a_user_is_parsed_from_then_on():
    with pytest.raises(LocationError, match=r"no location type is called 'mine\.gate'"):
        Location.parse("mine.gate[1]")
    gate = LocationType("mine.gate", (Dimension.BATCH, Dimension.POS, Dimension.EXPERT), 145)
    assert Location.parse("mine.gate[1]@expert=0") == gate[1].at(expert=0)


# --- values -----------------------------------------------------------------------------------


def test_equal_locations_are_one_key_however_they_were_written():
    written = ATTN_Z[9].at(head=[6, 9], pos=-1)
    again = ATTN_Z[9].at(pos=-1).at(head=(6, 9))
    assert {written: "a"}[again] == "a"
    assert len({written, again, written.grad, ATTN_Z[9], ATTN_Z[8]}) == 4


def test_indexing_a_dimension_again_replaces_the_index():
    assert ATTN_Z[1].at(head=2).at(head=[3, 4]) == ATTN_Z[1].at(head=[3, 4])


def test_slices_are_part_of_the_identity():
    first, other = RESID_POST[0].at(pos=slice(1, 3)), RESID_POST[0].at(pos=slice(1, 4))
    assert len({first, other, RESID_POST[0].at(pos=slice(1, 3))}) == 2


def test_a_tensor_of_integers_is_a_list():
    with unchecked():
        assert ATTN_Z[0].at(head=torch.tensor([1, 2])) == ATTN_Z[0].at(head=[1, 2])


def test_only_an_integer_index_removes_an_axis():
    part = ATTN_SCORES[0].at(batch=0, head=[1], key_pos=slice(2))
    assert part.dims == (Dimension.HEAD, Dimension.POS, Dimension.KEY_POS)


def test_a_gradient_knows_its_activation_and_its_whole():
    part = ATTN_Z[9].at(head=6)
    assert part.grad.activation == part
    assert part.grad.whole == part.whole == ATTN_Z[9]
    assert part.grad.index == part.index


def test_scope_and_root_lead_out_of_nested_subgraphs():
    inner = ERROR().within(LATENT, "inner")
    assert inner.scope == ("sae", "inner")
    assert inner.site == LATENT
    assert inner.root == MLP_OUT[8]
    assert RESID_POST[6].scope == ()
    assert RESID_POST[6].at(pos=1).root == RESID_POST[6]


def test_several_layers_are_a_tuple_of_locations():
    assert RESID_POST[2:5] == (RESID_POST[2], RESID_POST[3], RESID_POST[4])
    assert RESID_POST[0:5:2] == (RESID_POST[0], RESID_POST[2], RESID_POST[4])
    assert RESID_POST[[3, 0]] == (RESID_POST[3], RESID_POST[0])


# --- order ------------------------------------------------------------------------------------


def test_locations_are_ordered_as_the_pass_reaches_them():
    causal = (
        VISION.RESID_POST[9],
        ENCODER.EMBED,
        ENCODER.RESID_POST[9],
        ENCODER.FINAL_LN_OUT,
        EMBED,
        RESID_PRE[0],
        ATTN_Q[0],
        ATTN_SCORES[0],
        ATTN_PATTERN[0],
        ATTN_Z[0],
        ATTN_OUT[0],
        RESID_MID[0],
        MLP_OUT[0],
        LATENTS_PRE().within(MLP_OUT[0], "sae"),
        LATENTS().within(MLP_OUT[0], "sae"),
        LATENTS().within(LATENTS().within(MLP_OUT[0], "sae"), "inner"),
        ERROR().within(MLP_OUT[0], "sae"),
        RESID_POST[0],
        RESID_PRE[1],
        RESID_POST[11],
        FINAL_LN_OUT,
        LOGITS,
    )
    for place, location in enumerate(causal):
        assert [location.precedes(other) for other in causal] == [
            place < other for other in range(len(causal))
        ]


def test_locations_of_one_stage_do_not_precede_each_other():
    sae = [kind().within(MLP_OUT[0], "sae") for kind in (RECONSTRUCTION, ERROR)]
    assert not sae[0].precedes(sae[1])
    assert not sae[1].precedes(sae[0])


@given(recipes, recipes, recipes)
def test_preceding_is_a_strict_order_that_ignores_parts(first: Recipe, second: Recipe, third: Recipe):
    a, b, c = first.location(), second.location(), third.location()
    assert not (a.precedes(b) and b.precedes(a))
    assert not (a.precedes(b) and b.precedes(c)) or a.precedes(c)
    assert a.precedes(b) == a.whole.precedes(b.whole)


# --- errors -----------------------------------------------------------------------------------

Wrong = tuple[Callable[[], Any], str]
WRONG_TEXTS = (
    ("", "a location reads like attn.z"),
    ("resid.post[6]x", "a location reads like attn.z"),
    ("attn.zz[0]", r"no location type is called 'attn.zz': did you mean attn\.z"),
    ("resid.post", r"resid.post needs a layer: resid.post\[0\]"),
    ("logits[3]", r"logits has no layers: write it without \[3\]"),
    ("resid.post[-1]", r"layers count from 0; for the last ones use graph\.every\(\.\.\.\)\[-1\]"),
    ("attn.z[1]@", "after @ comes dimension=index"),
    ("attn.z[1]@head=", "'' is no index; write 3, 2:5 or 6,9"),
    ("attn.z[1]@head=a", "'a' is no index"),
    ("attn.z[1]@head=1:2:3:4", "'1:2:3:4' is no index"),
    ("attn.z[1]@heads=1", "attn.z has no dimension 'heads': did you mean head"),
    ("mlp.out[8]/sae", "inside a subgraph a location reads site/subgraph/location"),
    ("mlp.out[8]@pos=1/sae/latents", "a subgraph stands at a whole activation"),
    ("mlp.out[8].grad/sae/latents", "a subgraph stands at a whole activation"),
    ("mlp.out[8]/s e/latents", "'s e' cannot name a subgraph"),
    ("attn.z[1]@head=1;head=2", "head is indexed twice"),
    ("attn.z[1]@head=1_0", "'1_0' is no index"),
    ("attn.z[1]@head=1,+2", r"'1,\+2' is no index"),
    ("attn.z[1]@head=\u0663", "is no index; write 3, 2:5 or 6,9"),
    ("attn.z[\u0663]", "a location reads like attn.z"),
    ("ATTN_Z[3]", r"no location type is called 'ATTN_Z': did you mean attn\.z\?"),
    ("ENCODER.ATTN_Z[3]", r"did you mean encoder\.attn\.z\?"),
)


@pytest.mark.parametrize(("text", "message"), WRONG_TEXTS, ids=[text for text, _ in WRONG_TEXTS])
def test_a_text_that_names_no_location_says_why(text: str, message: str):
    with pytest.raises(LocationError, match=message):
        Location.parse(text)


STREAM = (Dimension.BATCH, Dimension.POS)
WRONG: dict[str, Wrong] = {
    "dimension": (lambda: ATTN_Z[0].at(kv_head=1), "attn.z has no dimension 'kv_head': did you mean"),
    "bool": (lambda: ATTN_Z[0].at(head=True), "an index is an int, a slice or a list of ints"),
    "bools": (lambda: ATTN_Z[0].at(head=[True, False]), "an index is an int, a slice or a list"),
    "mask": (
        lambda: ATTN_Z[0].at(head=torch.tensor([True, False])),
        "an index is an int, a slice or a list of ints",
    ),
    "float": (lambda: ATTN_Z[0].at(head=1.5), "an index is an int, a slice or a list of ints"),
    "floats": (lambda: ATTN_Z[0].at(head=[1.5]), "an index is an int, a slice or a list of ints"),
    "text": (lambda: ATTN_Z[0].at(head="12"), "an index is an int, a slice or a list of ints"),
    "none": (lambda: ATTN_Z[0].at(head=None), "an index is an int, a slice or a list of ints"),
    "empty": (lambda: ATTN_Z[0].at(head=[]), r"head=\[\] selects nothing"),
    "backwards": (lambda: ATTN_Z[0].at(pos=slice(None, None, -1)), "no negative steps; give a list"),
    "standing": (lambda: ATTN_Z[0].at(pos=slice(0, 2, 0)), "a step that is not 0"),
    "slice of floats": (lambda: ATTN_Z[0].at(pos=slice(0.5)), "a slice takes ints"),
    "gradient twice": (lambda: ATTN_Z[0].grad.grad, r"attn.z\[0\].grad is a gradient already"),
    "negative layer": (lambda: RESID_POST[-1], "layers count from 0"),
    "no layer": (lambda: RESID_POST(), r"resid.post needs a layer: resid.post\[0\]"),
    "layer of none": (lambda: LOGITS.type[0], r"logits has no layers: write it without \[0\]"),
    "open slice": (lambda: RESID_POST[2:], r"resid.post\[2:\] needs the number of layers"),
    "from the end": (lambda: RESID_POST[:-1], r"resid.post\[:-1\] needs the number of layers"),
    "subgraph's name": (lambda: LATENTS().within(MLP_OUT[0], "a/b"), "'a/b' cannot name a subgraph"),
    "no subgraph": (lambda: LATENTS().within(MLP_OUT[0], ""), "a site and a subgraph name go together"),
    "type's name": (lambda: LocationType("Attn-Z", STREAM, 1), "'Attn-Z' cannot name a location type"),
    "type's .grad": (lambda: LocationType("x.grad", STREAM, 1), "not ending in '.grad'"),
    "stack": (lambda: LocationType("x", STREAM, 1, stack="decode"), "unknown stack 'decode': did you mean"),
    "twice": (lambda: LocationType("x", (*STREAM, Dimension.POS), 1), "x repeats a dimension: batch pos pos"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_a_location_that_cannot_exist_says_why(make: Callable[[], Any], message: str):
    with unchecked(), pytest.raises(LocationError, match=message):
        make()


def test_a_malformed_type_is_not_declared():
    with pytest.raises(LocationError):
        LocationType("not.declared", STREAM, 1, stack="nowhere")
    assert "not.declared" not in map(str, declared())


HIJACKED: dict[str, Callable[[], Any]] = {
    "axes": lambda: LocationType("attn.z", STREAM, 70),
    "stage": lambda: LocationType("resid.post", RESID_POST.dims, 7),
    "layers": lambda: LocationType("latents", LATENTS.dims, 20),
}


@pytest.mark.parametrize("declare", HIJACKED.values(), ids=HIJACKED)
def test_a_name_of_the_vocabulary_is_not_taken_by_another_type(declare: Callable[[], Any]):
    before = declared()
    with pytest.raises(LocationError, match="is a location type of the standard vocabulary, with the axes"):
        declare()
    assert declared() == before


def test_the_same_declaration_and_one_of_the_users_own_may_be_repeated():
    assert LocationType("attn.z", ATTN_Z.dims, ATTN_Z.stage) == ATTN_Z
    LocationType("mine.once", STREAM, 1)
    again = LocationType("mine.once", STREAM, 2)
    assert Location.parse("mine.once[0]").type == again


def test_stacks_of_the_vocabulary_are_the_known_ones():
    assert {kind.stack for kind in declared()} == set(STACKS)


def test_steps_can_be_chosen_at_every_location_and_count_from_the_prefill():
    chosen = RESID_POST[1].at(step=slice(1, None), pos=3)
    assert str(chosen) == "resid.post[1]@pos=3;step=1:"
    assert Location.parse(str(chosen)) == chosen
    assert LOGITS.at(step=2).dims == LOGITS.type.dims
    for index in (-1, [0, -2], slice(-3, None)):
        with pytest.raises(LocationError, match="steps count from the prefill, 0"):
            RESID_POST[1].at(step=index)


def test_a_type_is_no_collection_of_layers():
    with pytest.raises(LocationError, match=r"resid.post is a kind of location.*use graph.every\(\.\.\.\)"):
        list(RESID_POST)
    assert RESID_POST[3] in RESID_POST
    assert MLP_OUT[3] not in RESID_POST


def test_integers_of_other_libraries_are_integers():
    import numpy as np

    assert RESID_POST[np.int64(3)] == RESID_POST[torch.tensor(3)] == RESID_POST[3]
    assert RESID_POST[np.array([1, 2])] == RESID_POST[[1, 2]]
    assert ATTN_Z[0].at(head=np.int64(3), pos=torch.tensor([1, 2])) == ATTN_Z[0].at(head=3, pos=[1, 2])


@pytest.mark.parametrize("layer", [True, "3", 1.5, [0, True], None], ids=repr)
def test_what_is_no_layer_is_refused(layer: Any):
    with unchecked(), pytest.raises(LocationError, match="a layer is an int, a slice or a list of ints"):
        RESID_POST[layer]
