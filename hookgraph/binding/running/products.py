"""What the only matrix product inside a module returns: logits that a router computes and uses itself."""

from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hookgraph.binding.running.attention import TapsByCall, Turn
from hookgraph.binding.running.modes import WhileRunning
from hookgraph.binding.running.passes import PassState
from hookgraph.hooks.taps import Tap

_PRODUCTS: Final = frozenset(
    {
        torch.nn.functional.linear,
        torch.matmul,
        torch.mm,
        torch.addmm,
        torch.Tensor.matmul,
        torch.Tensor.mm,
        torch.Tensor.__matmul__,
        torch.einsum,
    }
)


@final
class OwnProduct:
    """The tap on the matrix product of a module, by the module's calls in a pass."""

    def __init__(self, module: nn.Module, taps: TapsByCall, state: PassState) -> None:
        self._turn = Turn(taps, state)
        self._state = state
        self._running = WhileRunning(module, self._tap)

    def remove(self) -> None:
        """Stop looking at the module."""
        self._running.remove()

    def _tap(self) -> "_ProductTap":
        return _ProductTap(self._turn.next().get("product"), self._state)


@final
class _ProductTap(TorchFunctionMode):
    """Calls the tap on what the first matrix product returns."""

    def __init__(self, tap: Tap | None, state: PassState) -> None:
        super().__init__()
        self._tap, self._state = tap, state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tap = self._tap
        if func not in _PRODUCTS or tap is None:
            return result
        self._tap = None
        return self._tapped(tap, result)

    def _tapped(self, tap: Tap, result: Tensor) -> Tensor:
        flat = result.ndim == 2
        value = result.unflatten(0, (self._state.batch, -1)) if flat else result
        new = tap(value)
        if new is value and not tap.tracks_gradient:
            return result
        return new.flatten(0, 1) if flat else new
