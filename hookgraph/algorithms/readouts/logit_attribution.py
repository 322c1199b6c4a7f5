"""`LogitAttribution`: how much each part of the residual stream adds to a logit or a difference."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.ranking import Ranking
from hookgraph.graph import storage
from hookgraph.ontology.dimensions import Dimension

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "logit attribution"


@final
@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution:
    """What each part adds to a logit difference: Σ parts + Σ rest + bias + residual = total.

    Args:
        parts: by location, over the batch, and heads, neurons or latents where they are told apart.
        rest: what of an update its heads, neurons or latents do not write, such as biases of projections.
        bias: what is there without any part: the bias of the last norm and of the unembedding.
        total: the logit difference, before a soft-cap or a scale of the logits.
        residual: total - Σ parts - Σ rest - bias: zero up to rounding, unless something writes to the
            stream that is no location of the model.
        metadata: the model's name, revision and dtype.
    """

    parts: Attribution
    rest: Attribution
    bias: Float[Tensor, " batch"]
    total: Float[Tensor, " batch"]
    residual: Float[Tensor, " batch"]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def top(self, k: int = 10) -> Ranking:
        """The k parts that add or take away most, mean over the batch."""
        return self._mean().top(k)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per example and part: location, its indices, and what it adds."""
        return self.parts.to_frame()

    def plot(self) -> "matplotlib.figure.Figure":
        """A map per kind of location, mean over the batch: layers on y, heads or neurons on x.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        found = self._mean()
        grids = plotting.layer_maps(found, {x: found.dims(x) for x in found})
        return plotting.draw(grids, figure=plotting.new_figure())

    def _mean(self) -> Attribution:
        return self.parts.mean("batch")

    def __repr__(self) -> str:
        numbers = (
            f"logit difference {float(self.total.mean()):+.4f}, of which bias {float(self.bias.mean()):+.4f}"
        )
        return f"{numbers}, unexplained {float(self.residual.abs().max()):.1e}\n{self.top(8)!r}"

    def _repr_html_(self) -> str:
        return self.top(20)._repr_html_()  # pyright: ignore[reportPrivateUsage]

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        tensors, order = self.parts.pack("parts")
        others, rest = self.rest.pack("rest")
        whole = {"bias": self.bias, "total": self.total, "residual": self.residual}
        reduced = dict(self.parts.reduced)
        header = {"parts": order, "rest": rest, "reduced": reduced, "metadata": dict(self.metadata)}
        storage.write(path, _KIND, {**tensors, **others, **whole}, header)

    @staticmethod
    def load(path: str | Path) -> "LogitAttribution":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or not a saved logit attribution.
        """
        tensors, header = storage.read(path, _KIND)
        reduced = {Dimension(d): how for d, how in header["reduced"].items()}
        parts, rest = (Attribution.unpack(tensors, x, header[x], reduced) for x in ("parts", "rest"))
        bias, total, residual = (tensors[x] for x in ("bias", "total", "residual"))
        return LogitAttribution(parts, rest, bias, total, residual, header["metadata"])
