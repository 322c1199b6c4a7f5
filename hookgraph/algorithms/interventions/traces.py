"""`CausalTrace`: what restoring each location and position brings back after noise, with the paper's map."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.algorithms.arguments import whole_number
from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.ranking import Ranking
from hookgraph.errors import HookGraphError
from hookgraph.graph import storage
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "causal trace"


@final
@dataclass(frozen=True, slots=True)
class Noise:
    """How the subject was corrupted.

    Args:
        positions: of the noised tokens, in each example.
        multiple: the noise's standard deviation, as a multiple of `std`.
        std: the standard deviation of the embeddings.
        samples: how many draws the effects are the mean of.
        window: how many layers were restored together.
        seed: of the draws.
    """

    positions: tuple[tuple[int, ...], ...]
    multiple: float | int
    std: float
    samples: int
    window: int
    seed: int


@final
@dataclass(frozen=True, eq=False, repr=False)
class CausalTrace:
    """Indirect effects: m(noised, one place restored) - m(noised), mean over draws of the noise.

    Args:
        effects: by location, over (batch, pos); of a window, at its middle location.
        errors: the standard error of that mean; zero for a single draw.
        clean: the metric without noise.
        corrupted: the metric with noise, mean over draws.
        noise: how the subject was corrupted.
        tokens: what the columns are called, where the examples are the same there and texts are known.
        metadata: the model's name, revision and dtype.
    """

    effects: Attribution
    errors: Attribution
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]
    noise: Noise
    tokens: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def total_effect(self) -> Float[Tensor, " batch"]:
        """m(clean) - m(noised): what restoring everything would bring back."""
        return self.clean - self.corrupted

    def mean(self, *dims: str) -> "CausalTrace":
        """Effects averaged over axes, by name: `.mean("batch")` is the paper's average indirect effect.

        The errors are then those of the mean, as far as the draws go.
        """
        squares = (self.errors * self.errors).mean(*dims)
        counts = {x: self.errors[x].numel() / squares[x].numel() for x in squares}
        errors = Attribution({x: (v / counts[x]).sqrt() for x, v in squares.items()}, squares.reduced)
        return replace(self, effects=self.effects.mean(*dims), errors=errors)

    def top(self, k: int = 10) -> Ranking:
        """The k places with the largest |effect|."""
        return self.effects.top(k)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per location and position: its indices, the effect and its standard error."""
        frame = self.effects.to_frame()
        frame["error"] = self.errors.to_frame()["effect"]
        return frame

    def plot(self, example: int = 0) -> "matplotlib.figure.Figure":
        """A map per kind of location: a row per token, those of the subject starred, a column per layer.

        Of one example, unless the batch was averaged.

        Raises:
            HookGraphError: the position axis is gone, there is no such example, or matplotlib is missing.
        """
        count = len(self.noise.positions)
        if not 0 <= whole_number("example", example, least=0) < count:
            raise HookGraphError(f"example={example} is out of range, the trace has {count}, counted from 0")
        kinds: dict[str, list[Location]] = {}
        for location in self.effects:
            if Dimension.POS not in self.effects.dims(location):
                raise HookGraphError("the map has a row per position: do not reduce pos")
            kinds.setdefault(location.type.qualified_name, []).append(location)
        grids = [self._grid(kind, where, example) for kind, where in kinds.items()]
        return plotting.draw(grids, figure=plotting.new_figure())

    def _grid(self, kind: str, where: Sequence[Location], example: int) -> plotting.Grid:
        found = [self.effects[x] for x in where]
        values = torch.stack([v[example] if v.ndim > 1 else v for v in found], dim=1).float().cpu()
        subjects = set(self.noise.positions)
        starred = subjects.pop() if len(subjects) == 1 else ()
        if found[0].ndim > 1:
            starred = self.noise.positions[example % len(self.noise.positions)]
        names = self.tokens or tuple(map(str, range(len(values))))
        rows = tuple(f"{name}*" if i in starred else name for i, name in enumerate(names))
        window = f", {self.noise.window} layers at once" if self.noise.window > 1 else ""
        columns = tuple("" if x.layer is None else str(x.layer) for x in where)
        return plotting.Grid(f"{kind} restored{window}", values, rows, columns, "token", "layer")

    def __repr__(self) -> str:
        noise = self.noise
        told = f"{noise.multiple:g} x {noise.std:.4g}, mean of {noise.samples} draws from seed {noise.seed}"
        measured = f"metric {float(self.clean.mean()):+.4f}, noised {float(self.corrupted.mean()):+.4f}"
        return f"causal trace, noise {told}\n{measured}\n{self.top(8)!r}"

    def _repr_html_(self) -> str:
        return self.top(20).to_html()

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        effects, order = self.effects.pack("effects")
        errors, _ = self.errors.pack("errors")
        measured = {"clean": self.clean, "corrupted": self.corrupted}
        header = {
            "order": order,
            "reduced": dict(self.effects.reduced),
            "noise": asdict(self.noise),
            "tokens": self.tokens,
            "metadata": dict(self.metadata),
        }
        storage.write(path, _KIND, {**effects, **errors, **measured}, header)

    @staticmethod
    def load(path: str | Path) -> "CausalTrace":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or not a saved trace.
        """
        tensors, header = storage.read(path, _KIND)
        reduced = {Dimension(d): how for d, how in header["reduced"].items()}
        effects, errors = (
            Attribution.unpack(tensors, name, header["order"], reduced) for name in ("effects", "errors")
        )
        noise = dict(header["noise"])
        noise["positions"] = tuple(map(tuple, noise["positions"]))
        return CausalTrace(
            effects,
            errors,
            tensors["clean"],
            tensors["corrupted"],
            Noise(**noise),
            tuple(header["tokens"]),
            header["metadata"],
        )
