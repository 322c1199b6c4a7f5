"""Metrics: logits -> one number per example. Values that call, print, and remember what they measure.

Each says at which positions it reads the logits, so that a pass that asks for nothing else computes no
others: see `hookgraph.graph.measuring.ReadingMetric`. Any function logits -> (batch,) is a metric too.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hookgraph.errors import MetricError
from hookgraph.graph.measuring import Reads, take, widened

Tokens: TypeAlias = int | Sequence[int] | Tensor
"""One token id, or position, for all examples, or one per example."""

Logits: TypeAlias = Float[Tensor, "batch pos vocab"]
PerExample: TypeAlias = Float[Tensor, " batch"]


class PositionedMetric(ABC):
    """A metric that reads the logits at `reads`. Subclasses are frozen dataclasses: one field per fact."""

    @property
    @abstractmethod
    def reads(self) -> Reads | None:
        """The positions read: one for all examples, one or several per example; None for all of them."""

    @abstractmethod
    def of(self, logits: Logits) -> PerExample:
        """The value of each example, from the logits at those positions alone."""

    def __call__(self, logits: Logits) -> PerExample:
        """The value of each example, from the logits at every position.

        Raises:
            MetricError: a position is out of range, or there is not one entry per example.
        """
        reads, logits = self.reads, widened(logits)
        return self.of(logits if reads is None else take(logits, reads))

    def rows(self, chosen: slice) -> "PositionedMetric":
        """The same metric for some examples of the batch only."""
        parts = {f.name: _rows(getattr(self, f.name), chosen) for f in fields(self)}  # pyright: ignore[reportArgumentType] (dataclasses)
        return replace(self, **parts)  # pyright: ignore[reportArgumentType]


class AnswerMetric(PositionedMetric):
    """A metric of one position per example, at which answers are read."""

    pos: Tokens

    def __post_init__(self) -> None:
        """See that tokens and positions are whole numbers, one for all examples or one per example.

        Raises:
            MetricError: they are something else.
        """
        for field in fields(self):  # pyright: ignore[reportArgumentType] (dataclasses)
            _check_numbers(field.name, getattr(self, field.name))

    def check(self, batch: int) -> None:
        """See that there is one of everything for all examples, or one per example.

        Raises:
            MetricError: there are more, or fewer.
        """
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            found = torch.as_tensor(getattr(self, field.name))
            if found.ndim:
                _check_count(field.name, found, batch)

    @property
    def reads(self) -> Reads:
        """The answer position."""
        return _reads(self.pos)

    def of(self, logits: Logits) -> PerExample:
        """The value of each example, from the logits at the answer positions."""
        return self.at(logits[:, 0])

    @abstractmethod
    def at(self, logits: Float[Tensor, "batch vocab"]) -> PerExample:
        """The value of each example, from its logits at the answer position."""


@final
@dataclass(frozen=True, eq=False)
class LogitDifference(AnswerMetric):
    """logit[correct] - logit[wrong] at the answer position. Made by `logit_diff`."""

    correct: Tokens
    wrong: Tokens
    pos: Tokens = -1

    def at(self, logits: Float[Tensor, "batch vocab"]) -> PerExample:
        """The value of each example."""
        return _pick(logits, self.correct) - _pick(logits, self.wrong)

    @property
    def tokens(self) -> Int[Tensor, "..."]:
        """The two answers, of all examples."""
        return torch.cat([torch.as_tensor(x).cpu().flatten() for x in (self.correct, self.wrong)])

    def along(self, table: Float[Tensor, "d_model vocab"], batch: int) -> Float[Tensor, "batch d_model"]:
        """What an unembedding makes of the answers: the difference of their columns, a row per example."""
        return _column(table, self.correct, batch) - _column(table, self.wrong, batch)


@final
@dataclass(frozen=True, eq=False)
class Logit(AnswerMetric):
    """logit[token] at the answer position. Made by `logit`."""

    token: Tokens
    pos: Tokens = -1

    def at(self, logits: Float[Tensor, "batch vocab"]) -> PerExample:
        """The value of each example."""
        return _pick(logits, self.token)

    @property
    def tokens(self) -> Int[Tensor, "..."]:
        """The answer of each example."""
        return torch.as_tensor(self.token).cpu().flatten()

    def along(self, table: Float[Tensor, "d_model vocab"], batch: int) -> Float[Tensor, "batch d_model"]:
        """What an unembedding makes of the answer: its column, a row per example."""
        return _column(table, self.token, batch)


@final
@dataclass(frozen=True, eq=False)
class LogProbability(AnswerMetric):
    """log softmax(logits)[token] at the answer position, in nats. Made by `log_prob`."""

    token: Tokens
    pos: Tokens = -1

    def at(self, logits: Float[Tensor, "batch vocab"]) -> PerExample:
        """The value of each example."""
        return _pick(logits.log_softmax(-1), self.token)


@final
@dataclass(frozen=True, eq=False)
class Probability(AnswerMetric):
    """softmax(logits)[token] at the answer position. Made by `prob`."""

    token: Tokens
    pos: Tokens = -1

    def at(self, logits: Float[Tensor, "batch vocab"]) -> PerExample:
        """The value of each example."""
        return _pick(logits.softmax(-1), self.token)


@final
@dataclass(frozen=True, eq=False)
class Margin(AnswerMetric):
    """logit[token] - the largest other logit, at the answer position. Made by `margin`."""

    token: Tokens
    pos: Tokens = -1

    def at(self, logits: Float[Tensor, "batch vocab"]) -> PerExample:
        """The value of each example."""
        chosen = _per_example(logits, self.token, "token")[:, None]
        rivals = logits.scatter(1, chosen, -torch.inf).amax(-1)
        return logits.gather(1, chosen)[:, 0] - rivals


@final
@dataclass(frozen=True, eq=False)
class KullbackLeibler(PositionedMetric):
    """KL(reference ‖ this) of the next-token distributions, in nats, mean over positions. Made by `kl_to`."""

    reference: Float[Tensor, "batch pos vocab"]
    """Log-probabilities at the positions read."""
    pos: Tokens | None = -1

    @property
    def reads(self) -> Reads | None:
        """The positions compared."""
        return None if self.pos is None else _reads(self.pos)

    def of(self, logits: Logits) -> PerExample:
        """The value of each example."""
        if logits.shape != self.reference.shape:
            raise MetricError(
                f"the logits have shape {tuple(logits.shape)}, the reference {tuple(self.reference.shape)}: "
                "give the reference's logits on as many examples and positions"
            )
        gap = self.reference - logits.log_softmax(-1)
        return (self.reference.exp() * gap).sum(-1).mean(-1)


@final
@dataclass(frozen=True, eq=False)
class CrossEntropy(PositionedMetric):
    """-log p(next token) in nats, mean over the positions of an example. Made by `cross_entropy`."""

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None = None

    @property
    def reads(self) -> None:
        """All positions."""
        return None

    def of(self, logits: Logits) -> PerExample:
        """The value of each example."""
        if logits.shape[:2] != self.ids.shape:
            raise MetricError(
                f"the logits have {tuple(logits.shape[:2])} examples and positions, the tokens "
                f"{tuple(self.ids.shape)}: give the tokens that are run"
            )
        surprise = -logits[:, :-1].log_softmax(-1).gather(2, self.ids[:, 1:, None])[..., 0]
        if self.mask is None:
            return surprise.mean(-1)
        real = (self.mask[:, 1:] & self.mask[:, :-1]).to(surprise.dtype)
        return (surprise * real).sum(-1) / real.sum(-1)


def logit_diff(correct: Tokens, wrong: Tokens, pos: Tokens = -1) -> LogitDifference:
    """logit[correct] - logit[wrong] at position `pos`; each one for all examples, or one per example.

    >>> logit_diff(correct=7, wrong=3)
    LogitDifference(correct=7, wrong=3, pos=-1)
    """
    return LogitDifference(correct, wrong, pos)


def logit(token: Tokens, pos: Tokens = -1) -> Logit:
    """logit[token] at position `pos`; each one for all examples, or one per example."""
    return Logit(token, pos)


def log_prob(token: Tokens, pos: Tokens = -1) -> LogProbability:
    """log softmax(logits)[token] at position `pos`, in nats; both for all examples, or one per example."""
    return LogProbability(token, pos)


def prob(token: Tokens, pos: Tokens = -1) -> Probability:
    """softmax(logits)[token] at position `pos`; each one for all examples, or one per example."""
    return Probability(token, pos)


def margin(token: Tokens, pos: Tokens = -1) -> Margin:
    """logit[token] - the largest other logit at position `pos`: above 0 where the token is the answer."""
    return Margin(token, pos)


def kl_to(reference: Logits, pos: Tokens | None = -1) -> KullbackLeibler:
    """KL(softmax(reference) ‖ softmax(logits)) at position `pos`, in nats; with pos=None mean over all.

    Args:
        reference: logits of the run to compare with, at every position: `graph.run(clean).logits`.
        pos: one position for all examples, one per example, or None.
    """
    read = reference if pos is None else take(reference, _reads(pos))
    wide = torch.promote_types(read.dtype, torch.float32)
    return KullbackLeibler(read.detach().to(wide).log_softmax(-1), pos)


def cross_entropy(tokens: Int[Tensor, "batch pos"], mask: Tensor | None = None) -> CrossEntropy:
    """Mean over positions of -log p(next token), in nats.

    Args:
        tokens: the tokens that are run.
        mask: which of them are real, as an attention mask says; all by default.

    Raises:
        MetricError: the tokens are no ids of shape (batch, pos), or the mask has another shape.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MetricError(
            f"cross_entropy takes the token ids that are run, of shape (batch, pos): {tokens!r}"
        )
    if mask is not None and mask.shape != tokens.shape:
        raise MetricError(
            f"the mask has shape {tuple(mask.shape)}, the tokens {tuple(tokens.shape)}: one entry per token"
        )
    return CrossEntropy(tokens, None if mask is None else mask.bool())


