"""Metrics: logits -> one number per example. Values that call, print, and remember what they measure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.errors import MetricError

Tokens: TypeAlias = int | Sequence[int] | Tensor
"""One token id for all examples, or one per example."""

Logits: TypeAlias = Float[Tensor, "batch pos vocab"]
PerExample: TypeAlias = Float[Tensor, " batch"]


@final
@dataclass(frozen=True, eq=False)
class LogitDifference:
    """logit[correct] - logit[wrong] at the answer position. Made by `logit_diff`."""

    correct: Tokens
    wrong: Tokens
    pos: Tokens = -1

    def __call__(self, logits: Logits) -> PerExample:
        """The value of each example."""
        at = _at(logits, self.pos)
        return _of(at, self.correct) - _of(at, self.wrong)


@final
@dataclass(frozen=True, eq=False)
class LogProbability:
    """log softmax(logits)[token] at the answer position, in nats. Made by `log_prob`."""

    token: Tokens
    pos: Tokens = -1

    def __call__(self, logits: Logits) -> PerExample:
        """The value of each example."""
        return _of(_at(logits, self.pos).log_softmax(-1), self.token)


@final
@dataclass(frozen=True, eq=False)
class Probability:
    """softmax(logits)[token] at the answer position. Made by `prob`."""

    token: Tokens
    pos: Tokens = -1

    def __call__(self, logits: Logits) -> PerExample:
        """The value of each example."""
        return _of(_at(logits, self.pos).softmax(-1), self.token)


def logit_diff(correct: Tokens, wrong: Tokens, pos: Tokens = -1) -> LogitDifference:
    """logit[correct] - logit[wrong] at position `pos`; each one for all examples, or one per example.

    >>> logit_diff(correct=7, wrong=3)
    LogitDifference(correct=7, wrong=3, pos=-1)
    """
    return LogitDifference(correct, wrong, pos)


def log_prob(token: Tokens, pos: Tokens = -1) -> LogProbability:
    """log softmax(logits)[token] at position `pos`, in nats; both for all examples, or one per example."""
    return LogProbability(token, pos)


def prob(token: Tokens, pos: Tokens = -1) -> Probability:
    """softmax(logits)[token] at position `pos`; each one for all examples, or one per example."""
    return Probability(token, pos)


def _at(logits: Logits, pos: Tokens) -> Float[Tensor, "batch vocab"]:
    if isinstance(pos, int):
        if not -logits.shape[1] <= pos < logits.shape[1]:
            raise MetricError(f"pos={pos} is out of range, the logits have {logits.shape[1]} positions")
        return logits[:, pos]
    return logits[torch.arange(len(logits), device=logits.device), _per_example(logits, pos, "pos")]


def _of(values: Float[Tensor, "batch vocab"], token: Tokens) -> PerExample:
    if isinstance(token, int):
        return values[:, token]
    return values.gather(1, _per_example(values, token, "token")[:, None])[:, 0]


def _per_example(values: Tensor, chosen: Tokens, name: str) -> Int[Tensor, " batch"]:
    found = torch.as_tensor(chosen, device=values.device, dtype=torch.long)
    if found.shape != values.shape[:1]:
        raise MetricError(
            f"{name} has shape {tuple(found.shape)} for a batch of {values.shape[0]}: give one for all, "
            "or one per example"
        )
    return found
