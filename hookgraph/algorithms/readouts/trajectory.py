"""`PredictionTrajectory`: what a model would say after each layer, and how far that is from what it says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.errors import HookGraphError, nearest
from hookgraph.graph import storage
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

Measure: TypeAlias = Literal["log_prob", "entropy", "divergence"]

_KIND = "prediction trajectory"
_TENSORS = ("tokens", "log_probs", "entropy", "divergence", "followed_log_probs", "followed_ranks")
_TITLES = {
    "log_prob": "log p of the likeliest token, nats",
    "entropy": "entropy, nats",
    "divergence": "KL(model ‖ lens), nats",
}


@final
@dataclass(frozen=True, eq=False, repr=False)
class PredictionTrajectory:
    """What a lens makes of the stream after each layer.

    Args:
        locations: the residuals that were read, in causal order.
        positions: the positions that were read.
        tokens: the k most likely tokens, the likeliest first.
        log_probs: their log-probabilities, in nats.
        entropy: of the whole distribution, in nats.
        divergence: KL(p ‖ lens) from what the model says, in nats.
        followed: tokens that were asked for.
        followed_log_probs: their log-probabilities, in nats.
        followed_ranks: how many tokens are likelier than each.
        lens: the kind of lens.
        metadata: the model's name, revision and dtype.
    """

    locations: tuple[Location, ...]
    positions: tuple[int, ...]
    tokens: Int[Tensor, "layer batch pos rank"]
    log_probs: Float[Tensor, "layer batch pos rank"]
    entropy: Float[Tensor, "layer batch pos"]
    divergence: Float[Tensor, "layer batch pos"]
    followed: tuple[int, ...]
    followed_log_probs: Float[Tensor, "layer batch pos ..."]
    followed_ranks: Int[Tensor, "layer batch pos ..."]
    lens: str
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    _names: Mapping[int, str] = field(default_factory=dict[int, str])

    def name(self, token: int) -> str:
        """A token as text, where the graph was bound with a tokenizer; else its number."""
        return self._names.get(token, str(token))

    def to_frame(self) -> "pandas.DataFrame":
        """One row per location, example and position: its likeliest token, and how sure and how far it is."""
        import pandas as pd

        rows: list[dict[str, object]] = []
        for layer, example, pos in _places(self.entropy):
            here = (layer, example, pos)
            rows.append(
                {
                    "location": str(self.locations[layer]),
                    "batch": example,
                    "pos": self.positions[pos],
                    "token": self.name(int(self.tokens[here][0])),
                    "log_prob": float(self.log_probs[here][0]),
                    "entropy": float(self.entropy[here]),
                    "divergence": float(self.divergence[here]),
                }
            )
            for i, token in enumerate(self.followed):
                rows[-1][f"log_prob of {self.name(token)}"] = float(self.followed_log_probs[here][i])
                rows[-1][f"rank of {self.name(token)}"] = int(self.followed_ranks[here][i])
        return pd.DataFrame(rows)

    def likeliest(self) -> "pandas.DataFrame":
        """One row per location, example, position and rank: the k most likely tokens."""
        import pandas as pd

        rows = [
            {
                "location": str(self.locations[layer]),
                "batch": example,
                "pos": self.positions[pos],
                "rank": rank,
                "token": self.name(int(token)),
                "log_prob": float(self.log_probs[layer, example, pos, rank]),
            }
            for layer, example, pos in _places(self.entropy)
            for rank, token in enumerate(self.tokens[layer, example, pos])
        ]
        return pd.DataFrame(rows)

    def table(self, example: int = 0) -> "pandas.DataFrame":
        """The likeliest token of one example: a row per location, a column per position."""
        import pandas as pd

        likeliest = self.tokens[:, example, :, 0].tolist()
        rows = [[self.name(token) for token in row] for row in likeliest]
        return pd.DataFrame(rows, index=[str(x) for x in self.locations], columns=list(self.positions))

    def plot(self, example: int = 0, measure: Measure = "log_prob") -> "matplotlib.figure.Figure":
        """One example by layer and position: the likeliest tokens, coloured by a measure.

        Args:
            example: of the batch.
            measure: what is coloured: `log_prob` of the likeliest token, the `entropy`, or the `divergence`.

        Raises:
            HookGraphError: an unknown measure, or matplotlib is not installed.
        """
        if measure not in get_args(Measure):
            raise HookGraphError(f"unknown measure {measure!r}: {nearest(measure, get_args(Measure))}")
        found = {"log_prob": self.log_probs[..., 0], "entropy": self.entropy, "divergence": self.divergence}
        words = tuple(tuple(map(self.name, row)) for row in self.tokens[:, example, :, 0].tolist())
        grid = plotting.Grid(
            _TITLES[measure],
            found[measure][:, example].float().cpu(),
            tuple(str(x) for x in self.locations),
            tuple(map(str, self.positions)),
            "",
            "pos",
            words,
            "nats",
        )
        return plotting.draw([grid], figure=plotting.new_figure())

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file.

        Raises:
            LoadError: the file cannot be written.
        """
        header = {
            "locations": [str(x) for x in self.locations],
            "positions": self.positions,
            "followed": self.followed,
            "lens": self.lens,
            "names": {str(token): text for token, text in self._names.items()},
            "metadata": dict(self.metadata),
        }
        storage.write(path, _KIND, {name: getattr(self, name) for name in _TENSORS}, header)

    @staticmethod
    def load(path: str | Path) -> "PredictionTrajectory":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, not a saved trajectory, or of locations that are not declared.
        """
        tensors, header = storage.read(path, _KIND)
        return PredictionTrajectory(
            locations=tuple(storage.parse(path, text) for text in header["locations"]),
            positions=tuple(header["positions"]),
            followed=tuple(header["followed"]),
            lens=header["lens"],
            metadata=header["metadata"],
            _names={int(token): text for token, text in header["names"].items()},
            **tensors,
        )

    def __repr__(self) -> str:
        return self.table().to_string()

    def _repr_html_(self) -> str:
        return self.table().to_html()


def _places(values: Float[Tensor, "layer batch pos"]) -> list[list[int]]:
    return torch.cartesian_prod(*map(torch.arange, values.shape)).view(-1, 3).tolist()
