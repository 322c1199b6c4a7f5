"""What a model is, hook by hook and flag by flag, to show that it is itself again afterwards."""

from dataclasses import dataclass, fields
from typing import Any, final

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@final
@dataclass(frozen=True, slots=True)
class ModelState:
    """Identities of hooks, attributes and parameters, and the flags of every module."""

    hooks: tuple[Any, ...]
    attributes: tuple[Any, ...]
    parameters: tuple[Any, ...]
    training: tuple[Any, ...]

    def difference(self, other: "ModelState") -> str:
        """The names of what differs, or an empty string."""
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        return ", ".join(names)


def model_state(model: nn.Module) -> ModelState:
    """The state of a model as far as a graph could touch it, without copying any tensor."""
    modules = list(model.named_modules())
    hooks = tuple(
        (path, name, tuple((k, id(v)) for k, v in getattr(module, name).items()))
        for path, module in modules
        for name in _HOOKS
        if getattr(module, name)
    )
    attributes = tuple(
        (path, tuple((k, id(v)) for k, v in vars(module).items() if not isinstance(v, (int, float))))
        for path, module in modules
    )
    parameters = tuple(
        (name, id(p), p._version, p.requires_grad, p.grad is None) for name, p in model.named_parameters()
    )
    return ModelState(hooks, attributes, parameters, tuple((p, m.training) for p, m in modules))
