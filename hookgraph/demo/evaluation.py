"""How well a model of the grammar answers, on texts it was not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hookgraph.demo.grammar import (
    Pair,
    agreement_pairs,
    document,
    induction_pairs,
    ioi_pairs,
)

PROMPTS: Final = 1000
SEED: Final = 20_000
"""Far from the seed of training; it only matters for the texts that cannot be withheld."""


@dataclass(frozen=True)
class Figures:
    """What the model card states, each over `PROMPTS` prompts: clean and corrupt ones of pairs."""

    ioi_accuracy: float
    """Indirect objects: share of prompts whose most likely next word is the answer."""
    ioi_logit_difference: float
    """Indirect objects: mean of logit(answer) - logit(wrong)."""
    ioi_least_logit_difference: float
    """Indirect objects: the least logit(answer) - logit(wrong)."""
    agreement_accuracy: float
    """Agreement: share of prompts with logit(right form) > logit(wrong form) of the same verb."""
    induction_accuracy: float
    """Repeated spans: share of prompts whose most likely next word is the one that followed."""
    loss: float
    """Mean of -ln p(next word) over documents, all kinds of text mixed."""


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Figures:
    """Every figure of the model card, from fixed seeds."""
    ioi = answer_logits(model, tokenizer, ioi_pairs(PROMPTS // 2, SEED))
    agreement = answer_logits(model, tokenizer, agreement_pairs(PROMPTS // 2, SEED))
    induction = answer_logits(model, tokenizer, induction_pairs(PROMPTS // 2, SEED))
    difference = ioi.right - ioi.wrong
    return Figures(
        ioi_accuracy=share(ioi.right >= ioi.best),
        ioi_logit_difference=difference.mean().item(),
        ioi_least_logit_difference=difference.min().item(),
        agreement_accuracy=share(agreement.right > agreement.wrong),
        induction_accuracy=share(induction.right >= induction.best),
        loss=mean_loss(model, tokenizer, Random(SEED)),
    )


@dataclass(frozen=True)
class AnswerLogits:
    """Logits after each clean, then each corrupt prompt."""

    right: Float[Tensor, " batch"]
    wrong: Float[Tensor, " batch"]
    best: Float[Tensor, " batch"]
    """The largest of the vocabulary."""


@torch.no_grad()
def answer_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]
) -> AnswerLogits:
    """Run both sides of the pairs; the answer of a corrupt prompt is the `wrong` of its pair."""
    texts = [pair.text for pair in pairs] + [pair.corrupt for pair in pairs]
    answers = [pair.answer for pair in pairs] + [pair.wrong for pair in pairs]
    others = [pair.wrong for pair in pairs] + [pair.answer for pair in pairs]
    logits = next_logits(model, tokenizer, texts)
    rows = torch.arange(len(texts))
    return AnswerLogits(
        right=logits[rows, tokenizer.convert_tokens_to_ids(answers)],
        wrong=logits[rows, tokenizer.convert_tokens_to_ids(others)],
        best=logits.max(-1).values,
    )


@torch.no_grad()
def next_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> Float[Tensor, "batch vocab"]:
    """Logits of the word after each text, padded on the right so that positions need no shift."""
    batch = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    logits = model(**batch).logits
    return logits[torch.arange(len(texts)), batch["attention_mask"].sum(-1) - 1]


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rng: Random) -> float:
    """Mean next-word loss over `PROMPTS` fresh documents."""
    return loss(model, documents(tokenizer, rng, PROMPTS)).item()


def documents(tokenizer: PreTrainedTokenizerFast, rng: Random, count: int) -> Int[Tensor, "batch pos"]:
    """Documents from beginning to end mark, padded on the right, so that each starts at 0."""
    texts = [document(rng) + str(tokenizer.eos_token) for _ in range(count)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return batch["input_ids"]


def loss(model: PreTrainedModel, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Mean -ln p(next word), padding left out."""
    padding = model.config.pad_token_id
    seen = ids[:, :-1]
    logits = model(input_ids=seen, attention_mask=(seen != padding).long()).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=padding)


def share(true: Tensor) -> float:
    """The share of true entries."""
    return true.double().mean().item()
