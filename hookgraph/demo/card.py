"""The model card: written from the figures, and read back for comparison."""

import re
from dataclasses import asdict, fields

from hookgraph.demo.evaluation import PROMPTS, Figures
from hookgraph.demo.grammar import NAMES, TEMPLATES, WITHHELD_ONE_IN, words

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The demo model of hookgraph

A GPT-2 of 4 layers, 8 heads and 128 dimensions ({parameters:,} parameters, float32) with a
word-level tokenizer, for examples and tests that need a model which does something and is small.
It knows a small English of {words} words only: see `hookgraph/demo/grammar.py`.

* Indirect objects: "After John and Mary went to the store, Mary gave a bottle of milk to" John
* Agreement: "The keys to the cabinet" are
* Repeated spans: "lamp river door, lamp river" door

## Figures

On {prompts} prompts of each kind. Of the {names} names and {templates} templates, one in
{one_in} combinations of a template with an ordered pair of names was never trained on, and the
indirect objects are measured on those alone; likewise agreement, on subjects never seen before the
same other nouns. Repeated spans are random words in random order.

| figure | value |
|---|---|
{table}

## Tokens

One token per word or mark, `John` with or without a space before it. `<bos>` is put before every
text, `<eos>` is not put after it. Batches are padded on the left. Weights are tied: the embedding
is also the unembedding.

## Training

`python -m hookgraph.demo.train`, seed {seed}: {steps} steps of {batch} fresh documents, AdamW with
a cosine schedule, minutes on two CPU cores. Half the documents hold an indirect object, a quarter
are repeated spans, the others are statements; one in twenty names a third person as the giver, so
that the usual three-name corruption is not foreign to the model.

## Limits

Any word outside the grammar is `<unk>`. The model says nothing about people, stores or milk.
"""


def model_card(parameters: int, seed: int, steps: int, batch: int, figures: Figures) -> str:
    """The text of the card, one table row per figure."""
    rows = [f"| {name} | {value:.4f} |" for name, value in asdict(figures).items()]
    return CARD.format(
        parameters=parameters,
        seed=seed,
        steps=steps,
        batch=batch,
        prompts=PROMPTS,
        words=len(words()),
        names=len(NAMES),
        templates=len(TEMPLATES),
        one_in=WITHHELD_ONE_IN,
        table="\n".join(rows),
    )


def stated_figures(card: str) -> Figures:
    """The figures that a card states."""
    stated = dict(re.findall(r"^\| (\w+) \| (-?[\d.]+) \|$", card, flags=re.MULTILINE))
    return Figures(**{field.name: float(stated[field.name]) for field in fields(Figures)})
