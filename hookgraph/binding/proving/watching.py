"""What a pass does besides its numbers: where it goes through single precision, and what it chooses."""

from typing import Any, Final, final

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CHOOSE: Final = frozenset(
    getattr(place, name) for place in (torch, Tensor) for name in ("topk", "argmax", "argsort", "sort")
)

_CUT: Final = frozenset({torch.detach, Tensor.detach})


@final
class Watch(TorchFunctionMode):
    """Watches one pass.

    `narrowed` counts the operations that make of a tensor that a gradient goes through one of lower
    precision: constants, such as angles of rotary embeddings, do not count. `choices` are the indices that
    were chosen, as of the best experts, call by call. A pass that is `whole` goes on with the tensor itself
    where the model would cut off its gradient by `detach()`.
    """

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.narrowed = 0
        self._whole = whole
        self.choices: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._whole and func in _CUT:
            return args[0].view_as(args[0])
        result = func(*args, **(kwargs or {}))
        if func in _CHOOSE:
            chosen = result[1] if isinstance(result, tuple) else result
            self.choices.append(chosen.detach().flatten())
        elif args and isinstance(result, Tensor) and isinstance(source := args[0], Tensor):
            self.narrowed += result.dtype is not source.dtype and _is_narrower(result, source)
        return result

    def changed(self, clean: "Watch", rows: int) -> Bool[Tensor, " batch"]:
        """In which of several rows something else was chosen than in a pass over one.

        What several positions choose is taken as a set for each row.
        """
        found = torch.zeros(rows, dtype=torch.bool)
        for here, there in zip(self.choices, clean.choices, strict=False):
            if here.numel() == rows * there.numel():
                one, other = here.view(rows, -1).sort(-1)[0], there.sort()[0]
                found |= (one != other).any(-1).cpu()
        return found


def _is_narrower(result: Tensor, source: Tensor) -> bool:
    floating = result.is_floating_point() and source.is_floating_point()
    return floating and source.requires_grad and result.dtype.itemsize < source.dtype.itemsize