def _check_numbers(name: str, given: Tokens) -> None:
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        kinds = "positions" if name == "pos" else "token ids, which a tokenizer makes of text"
        raise MetricError(f"{name}={given!r}: give {kinds}, as whole numbers")
    if found.ndim > 1:
        raise MetricError(
            f"{name} has shape {tuple(found.shape)}: give one for all examples, or one per example; add up "
            "metrics in a function of your own where there are several answers"
        )
    if name != "pos" and found.numel() and int(found.min()) < 0:
        raise MetricError(f"{name}={int(found.min())} is no token: the first is 0")


def _reads(pos: Tokens) -> Reads:
    if isinstance(pos, int):
        return pos
    found = torch.as_tensor(pos, dtype=torch.long)
    return found if found.ndim else int(found)


def _pick(values: Float[Tensor, "batch vocab"], token: Tokens) -> PerExample:
    if isinstance(token, int):
        _check_vocabulary(token, values.shape[-1])
        return values[:, token]
    return values.gather(1, _per_example(values, token, "token")[:, None])[:, 0]


def _column(table: Float[Tensor, "d_model vocab"], token: Tokens, batch: int) -> Float[Tensor, "..."]:
    return table.mT[_per_example(table[:1].expand(batch, -1), token, "token")]


def _per_example(values: Tensor, chosen: Tokens, name: str) -> Int[Tensor, " batch"]:
    found = torch.as_tensor(chosen, dtype=torch.long)
    if found.numel() and found.device.type == "cpu":
        _check_vocabulary(int(found.max()), values.shape[1])
    found = found.to(values.device)
    found = found.expand(values.shape[0]) if found.ndim == 0 else found
    _check_count(name, found, values.shape[0])
    return found


def _check_vocabulary(token: int, size: int) -> None:
    if token >= size:
        raise MetricError(f"token {token} is out of range, there are {size} logits")


def _check_count(name: str, given: Int[Tensor, " batch"], batch: int) -> None:
    if len(given) != batch:
        raise MetricError(
            f"{name} has shape {tuple(given.shape)} for a batch of {batch}: give one for all, or one per "
            "example"
        )


def _rows(value: Any, chosen: slice) -> Any:
    """The part of a field that belongs to some examples; what holds for all of them is kept."""
    if isinstance(value, Tensor):
        return value[chosen] if value.ndim else value
    return value[chosen] if isinstance(value, Sequence) else value
