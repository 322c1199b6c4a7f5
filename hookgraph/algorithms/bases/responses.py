"""`StimulusResponse`: how far the changes that a lens sees are those that the model shows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.graph import storage
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "stimulus and response"
_TENSORS = ("similarity", "stimulus", "response")


@final
@dataclass(frozen=True, eq=False, repr=False)
class StimulusResponse:
    """Alignment of a lens with the rest of the model, by location and token; NaN at padding.

    Args:
        locations: where states were changed, one location at a time.
        similarity: the Aitchison cosine of stimulus and response.
        stimulus: KL(lens before ‖ lens after), in nats.
        response: KL(model before ‖ model after), in nats.
        convention: the intervention, the lens and the seed.
        metadata: the model's name, revision and dtype.
    """

    locations: tuple[Location, ...]
    similarity: Float[Tensor, "layer batch pos"]
    stimulus: Float[Tensor, "layer batch pos"]
    response: Float[Tensor, "layer batch pos"]
    convention: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def to_frame(self) -> "pandas.DataFrame":
        """One row per location: means over real tokens."""
        import pandas as pd

        means = {name: getattr(self, name).flatten(1).nanmean(1).tolist() for name in _TENSORS}
        return pd.DataFrame(means, index=pd.Index([str(x) for x in self.locations], name="location"))

    def plot(self, example: int = 0) -> "matplotlib.figure.Figure":
        """The similarity of one example, by location and position.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        values = self.similarity[:, example].float().cpu()
        rows, columns = tuple(map(str, self.locations)), tuple(map(str, range(values.shape[1])))
        grid = plotting.Grid("cos(stimulus, response)", values, rows, columns, "", "pos", unit="cosine")
        return plotting.draw([grid], figure=plotting.new_figure())

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file.

        Raises:
            LoadError: the file cannot be written.
        """
        header = {
            "locations": [str(x) for x in self.locations],
            "convention": dict(self.convention),
            "metadata": dict(self.metadata),
        }
        storage.write(path, _KIND, {name: getattr(self, name) for name in _TENSORS}, header)

    @staticmethod
    def load(path: str | Path) -> "StimulusResponse":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or not a saved alignment.
        """
        tensors, header = storage.read(path, _KIND)
        places = tuple(storage.parse(path, text) for text in header["locations"])
        similarity, stimulus, response = (tensors[name] for name in _TENSORS)
        return StimulusResponse(
            places, similarity, stimulus, response, header["convention"], header["metadata"]
        )

    def __repr__(self) -> str:
        told = ", ".join(f"{k} {v}" for k, v in self.convention.items())
        return f"StimulusResponse of {len(self.locations)} locations ({told})\n{self.to_frame()}"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html()
