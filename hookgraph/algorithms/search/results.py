"""`Counterfactuals`: pairs of texts that no other pair of the search dominates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hookgraph.algorithms.search.drawing import scatter
from hookgraph.algorithms.search.examining import Examiner
from hookgraph.algorithms.search.fronts import dominated
from hookgraph.algorithms.search.measured import Measured, Objective
from hookgraph.errors import HookGraphError
from hookgraph.graph import storage
from hookgraph.graph.storage import Tensors
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "counterfactuals"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Counterfactuals:
    """The Pareto front of a search: texts y beside the text x, the largest |effect| first.

    Args:
        start: x as it was measured; its effect is 0.
        seen: every text that was measured.
        chosen: the numbers of the front's texts among them.
        target: the nodes whose effect was looked for.
        most: the largest loss of a text that counts: the log of the perplexity it may have.
        inputs: x as the model takes it.
        name: which of the inputs are the tokens.
        method: how texts were found.
        objectives: what is large in a good text.
        seed: of what was drawn.
        texts: tokens as text, where there is a tokenizer.
        metadata: the model's name, revision and dtype.
    """

    start: Measured
    seen: Measured
    chosen: tuple[int, ...]
    target: tuple[Location, ...]
    most: float
    inputs: Mapping[str, Shaped[Tensor, "..."]]
    name: str
    method: str
    objectives: tuple[Objective, ...]
    seed: int
    texts: Mapping[int, str] = field(default_factory=dict[int, str])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @staticmethod
    def of(
        examiner: Examiner,
        seen: Measured,
        most: float,
        *,
        method: str,
        objectives: tuple[Objective, ...],
        seed: int,
    ) -> "Counterfactuals":
        """The front of the texts that count."""
        start, graph = examiner.start, examiner.graph
        chosen = front(seen, objectives, most)
        shown = seen.rows(torch.tensor(chosen, dtype=torch.long))
        tokens = torch.cat([start.tokens.flatten(), shown.tokens.flatten(), start.answers, shown.answers])
        inputs = {k: v for k, v in examiner.base.inputs.items() if isinstance(v, Tensor)}
        return Counterfactuals(
            start=start,
            seen=seen,
            chosen=chosen,
            target=examiner.target,
            most=most,
            inputs=inputs,
            name=examiner.name,
            method=method,
            objectives=objectives,
            seed=seed,
            texts=graph.binding.token_texts(tokens.unique().tolist()),
            metadata=graph.binding.metadata,
        )

    def __len__(self) -> int:
        """How many pairs there are; none if nothing was found."""
        return len(self.chosen)

    @property
    def front(self) -> Measured:
        """The texts y of the front, with what was measured of each."""
        return self.seen.rows(torch.tensor(self.chosen, dtype=torch.long))

    @property
    def counts(self) -> Bool[Tensor, " batch"]:
        """Which of the texts seen count: the model's answer differs, and they are not too strange."""
        return counting(self.seen, self.most)

    @property
    def perplexity_ratio(self) -> Float[Tensor, " batch"]:
        """The perplexity of each text seen, as a multiple of x's."""
        return (self.seen.loss - self.start.loss).exp()

    @property
    def pairs(self) -> tuple[Mapping[str, Shaped[Tensor, "..."]], Mapping[str, Shaped[Tensor, "..."]]]:
        """Clean and corrupt inputs, a row per pair: `patching_effect(graph, *found.pairs, metric, at)`.

        Raises:
            HookGraphError: nothing was found, with what the search saw.
        """
        if not self.chosen:
            raise HookGraphError(self._nothing())
        clean = {k: v.repeat(len(self), *([1] * (v.ndim - 1))) for k, v in self.inputs.items()}
        return clean, {**clean, self.name: self.front.tokens}

    def to_frame(self) -> "pandas.DataFrame":
        """One row per pair: what is swapped at which positions, the answer, and what was measured."""
        import pandas as pd

        front = self.front
        columns: dict[str, Sequence[object]] = {
            "swaps": [self._swaps(text) for text in front.tokens],
            "answer": [self._word(token) for token in front.answers.tolist()],
            "metric": front.metric.tolist(),
            "effect": front.effect.tolist(),
            "gradient": front.gradient.tolist(),
            "similarity": front.similarity.tolist(),
            "perplexity": front.loss.exp().tolist(),
            "of the start's": (front.loss - self.start.loss).exp().tolist(),
        }
        return pd.DataFrame(columns)

    def _swaps(self, text: Int[Tensor, " pos"]) -> str:
        old = self.start.tokens[0]
        places = (text != old).nonzero().flatten().tolist()
        told = (f"{self._word(int(old[p]))} → {self._word(int(text[p]))} at {p}" for p in places)
        return ", ".join(told)

    def _word(self, token: int) -> str:
        return self.texts.get(token, str(token)).strip() or repr(self.texts[token])

    def __repr__(self) -> str:
        if not self.chosen:
            return self._nothing()
        table = self.to_frame().to_string(index=False, float_format=lambda x: f"{x:.3f}")
        return f"{self._about()}\n{table}"

    def _repr_html_(self) -> str:
        if not self.chosen:
            return f"<p>{self._nothing()}</p>"
        return self.to_frame().to_html(index=False, float_format=lambda x: f"{x:.3f}")

    def _about(self) -> str:
        start = self.start
        return (
            f"{len(self)} counterfactuals for {', '.join(map(str, self.target))}, of {len(self.seen)} texts "
            f"measured ({self.method}, seed {self.seed}); the start: answer "
            f"{self._word(int(start.answers))}, metric {float(start.metric):.3f}, perplexity "
            f"{float(start.loss.exp()):.2f}"
        )

    def _nothing(self) -> str:
        """What the search saw, and what to do."""
        differs = self.seen.differs
        least = self.perplexity_ratio[differs]
        closest = f", the closest at {float(least.min()):.2f} times the perplexity" if len(least) else ""
        return (
            f"no counterfactual among {len(self.seen)} texts measured: {int(differs.sum())} change the answer"
            f"{closest}. Allow more edits, positions, tokens (top_k) or tries, or a larger max_perplexity"
        )

    def plot(self) -> "matplotlib.figure.Figure":
        """|effect| over perplexity, of every text measured; those of the front are told by their swaps.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        parts = {"does not count": ~self.counts, "counts: the answer differs": self.counts}
        labels = {number: self._swaps(self.seen.tokens[number]) for number in self.chosen}
        what = ", ".join(map(str, self.target))
        return scatter(self.perplexity_ratio, self.seen.effect.abs(), parts, labels, what)

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        groups = {"start": self.start.tensors(), "seen": self.seen.tensors(), "inputs": self.inputs}
        tensors = {f"{group}/{k}": v for group, found in groups.items() for k, v in found.items()}
        header = {
            "chosen": self.chosen,
            "target": [str(x) for x in self.target],
            "most": self.most,
            "name": self.name,
            "method": self.method,
            "objectives": self.objectives,
            "seed": self.seed,
            "texts": {str(k): v for k, v in self.texts.items()},
            "metadata": dict(self.metadata),
        }
        storage.write(path, _KIND, tensors, header)

    @staticmethod
    def load(path: str | Path) -> "Counterfactuals":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, no saved counterfactuals, or of a location that is not declared.
        """
        tensors, header = storage.read(path, _KIND)
        return Counterfactuals(
            start=Measured(**_group(tensors, "start")),
            seen=Measured(**_group(tensors, "seen")),
            inputs=_group(tensors, "inputs"),
            chosen=tuple(header["chosen"]),
            target=tuple(storage.parse(path, name) for name in header["target"]),
            most=header["most"],
            name=header["name"],
            method=header["method"],
            objectives=tuple(header["objectives"]),
            seed=header["seed"],
            texts={int(k): v for k, v in header["texts"].items()},
            metadata=header["metadata"],
        )


def counting(texts: Measured, most: float) -> Bool[Tensor, " batch"]:
    """Which texts count: the model's answer differs, and their loss is not above `most`."""
    return texts.differs & (texts.loss <= most)


def front(texts: Measured, objectives: Sequence[Objective], most: float) -> tuple[int, ...]:
    """The texts that count and that no other one that counts dominates, the largest |effect| first."""
    counts = counting(texts, most).nonzero().flatten()
    kept = counts[~dominated(texts.values(objectives)[counts])]
    order = texts.effect[kept].abs().argsort(descending=True, stable=True)
    return tuple(kept[order].tolist())


def _group(tensors: Tensors, name: str) -> dict[str, Shaped[Tensor, "..."]]:
    return {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
