"""A file that keeps what is done of long work over batches, so that it can be taken up again."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from jaxtyping import Shaped
from torch import Tensor

from hookgraph.errors import LoadError
from hookgraph.graph import storage
from hookgraph.graph.abstract import Prepared

_KIND = "checkpoint of effects"

State = tuple[Mapping[str, Shaped[Tensor, "..."]], Mapping[str, Any]]
"""Tensors, and what is written as JSON."""


@final
class Checkpoint:
    """What the batches so far gave, on disk after each of them.

    Args:
        path: the file.
        plan: what is computed. A file of another plan is refused.
    """

    def __init__(self, path: str | Path, plan: Mapping[str, object]) -> None:
        self._path = Path(path)
        self._plan: Mapping[str, object] = json.loads(json.dumps(plan))
        self.done: list[str] = []
        """A digest of the inputs of each batch that is done."""

    def resume(self) -> State | None:
        """What is kept; None where there is no file.

        Raises:
            LoadError: the file cannot be read, or is of another plan.
        """
        if not self._path.exists():
            return None
        tensors, header = storage.read(self._path, _KIND)
        if header["plan"] != self._plan:
            changed = [k for k, v in self._plan.items() if header["plan"].get(k) != v]
            raise LoadError(
                f"{self._path} is the checkpoint of other work, with another {', '.join(changed) or 'plan'}: "
                "name another file, or delete this one to begin anew"
            )
        self.done = list(header["done"])
        return tensors, header["state"]

    def recognise(self, number: int, inputs: Prepared) -> None:
        """See that a batch that is done is the one that was done.

        Raises:
            LoadError: it is another one.
        """
        if self.done[number] != digest(inputs):
            raise LoadError(
                f"batch {number} is not the one that {self._path} has: give the same pairs in the same "
                "order, or another file"
            )

    def keep(self, inputs: Prepared, state: State) -> None:
        """Write what there is after one more batch. A file that is there is replaced at once, or stays."""
        self.done.append(digest(inputs))
        tensors, about = state
        beside = self._path.with_name(f"{self._path.name}.part")
        storage.write(beside, _KIND, tensors, {"plan": self._plan, "done": self.done, "state": about})
        os.replace(beside, self._path)


def digest(inputs: Prepared) -> str:
    """A short name of the contents of some inputs."""
    found = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name]
        found.update(name.encode())
        if isinstance(value, Tensor):
            found.update(str((tuple(value.shape), value.dtype)).encode())
            found.update(value.detach().cpu().contiguous().flatten().double().numpy().tobytes())
    return found.hexdigest()[:16]
