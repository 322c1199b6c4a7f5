"""`CausalBasis`: directions of a location, by what the output loses without each."""

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

_KIND = "causal basis"


@final
@dataclass(frozen=True, eq=False, repr=False)
class CausalBasis:
    """Orthonormal directions of a location, the most consequential first.

    Args:
        basis: one direction per column.
        energies: the mean loss, in nats, when that direction alone is ablated; computed anew at `basis`.
        location: where.
        convention: the ablation, the decoder, the loss and the seed that it was computed under.
        metadata: the model's name, revision and dtype.
    """

    basis: Float[Tensor, "d_model rank"]
    energies: Float[Tensor, " rank"]
    location: Location
    convention: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def rank(self) -> int:
        """How many directions there are."""
        return self.basis.shape[1]

    def to_frame(self) -> "pandas.DataFrame":
        """One row per direction: its energy, and its largest coordinate."""
        import pandas as pd

        largest = self.basis.abs().argmax(0).tolist() if self.rank else []
        rows = {"energy": self.energies.tolist(), "largest_coordinate": largest}
        return pd.DataFrame(rows, index=pd.RangeIndex(self.rank, name="direction"))

    def plot(self) -> "matplotlib.figure.Figure":
        """The energies, as one row of a map.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        columns = tuple(map(str, range(self.rank)))
        values = self.energies.float().cpu()[None]
        grid = plotting.Grid("energy in nats", values, (str(self.location),), columns, "", "direction")
        return plotting.draw([grid], figure=plotting.new_figure())

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file.

        Raises:
            LoadError: the file cannot be written.
        """
        header = {
            "location": str(self.location),
            "convention": dict(self.convention),
            "metadata": dict(self.metadata),
        }
        storage.write(path, _KIND, {"basis": self.basis, "energies": self.energies}, header)

    @staticmethod
    def load(path: str | Path) -> "CausalBasis":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or not a saved causal basis.
        """
        tensors, header = storage.read(path, _KIND)
        place = storage.parse(path, header["location"])
        return CausalBasis(
            tensors["basis"], tensors["energies"], place, header["convention"], header["metadata"]
        )

    def __repr__(self) -> str:
        told = ", ".join(f"{k} {v}" for k, v in self.convention.items())
        return f"CausalBasis of {self.location}, {self.rank} directions ({told})\n{self.to_frame()}"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html()
