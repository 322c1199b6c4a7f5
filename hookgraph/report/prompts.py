"""A clean and a corrupt prompt with the model's answers, ready to be shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor


@final
@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, its tokens, and how likely the model goes on with either answer."""

    text: str
    tokens: tuple[str, ...]
    answer: float
    wrong: float
    difference: float
    """logit(answer) - logit(wrong)"""

    @staticmethod
    def read(
        text: str, tokens: Sequence[str], logits: Float[Tensor, "pos vocab"], answer: int, wrong: int
    ) -> "Prompt":
        """The prompt with what the logits of its last position say of two token ids."""
        last = logits[-1].double()
        likely = last.softmax(-1)
        difference = float(last[answer] - last[wrong])
        return Prompt(text, tuple(tokens), float(likely[answer]), float(likely[wrong]), difference)


@final
@dataclass(frozen=True, slots=True)
class PromptPair:
    """A clean prompt, whose answer is `answer`, and a corrupt one."""

    clean: Prompt
    corrupt: Prompt
    answer: str
    wrong: str

    @property
    def labels(self) -> tuple[str, ...]:
        """One label per position: the token, or both where clean and corrupt differ."""
        both = zip(self.clean.tokens, self.corrupt.tokens, strict=True)
        return tuple(a if a == b else f"{a} → {b}" for a, b in both)

    def differs(self, position: int) -> bool:
        """Whether clean and corrupt have other tokens at a position."""
        return self.clean.tokens[position] != self.corrupt.tokens[position]
