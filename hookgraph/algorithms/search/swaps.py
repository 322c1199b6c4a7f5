"""Swaps: which token may take which place, and what each would change to first order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hookgraph.algorithms.search.examining import Examiner
from hookgraph.errors import InputError


@final
@dataclass(frozen=True, eq=False)
class Swaps:
    """Which tokens may stand where, besides those that do.

    Args:
        start: the tokens of x.
        allowed: the others.
        edits: how many may differ from x at once.
    """

    start: Int[Tensor, " pos"]
    allowed: Bool[Tensor, "pos vocab"]
    edits: int

    @staticmethod
    def of(
        examiner: Examiner,
        edits: int,
        positions: Sequence[int] | None,
        tokens: Sequence[int] | None,
        forbidden: Sequence[int],
        top_k: int | None,
    ) -> "Swaps":
        """Tokens that are allowed, and among the most likely ones after what precedes them in x.

        Nothing precedes the first token: it stays unless it is among `positions`, where any may replace it.

        Raises:
            InputError: an argument is out of range, or leaves nothing to swap.
        """
        start, vocabulary = examiner.tokens, len(examiner.embeddings)
        real = examiner.real.bool()
        if edits < 1:
            raise InputError(f"edits={edits}: a counterfactual differs in one token at least")
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k={top_k}: give how many likely tokens to choose from, or None for all")
        first = int(real.nonzero()[0])
        places = torch.zeros_like(real)
        if positions is None:
            places |= real
            places[first] = False
        else:
            places[[_within(p, real) for p in positions]] = True
        listed = torch.zeros(vocabulary, dtype=torch.bool, device=start.device)
        listed[_known(tokens, vocabulary, "tokens") if tokens is not None else slice(None)] = True
        listed[_known(forbidden, vocabulary, "forbidden")] = False
        allowed = places[:, None] & listed
        if top_k is not None:
            allowed &= _likely(examiner.base.logits[0], top_k, vocabulary, first)
        allowed[torch.arange(len(start)), start] = False
        if not bool(allowed.any()):
            raise InputError(
                f"no token may be replaced: {int(places.sum())} positions, {int(listed.sum())} tokens and "
                f"top_k={top_k} leave no swap; allow more of them"
            )
        return Swaps(start, allowed, edits)

    @property
    def count(self) -> int:
        """How many single swaps there are."""
        return int(self.allowed.sum())

    def scores(self, examiner: Examiner, texts: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """d effect / d embedding · (E[v] - E[t]): the change of each text's effect to first order by putting
        v where t stands; NaN where that is not allowed, or would be an edit too many.

        Source: Ebrahimi et al., "HotFlip", arXiv:1712.06751.
        """
        slopes, embeddings = examiner.slopes(texts), examiner.embeddings
        here = (slopes * embeddings[texts]).sum(-1, keepdim=True)
        scores = slopes @ embeddings.T - here
        return torch.where(self.open(texts), scores, torch.nan)

    def open(self, texts: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos vocab"]:
        """The swaps that each text may still undergo: where it is edited already, of that token too."""
        edited = texts != self.start
        room = (edited.sum(1) < self.edits)[:, None] | edited
        found = self.allowed & room[:, :, None]
        return found.scatter(2, texts[:, :, None], False)

    def mutated(
        self, examiner: Examiner, texts: Int[Tensor, "batch pos"], generator: torch.Generator
    ) -> Int[Tensor, "batch pos"]:
        """Each text after one more swap, drawn by |score|; one that no swap is open to stays as it is."""
        scores = self.scores(examiner, texts)
        found = [
            self.drawn(text[None], score[None], 1, generator)
            for text, score in zip(texts, scores, strict=True)
        ]
        pairs = zip(found, texts, strict=True)
        return torch.cat([new if len(new) else text[None] for new, text in pairs])

    def drawn(
        self,
        texts: Int[Tensor, "batch pos"],
        predicted: Float[Tensor, "batch pos vocab"],
        count: int,
        generator: torch.Generator,
    ) -> Int[Tensor, "... pos"]:
        """The texts after `count` swaps drawn without replacement, one in each.

        A swap is drawn with a chance in proportion to 1 / its rank by |prediction|, of which only the order
        is to be trusted: the largest of -log rank + Gumbel noise. With as many as there are, every swap is.

        Source: Kool et al., "Stochastic beams", arXiv:1903.06059.
        """
        sizes = predicted.abs().flatten().cpu()
        closed = sizes.isnan()
        order = sizes.masked_fill(closed, -1.0).argsort(descending=True, stable=True)
        drawn = torch.rand(len(order), generator=generator, dtype=torch.float64)
        keys = torch.empty_like(drawn)
        keys[order] = -torch.arange(1, len(order) + 1, dtype=drawn.dtype).log()
        keys = (keys - torch.log(-torch.log(drawn))).masked_fill(closed, -torch.inf)
        best = keys.topk(min(count, int((~closed).sum()))).indices.to(texts.device)
        rows, places, tokens = torch.unravel_index(best, predicted.shape)
        swapped = texts[rows].clone()
        swapped[torch.arange(len(best), device=texts.device), places] = tokens
        return swapped


def _likely(
    logits: Float[Tensor, "pos vocab"], top_k: int, vocabulary: int, first: int
) -> Bool[Tensor, "pos vocab"]:
    """Which tokens are among the most likely ones at each position; all of them at the first."""
    found = torch.zeros(len(logits), vocabulary, dtype=torch.bool, device=logits.device)
    best = logits[:-1, :vocabulary].topk(min(top_k, logits.shape[1], vocabulary)).indices
    found[1:].scatter_(1, best, True)
    found[first] = True
    return found


def _within(position: int, real: Bool[Tensor, " pos"]) -> int:
    """A position, counted from the start.

    Raises:
        InputError: it is out of range, or padding.
    """
    length = len(real)
    if not -length <= position < length:
        raise InputError(f"position {position} is out of range, the text has {length} tokens")
    if not bool(real[position]):
        raise InputError(f"position {position} is padding: positions count the columns of the inputs")
    return position % length


def _known(tokens: Sequence[int], vocabulary: int, name: str) -> Sequence[int]:
    """Tokens of the vocabulary.

    Raises:
        InputError: one is not.
    """
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise InputError(f"{name}: there is no token {token}, the vocabulary has {vocabulary}")
    return list(tokens)
