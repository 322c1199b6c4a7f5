"""The small English of the demo model: sentences whose next word is a fact about the sentence.

Three kinds of text, each with a way to sample it, and pairs to test it on:

* indirect objects: "After John and Mary went to the store, Mary gave a book to" -> John
* agreement:        "The keys to the cabinet" -> are, not is
* repeated spans:   "lamp river door, lamp river" -> door, whatever the words

Every function is pure: the same random state gives the same text. What is `withheld` is never
sampled for training, and is all that the pairs of indirect objects and of agreement are made of.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from random import Random
from typing import Final
from zlib import crc32

# fmt: off
NAMES: Final = (
    "John", "Mary", "Tom", "Anna", "Paul", "Sarah", "David", "Emma", "James", "Lucy", "Peter",
    "Alice", "Mark", "Julia", "Robert", "Laura", "Henry", "Kate", "George", "Helen", "Simon",
    "Claire", "Daniel", "Rachel",
)
PLACES: Final = (
    "store", "park", "school", "office", "station", "garden", "hospital", "market", "library",
    "beach", "kitchen", "harbour",
)
# fmt: on
# All of three words, so that pairs of one template agree position by position.
OBJECTS: Final = (
    "bottle of milk",
    "cup of tea",
    "bag of apples",
    "basket of fruit",
    "box of nails",
    "piece of cake",
    "book of maps",
    "ring of gold",
    "glass of water",
    "jar of honey",
    "pair of gloves",
    "bunch of keys",
)
TEMPLATES: Final = (
    "After {first} and {second} went to the {place}, {subject} gave a {object} to",
    "When {first} and {second} got a {object} at the {place}, {subject} decided to give it to",
    "Then, {first} and {second} went to the {place}. {subject} gave a {object} to",
    "While {first} and {second} were working at the {place}, {subject} handed a {object} to",
    "Friends {first} and {second} found a {object} at the {place}. {subject} gave it to",
    "Then, {first} and {second} had a long talk. After that, {subject} sent a {object} to",
    "{first} and {second} were at the {place} yesterday, and {subject} passed a {object} to",
    "After lunch, {first} and {second} walked to the {place}, where {subject} showed a {object} to",
    "At the {place}, {first} met {second} before the rain started. {subject} brought a {object} to",
    "{first} sat next to {second} at the {place}, so {subject} lent a {object} to",
)

NOUNS: Final = (
    ("key", "keys"),
    ("cabinet", "cabinets"),
    ("dog", "dogs"),
    ("boy", "boys"),
    ("girl", "girls"),
    ("teacher", "teachers"),
    ("doctor", "doctors"),
    ("farmer", "farmers"),
    ("child", "children"),
    ("picture", "pictures"),
    ("door", "doors"),
    ("car", "cars"),
    ("tree", "trees"),
    ("house", "houses"),
)
PREPOSITIONS: Final = ("to", "near", "behind", "with", "next to", "beside")
VERBS: Final = (("is", "are"), ("was", "were"), ("looks", "look"), ("seems", "seem"))
PREDICATES: Final = ("old", "new", "red", "quiet", "small", "very old", "rather small", "ready")

SPAN_LENGTHS: Final = (4, 10)
WITHHELD_ONE_IN: Final = 5


@dataclass(frozen=True)
class Pair:
    """A prompt and its corruption, of equally many tokens, with opposite answers.

    The word after `text` is `answer` and not `wrong`; after `corrupt` it is the other way round.
    """

    text: str
    corrupt: str
    answer: str
    wrong: str
    template: int
    """Pairs of one template share all but the words filled in."""


def withheld(*parts: str | int) -> bool:
    """Whether this combination is kept from training: crc32(parts) mod 5 = 0."""
    return crc32(" ".join(map(str, parts)).encode()) % WITHHELD_ONE_IN == 0


@cache
def words() -> tuple[str, ...]:
    """Every word and mark of the grammar, sorted."""
    filled = re.sub(r"\{\w+\}", "", " ".join(TEMPLATES))
    listed = [filled, *NAMES, *PLACES, *OBJECTS, *PREPOSITIONS, *PREDICATES, "The the and , ."]
    inflected = [form for forms in (*NOUNS, *VERBS) for form in forms]
    return tuple(sorted(set(re.findall(r"\w+|[^\w\s]", " ".join([*listed, *inflected])))))


# --- indirect objects -------------------------------------------------------------------------


@cache
def mentions(template: int, *, held_out: bool) -> tuple[tuple[str, str], ...]:
    """The ordered pairs of names that a template may mention: withheld ones, or all the others."""
    return tuple(
        (first, second)
        for first, second in permutations(NAMES, 2)
        if withheld(template, first, second) == held_out
    )


def indirect_object(rng: Random, *, held_out: bool, template: int | None = None) -> Pair:
    """A sentence that lacks its last word: the one of two names that was not named again.

    The name mentioned twice is the first or the second with equal chance (BABA or ABBA), and the
    corruption repeats the other name, so neither place nor sentence gives the answer away.
    """
    template = rng.randrange(len(TEMPLATES)) if template is None else template
    first, second = rng.choice(mentions(template, held_out=held_out))
    subject, answer = (first, second) if rng.random() < 0.5 else (second, first)
    slots = {
        "first": first,
        "second": second,
        "place": rng.choice(PLACES),
        "object": rng.choice(OBJECTS),
    }
    return Pair(
        text=TEMPLATES[template].format(subject=subject, **slots),
        corrupt=TEMPLATES[template].format(subject=answer, **slots),
        answer=answer,
        wrong=subject,
        template=template,
    )


def third_person(rng: Random) -> str:
    """A sentence whose giver is a third name, so that either of the two others receives.

    It makes the usual three-name corruption of an indirect object a text like those trained on.
    """
    template = rng.randrange(len(TEMPLATES))
    first, second = rng.choice(mentions(template, held_out=False))
    subject = rng.choice([name for name in NAMES if name not in (first, second)])
    text = TEMPLATES[template].format(
        first=first,
        second=second,
        subject=subject,
        place=rng.choice(PLACES),
        object=rng.choice(OBJECTS),
    )
    return f"{text} {rng.choice((first, second))}."


# --- agreement --------------------------------------------------------------------------------


def agreement(rng: Random, *, held_out: bool) -> Pair:
    """A subject of either number, followed by up to two nouns of any number, lacking its verb.

    Withheld are combinations of the subject with what follows it. The corruption has the subject
    in the other number and keeps the nouns after it, so only the subject tells the answer.
    """
    while True:
        noun = rng.choice(NOUNS)
        distractors = rng.randint(1, 2) if held_out else rng.randint(0, 2)
        rest = "".join(
            f" {rng.choice(PREPOSITIONS)} the {rng.choice(rng.choice(NOUNS))}" for _ in range(distractors)
        )
        # A subject alone has too few forms to withhold any.
        if withheld(noun[0], rest) == held_out or not distractors:
            break
    number = rng.randrange(2)
    verb = rng.choice(VERBS)
    return Pair(
        text=f"The {noun[number]}{rest}",
        corrupt=f"The {noun[1 - number]}{rest}",
        answer=verb[number],
        wrong=verb[1 - number],
        template=distractors,
    )


def statement(rng: Random) -> str:
    """A whole sentence of a subject, its verb and a predicate."""
    pair = agreement(rng, held_out=False)
    return f"{pair.text} {pair.answer} {rng.choice(PREDICATES)}."


# --- repeated spans ---------------------------------------------------------------------------


def span(rng: Random, *, least: int = SPAN_LENGTHS[0]) -> list[str]:
    """Words drawn at random without order or repetition: nothing predicts them but a copy."""
    bare = [word for word in words() if word.isalpha()]
    return rng.sample(bare, rng.randint(least, SPAN_LENGTHS[1]))


def repetition(rng: Random) -> str:
    """A random span two or three times, with a comma between or nothing."""
    return rng.choice((", ", " ")).join([" ".join(span(rng))] * rng.choice((2, 2, 3))) + "."


def induction(rng: Random) -> Pair:
    """A random span and its beginning again: the next word is the one that followed before.

    The corruption has another word there, the first time. Random spans repeat themselves so rarely
    that none has to be withheld.
    """
    *once, other = span(rng, least=SPAN_LENGTHS[0] + 1)
    at = rng.randrange(1, len(once))
    again = " ".join(once[:at])
    changed = [*once[:at], other, *once[at + 1 :]]
    return Pair(
        text=f"{' '.join(once)}, {again}",
        corrupt=f"{' '.join(changed)}, {again}",
        answer=once[at],
        wrong=other,
        template=0,
    )


# --- documents and pairs ----------------------------------------------------------------------


def document(rng: Random) -> str:
    """One text to train on: a random span repeated, or a sentence, four of ten after another."""
    kind = rng.random()
    if kind < 0.5:
        pair = indirect_object(rng, held_out=False)
        text = f"{pair.text} {pair.answer}."
    elif kind < 0.55:
        text = third_person(rng)
    elif kind < 0.75:
        text = statement(rng)
    else:
        return repetition(rng)
    return f"{statement(rng)} {text}" if rng.random() < 0.4 else text


def ioi_pairs(n: int, seed: int = 0, template: int | None = None) -> list[Pair]:
    """`n` indirect-object pairs whose names the model never saw in that order in that template.

    Pairs of one `template` have the same length, and the names at the same positions.
    """
    return drawn(lambda rng: indirect_object(rng, held_out=True, template=template), n, seed)


def agreement_pairs(n: int, seed: int = 0) -> list[Pair]:
    """`n` agreement pairs whose subject the model never saw before these other nouns."""
    return drawn(lambda rng: agreement(rng, held_out=True), n, seed)


def induction_pairs(n: int, seed: int = 0) -> list[Pair]:
    """`n` pairs of repeated random spans."""
    return drawn(induction, n, seed)


def drawn(sample: Callable[[Random], Pair], n: int, seed: int) -> list[Pair]:
    """`n` samples from one random state."""
    rng = Random(seed)
    return [sample(rng) for _ in range(n)]
