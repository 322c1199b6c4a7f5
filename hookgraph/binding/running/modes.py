"""Look at the functions that a module calls: a mode of PyTorch that is on while the module runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar, final

from torch import nn

Mode = TypeVar("Mode", bound=AbstractContextManager[Any])


@final
class WhileRunning(Generic[Mode]):
    """Enters a mode with each call of a module and leaves it with the call, also by an error.

    Args:
        module: the module.
        make: the mode of the next call.
        left: called with the mode that was left and what the module returned; None if it raised.
    """

    def __init__(
        self, module: nn.Module, make: Callable[[], Mode], left: Callable[[Mode, object], None] | None = None
    ) -> None:
        self._make = make
        self._left = left
        self._active: list[Mode] = []
        self._handles = (
            module.register_forward_pre_hook(self._enter),
            # Before hooks of others, which may call the functions that are looked at.
            module.register_forward_hook(self._leave, always_call=True, prepend=True),
        )

    @property
    def current(self) -> Mode:
        """The mode of the innermost call."""
        return self._active[-1]

    def remove(self) -> None:
        """Stop looking at the module."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        mode = self._make()
        self._active.append(mode)
        mode.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._active:  # a hook before ended the pass, or raised
            return
        mode = self._active.pop()
        mode.__exit__(None, None, None)
        if self._left is not None:
            self._left(mode, output)
