"""`Measured`: texts, and what was measured of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, final

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Objective: TypeAlias = Literal["effect", "gradient", "edits", "similarity", "fluency"]
"""What is made large: |effect|, the gradient, - edited tokens, the similarity of both texts, - mean loss."""


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """Texts y, all as long as the text x that the search started from, with one number of each per row.

    Args:
        tokens: of the texts.
        metric: m(y).
        effect: m(x with the target's nodes of y) - m(x).
        gradient: the lesser norm of dm/dnodes in x's run, with the nodes of x and with those of y: where it
            is small, the metric is saturated.
        edits: how many tokens differ from those of x.
        similarity: cosine of the token embeddings of x and y, mean over positions.
        loss: -log p(next token) of y under the model, mean over positions: the log of its perplexity.
        answers: the most likely next token where the metric reads the logits.
        differs: whether the answers differ from those of x.
    """

    tokens: Int[Tensor, "batch pos"]
    metric: Float[Tensor, " batch"]
    effect: Float[Tensor, " batch"]
    gradient: Float[Tensor, " batch"]
    edits: Int[Tensor, " batch"]
    similarity: Float[Tensor, " batch"]
    loss: Float[Tensor, " batch"]
    answers: Int[Tensor, " batch"]
    differs: Bool[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, chosen: Int[Tensor, "..."]) -> "Measured":
        """Some of the texts, by number."""
        return Measured(**{name: value[chosen] for name, value in self.tensors().items()})

    def tensors(self) -> Mapping[str, Shaped[Tensor, "..."]]:
        """Every field by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def values(self, objectives: Sequence[Objective]) -> Float[Tensor, "batch ..."]:
        """The numbers that are to be large, a column each."""
        known: dict[Objective, Tensor] = {
            "effect": self.effect.abs(),
            "gradient": self.gradient,
            "edits": -self.edits.to(self.effect),
            "similarity": self.similarity,
            "fluency": -self.loss,
        }
        return torch.stack([known[name].to(self.effect) for name in objectives], 1)

    @staticmethod
    def joined(parts: Sequence["Measured"]) -> "Measured":
        """The texts of all parts."""
        return Measured(
            **{name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()}
        )
