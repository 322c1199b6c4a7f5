"""The grammar: what is withheld stays withheld, and a corruption flips the answer and no more."""

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookgraph.demo.grammar import (
    NAMES,
    OBJECTS,
    TEMPLATES,
    VERBS,
    WITHHELD_ONE_IN,
    Pair,
    agreement,
    agreement_pairs,
    document,
    indirect_object,
    induction_pairs,
    ioi_pairs,
    mentions,
    repetition,
    statement,
    third_person,
    withheld,
    words,
)

seeds = st.integers(0, 2**32)
PAIRS = {"ioi": ioi_pairs, "agreement": agreement_pairs, "induction": induction_pairs}
PUBLISHED = "After John and Mary went to the store, {} gave a bottle of milk to"


def split(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def mentioned(pair: Pair) -> tuple[int, str, str]:
    """The template, and the two names in the order of their first mention."""
    first, second = dict.fromkeys(word for word in split(pair.text) if word in NAMES)
    return pair.template, first, second


def test_there_are_enough_names_and_templates():
    assert len(set(NAMES)) >= 20
    assert len(set(TEMPLATES)) >= 6


def test_templates_differ_in_where_the_names_stand():
    slots = {"first": "John", "second": "Mary", "subject": "Mary", "place": "park", "object": "ring"}
    texts = [split(template.format(**slots)) for template in TEMPLATES]
    places = {tuple(i for i, word in enumerate(text) if word in NAMES) for text in texts}
    assert len(places) >= 6


def test_the_published_sentence_can_be_said():
    slots = {"first": "John", "second": "Mary", "place": "store", "object": "bottle of milk"}
    assert TEMPLATES[0].format(subject="Mary", **slots) == PUBLISHED.format("Mary")
    assert "bottle of milk" in OBJECTS


@pytest.mark.parametrize("template", range(len(TEMPLATES)))
def test_held_out_names_are_disjoint_from_those_trained_on(template: int):
    trained = set(mentions(template, held_out=False))
    held_out = set(mentions(template, held_out=True))
    assert not trained & held_out
    assert len(trained | held_out) == len(NAMES) * (len(NAMES) - 1)
    assert len(held_out) == pytest.approx(len(trained | held_out) / WITHHELD_ONE_IN, rel=0.25)
    # Every name is trained on in both places, and tested.
    assert {first for first, _ in trained} == {second for _, second in trained} == set(NAMES)
    assert {name for names in held_out for name in names} == set(NAMES)


@given(seeds)
def test_an_indirect_object_is_on_the_side_of_the_split_asked_for(seed: int):
    for held_out in (True, False):
        pair = indirect_object(Random(seed), held_out=held_out)
        assert withheld(*mentioned(pair)) == held_out


@given(seeds)
def test_no_document_says_a_withheld_combination(seed: int):
    text = document(Random(seed))
    for template, shape in enumerate(TEMPLATES):
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[\\w ]+?)", re.escape(shape))
        found = re.search(rf"(?:^|\. ){pattern} \w+\.$", text)
        if found:
            assert not withheld(template, found["first"], found["second"])


@given(seeds)
def test_the_answer_is_the_name_not_repeated(seed: int):
    pair = indirect_object(Random(seed), held_out=True)
    names = [word for word in split(pair.text) if word in NAMES]
    assert len(names) == 3
    assert names[2] == pair.wrong
    assert set(names[:2]) == {pair.answer, pair.wrong}
    corrupt = [word for word in split(pair.corrupt) if word in NAMES]
    assert corrupt == [*names[:2], pair.answer]


@pytest.mark.parametrize("kind", PAIRS)
@given(seed=seeds)
def test_a_corruption_is_one_word(kind: str, seed: int):
    (pair,) = PAIRS[kind](1, seed)
    text, corrupt = split(pair.text), split(pair.corrupt)
    assert len(text) == len(corrupt)
    assert sum(a != b for a, b in zip(text, corrupt, strict=True)) == 1
    assert pair.answer != pair.wrong


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_repeat_for_a_seed(kind: str):
    assert PAIRS[kind](20, 3) == PAIRS[kind](20, 3)
    assert PAIRS[kind](20, 3) != PAIRS[kind](20, 4)
    assert len(PAIRS[kind](20, 3)) == 20
    assert PAIRS[kind](0) == []


@pytest.mark.parametrize("template", range(len(TEMPLATES)))
def test_pairs_of_one_template_agree_position_by_position(template: int):
    pairs = ioi_pairs(50, template=template)
    assert {pair.template for pair in pairs} == {template}
    texts = [split(pair.text) for pair in pairs]
    assert len({tuple(i for i, w in enumerate(text) if w in NAMES) for text in texts}) == 1
    assert len({len(text) for text in texts}) == 1


def test_either_name_is_repeated_equally_often():
    pairs = ioi_pairs(2000)
    first_repeated = sum(mentioned(pair)[1] == pair.wrong for pair in pairs)
    assert first_repeated == pytest.approx(1000, abs=100)


@given(seeds)
def test_agreement_follows_the_subject_alone(seed: int):
    pair = agreement(Random(seed), held_out=True)
    plural = split(pair.text)[1].endswith(("s", "children"))
    singulars, plurals = zip(*VERBS, strict=True)
    assert pair.answer in (plurals if plural else singulars)
    assert pair.wrong in (singulars if plural else plurals)


def test_agreement_has_distractors_of_the_other_number():
    texts = [split(pair.text) for pair in agreement_pairs(200)]
    opposed = [t for t in texts if t[1].endswith("s") != t[-1].endswith("s")]
    assert 50 < len(opposed) < 150


def test_held_out_agreement_is_disjoint_from_what_is_trained_on():
    rng = Random(0)
    trained = {agreement(rng, held_out=False).text for _ in range(5000)}
    assert not trained & {pair.text for pair in agreement_pairs(2000)}


@given(seeds)
def test_a_repeated_span_gives_its_answer(seed: int):
    (pair,) = induction_pairs(1, seed)
    for text, answer in ((pair.text, pair.answer), (pair.corrupt, pair.wrong)):
        once, again = text.split(", ")
        assert once.split()[len(again.split())] == answer
        assert once.startswith(again)


@given(seeds)
def test_every_text_is_made_of_the_words(seed: int):
    for sample in (document, statement, repetition, third_person):
        assert set(split(sample(Random(seed)))) <= set(words())


@given(seeds)
def test_a_third_person_is_not_one_of_the_two(seed: int):
    first, second, giver, receiver = (word for word in split(third_person(Random(seed))) if word in NAMES)
    assert giver not in (first, second)
    assert receiver in (first, second)
