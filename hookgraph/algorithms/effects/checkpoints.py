"""A file that keeps what is done of long work over batches, so that it can be taken up again."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from jaxtyping import Shaped
from torch import Tensor

from hookgraph.errors import LoadError
from hookgraph.graph import storage

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
        self.done: list[Mapping[str, str]] = []
        """Of each batch that is done, short names of what it was made of: clean, corrupt, metric."""

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
                f"{self._path} is the checkpoint of other work, which differs in "
                f"{', '.join(changed) or 'its plan'}: name another file, or delete this one to begin anew"
            )
        self.done = list(header["done"])
        return tensors, header["state"]

    def recognise(self, number: int, parts: Mapping[str, str]) -> None:
        """See that a batch that is done is the one that was done.

        Raises:
            LoadError: it is another one.
        """
        done = self.done[number]
        if done != parts:
            changed = ", ".join(k for k, v in parts.items() if done.get(k) != v)
            raise LoadError(
                f"batch {number} is not the one that {self._path} has, its {changed} differs: give the same "
                "pairs and metric in the same order, or another file"
            )

    def check_count(self, count: int) -> None:
        """See that a stream that has ended gave every batch that is done.

        Raises:
            LoadError: it gave fewer.
        """
        if count < len(self.done):
            raise LoadError(
                f"{self._path} holds {len(self.done)} batches, the pairs are {count}: give all those that "
                "it holds, in the same order, or another file"
            )

    def keep(self, parts: Mapping[str, str], state: State) -> None:
        """Write what there is after one more batch. A file that is there is replaced at once, or stays."""
        self.done.append(parts)
        tensors, about = state
        beside = self._path.with_name(f"{self._path.name}.part")
        storage.write(beside, _KIND, tensors, {"plan": self._plan, "done": self.done, "state": about})
        os.replace(beside, self._path)
