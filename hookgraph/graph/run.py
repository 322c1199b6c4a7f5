"""`Run`: what one pass returned."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hookgraph.errors import HookGraphError, LocationError, UnknownLocationError, nearest
from hookgraph.graph import storage
from hookgraph.hooks.editing import Hook
from hookgraph.hooks.positions import Place, is_placed, read_at
from hookgraph.hooks.slicing import read
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import LOGITS


@final
@dataclass(frozen=True, eq=False, repr=False)
class Run(Mapping[Location, Tensor]):
    """What one pass returned: `run.logits`, `run.metric`, and the saved locations as a mapping.

    Saves stand in the order in which they were asked for, complete.

    Args:
        saved: the saved activations and gradients.
        metric: one number per example, if a metric was given.
    """

    saved: Mapping[Location, Shaped[Tensor, "..."]]
    metric: Float[Tensor, " batch"] | None = None
    inputs: Mapping[str, object] = field(default_factory=dict[str, object])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    _logits: "Float[Tensor, 'batch ...'] | Callable[[], Tensor] | None" = None
    _hooks: tuple[tuple[Location, Hook], ...] = ()
    """What the pass was hooked with."""
    _place: "Callable[[], Place | None] | None" = None
    """Tells where the pass lay in its sequences; None where that is not known."""

    def is_hooked_by(self, registration: tuple[Location, Hook]) -> bool:
        """Whether the pass was hooked with this very hook, so that what it saved shows its effect."""
        return registration in self._hooks

    @property
    def logits(self) -> Float[Tensor, "batch ..."]:
        """The logits. A pass that stopped early, after the last location asked for, is completed by
        one more pass when they are first read.

        Raises:
            HookGraphError: the run was loaded from a file without logits.
        """
        found = self._logits
        if not isinstance(found, Tensor):
            found = self.saved.get(LOGITS, found)
            if found is None:
                raise HookGraphError("this run holds no logits: ask for LOGITS in `save` before saving it")
            found = found if isinstance(found, Tensor) else found()
            object.__setattr__(self, "_logits", found)
        return found

    @property
    def columns(self) -> int | None:
        """How many numbers an example has, where the pass computed logits without positions."""
        found = self._logits
        return found.shape[1] if isinstance(found, Tensor) and found.ndim == 2 else None

    @property
    def measured(self) -> Float[Tensor, " batch"]:
        """The metric of a run that was given one.

        Raises:
            HookGraphError: it was given none.
        """
        if self.metric is None:
            raise HookGraphError("this run was not measured: give graph.run a metric")
        return self.metric

    def __getitem__(self, location: Location) -> Shaped[Tensor, "..."]:
        """The saved value at a location; of one that was saved whole, any part of it as well.

        Raises:
            UnknownLocationError: it was not saved; near names are given.
            LocationError: what was saved whole has no such part, or it is not known where its positions are.
        """
        found = self.saved.get(location)
        if found is None and location.index:
            found = self._part(location)
        if found is None:
            near = nearest(str(location), map(str, self.saved))
            raise UnknownLocationError(f"{location} was not saved in this run: {near}")
        return found

    def _part(self, location: Location) -> Shaped[Tensor, "..."] | None:
        """The part of what was saved whole; None if it was not."""
        whole = self.saved.get(replace(location, index=()))
        if whole is None or not is_placed(location):
            return None if whole is None else read(location, whole)
        if self._place is None:
            raise LocationError(
                f"{location}: this run, as one that was loaded, does not know which positions are padding: "
                f"index run[{replace(location, index=())}] itself, or save the part"
            )
        part = read_at(location, whole, self._place() or Place(alone=True))
        if part is None:
            raise LocationError(f"{location}: a run is one pass, step 0, and holds nothing of this")
        return part

    def __contains__(self, location: object) -> bool:
        """Whether this very location was saved."""
        return location in self.saved

    def __iter__(self) -> Iterator[Location]:
        return iter(self.saved)

    def __len__(self) -> int:
        return len(self.saved)

    def __repr__(self) -> str:
        lines = [f"Run of {len(self)} locations"]
        lines += [f"  {k}: {tuple(v.shape)} {str(v.dtype).removeprefix('torch.')}" for k, v in self.items()]
        return "\n".join(lines)

    def detach(self) -> "Run":
        """The same run without its autograd graph."""
        return self._map(Tensor.detach)

    def to(self, target: torch.device | str | torch.dtype) -> "Run":
        """The same run on another device, or in another dtype."""
        return self._map(lambda t: t.to(target))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Run":
        metric = None if self.metric is None else change(self.metric)
        logits = self._logits
        if isinstance(logits, Tensor):
            logits = change(logits)
        elif logits is not None:
            complete = logits
            logits = lambda: change(complete())  # noqa: E731 (stays lazy)
        saved = {k: change(v) for k, v in self.saved.items()}
        return Run(saved, metric, self.inputs, self.metadata, logits, self._hooks, self._place)

    def save(self, path: str | Path) -> None:
        """Write the saved values, the metric and the computed logits to a safetensors file."""
        tensors = {f"at/{k}": v for k, v in self.saved.items()}
        if self.metric is not None:
            tensors["metric"] = self.metric
        if isinstance(self._logits, Tensor):
            tensors["logits"] = self._logits
        header = {"order": [str(k) for k in self.saved], "metadata": dict(self.metadata)}
        storage.write(path, "run", tensors, header)

    @staticmethod
    def load(path: str | Path) -> "Run":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, not a saved run, or one of locations that are not declared.
        """
        tensors, header = storage.read(path, "run")
        saved = {storage.parse(path, name): tensors[f"at/{name}"] for name in header["order"]}
        return Run(saved, tensors.get("metric"), {}, header["metadata"], tensors.get("logits"))
