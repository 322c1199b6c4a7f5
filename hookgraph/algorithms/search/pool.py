"""The texts that a search has measured, each once."""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.search.examining import Examiner
from hookgraph.algorithms.search.measured import Measured


@final
class Pool:
    """Every text measured so far.

    Args:
        examiner: measures them.
        tries: how many may be measured.
        bar: is told of each.
    """

    def __init__(self, examiner: Examiner, tries: int, bar: Progress) -> None:
        self.examiner, self._bar = examiner, bar
        self.left = tries
        """How many more may be measured."""
        self._effects: dict[tuple[int, ...], float] = {tuple(examiner.tokens.tolist()): 0.0}
        self._parts: list[Measured] = []

    def add(self, texts: Int[Tensor, "batch pos"], most: int | None = None) -> Measured | None:
        """Measure the first `most` new ones, as far as tries are left; None if there is none."""
        room = self.left if most is None else min(most, self.left)
        new: dict[tuple[int, ...], Tensor] = {}
        for key, text in zip(map(tuple, texts.tolist()), texts, strict=True):
            if key not in self._effects and len(new) < room:
                new[key] = text
        if not new:
            return None
        measured = self.examiner.measure(torch.stack([*new.values()]))
        self._effects.update(zip(new, measured.effect.tolist(), strict=True))
        self.left -= len(new)
        self._bar.advance(len(new))
        self._parts.append(measured)
        return measured

    def effects(self, texts: Int[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
        """Of texts that were measured, and 0 of others."""
        found = [self._effects.get(tuple(text), 0.0) for text in texts.tolist()]
        return torch.tensor(found, device=texts.device)

    @property
    def texts(self) -> Measured:
        """All of them, in the order in which they were measured; the start is none of them."""
        empty = self.examiner.start.rows(torch.zeros(0, dtype=torch.long))
        return Measured.joined([empty, *self._parts])
