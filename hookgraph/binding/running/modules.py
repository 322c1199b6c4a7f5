"""The modules of a model as they were when it was bound, each still in its place."""

from collections.abc import Iterator, Mapping
from typing import final

from torch import nn
from transformers import PreTrainedModel

from hookgraph.binding.running.kernels import check_kernels, configurations
from hookgraph.errors import BindingError


@final
class Modules(Mapping[str, nn.Module]):
    """The modules of a model by their paths. Who asks for one gets the one that was there at first.

    Hooks on a module that the model no longer has would never be called. To look costs less than a
    microsecond.

    Args:
        model: the model as it is now.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._known = dict(model.named_modules())
        self._names = {path: tuple(path.split(".")) if path else () for path in self._known}
        self._configs = configurations(model)

    def __getitem__(self, path: str) -> nn.Module:
        known = self._known[path]
        here: nn.Module | None = self._model
        for name in self._names[path]:
            here = here._modules.get(name)
            if here is None:
                break
        if here is not known:
            now = "there is none" if here is None else f"there is another {type(here).__name__}"
            raise BindingError(
                f"{path} is not the {type(known).__name__} that was there when this "
                f"{type(self._model).__name__} was bound, {now}: it was replaced since, or wrapped, as "
                "adapters are; bind the model again"
            )
        return known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, path: object) -> bool:
        return path in self._known

    def every(self) -> list[nn.Module]:
        """All of them, in their places or not."""
        return list(self._known.values())

    def check_kernels(self) -> None:
        """Check that attention can be looked into, as when the model was bound.

        Raises:
            BindingError: it is computed by a function that cannot be, with what to do.
        """
        check_kernels(self._model, self._configs)
