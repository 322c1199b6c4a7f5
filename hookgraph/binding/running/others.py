"""Hooks of others on modules: of users, and of other libraries."""

from functools import partial

from torch import nn
from torch.nn.modules import module as process


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody else looks into a module, or gave it another forward."""
    return "forward" in vars(module) or _is_seen(module)


def is_changed(module: nn.Module) -> bool:
    """The same, but accelerate, which only brings weights and inputs together, may have changed `forward`."""
    return _is_seen(module) or ("forward" in vars(module) and not hasattr(module, "_hf_hook"))


def replaces_output(module: nn.Module) -> bool:
    """Whether somebody else may put another value in place of what a module returns."""
    return not all(map(is_known, module._forward_hooks.values()))


def is_known(hook: object) -> bool:
    """Whether a hook is of transformers, which leaves hooks that collect outputs, or of hookgraph."""
    return _is_of(hook, "transformers.", "hookgraph.")


def is_held(module: nn.Module) -> bool:
    """Whether a graph is attached to a module, or was when the module was copied."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    own = any(name.startswith("_hookgraph") for name in vars(module))
    return own or any(_is_of(hook, "hookgraph.") for hook in (*hooks, vars(module).get("forward")))


def are_all_seen() -> bool:
    """Whether somebody else looks into all modules of this process."""
    hooks = (*process._global_forward_hooks.values(), *process._global_forward_pre_hooks.values())
    return not all(map(is_known, hooks))


def _is_of(hook: object, *packages: str) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith(packages)


def _is_seen(module: nn.Module) -> bool:
    return are_all_seen() or not all(
        map(is_known, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
    )
