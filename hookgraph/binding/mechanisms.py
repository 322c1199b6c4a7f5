"""Carry out anchors: install a tap on a module so that it reads and replaces the location's value."""

from collections.abc import Callable
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from hookgraph.binding.anchors import Anchor
from hookgraph.binding.norms import scale_of
from hookgraph.binding.tracing import Slot
from hookgraph.binding.views import View
from hookgraph.binding.weights import affine_map
from hookgraph.hooks.handles import Handle
from hookgraph.hooks.taps import Tap


def install(module: nn.Module, anchor: Anchor, tap: Tap) -> Handle:
    """Install a tap. The latest installed is called first, before the hooks of others on the module."""
    if anchor.mechanism == "output":
        return module.register_forward_hook(_output_hook(anchor.slot, anchor.view, tap), prepend=True)
    if anchor.mechanism == "norm scale":
        hook = _norm_scale_hook(anchor, tap)
        return module.register_forward_hook(hook, with_kwargs=True, prepend=True)
    if anchor.mechanism == "head result":
        hook = _head_result_hook(module, anchor, tap)
        return module.register_forward_hook(hook, with_kwargs=True, prepend=True)
    change = _in_place(tap) if anchor.mechanism == "sum" else _through(anchor.view, tap)
    if isinstance(anchor.slot, str):
        hook = _keyword_hook(anchor.slot, change)
        return module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    return module.register_forward_pre_hook(_positional_hook(anchor.slot or 0, change), prepend=True)


def element(args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> Tensor:
    """The argument in a slot."""
    return kwargs[slot] if isinstance(slot, str) else args[slot or 0]


def _through(view: View, tap: Tap) -> Callable[[Tensor], Tensor]:
    """Call a tap on the view of a tensor; the tensor itself comes back if nothing is to be replaced."""
    if view is None:
        return tap

    def change(raw: Tensor) -> Tensor:
        value = view.get(raw)
        new = tap(value)
        return raw if new is value and not tap.tracks_gradient else view.put(raw, new)

    return change


def _in_place(tap: Tap) -> Callable[[Tensor], Tensor]:
    """Call a tap on a tensor that others hold too, and change it for all of them.

    The tap sees a copy, because hooks, saves and autograd may keep what they see.
    """

    def change(raw: Tensor) -> Tensor:
        return raw.copy_(tap(raw.clone())) if tap.edits else tap(raw)

    return change


def _positional_hook(slot: int, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        raw = args[slot]
        new = change(raw)
        return None if new is raw else (*args[:slot], new, *args[slot + 1 :])

    return hook


def _keyword_hook(slot: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raw = kwargs[slot]
        new = change(raw)
        return None if new is raw else (args, {**kwargs, slot: new})

    return hook


def _output_hook(slot: Slot, view: View, tap: Tap) -> Callable[..., Any]:
    change = _through(view, tap)
    if slot is None:

        def whole(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            new = change(output)
            return None if new is output else new

        return whole

    def part(module: nn.Module, args: Any, output: Any) -> Any:
        raw = output[slot]
        new = change(raw)
        if new is raw:
            return None
        if isinstance(output, tuple):
            return tuple(new if i == slot else x for i, x in enumerate(output))
        output[slot] = new
        return output

    return part


def _apart(value: Tensor, tap: Tap) -> Tensor:
    """`value` once more, so that its gradient, and edits of it in place, are apart from it."""
    return value.clone() if tap.edits else value.view_as(value)


def _norm_scale_hook(anchor: Anchor, tap: Tap) -> Callable[..., Any]:
    """y = gain · (x - centre) · s + b; with s' in place of s, y' = y + (y - b)(s'/s - 1)."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        x = element(args, kwargs, anchor.slot)
        scale = scale_of(x, centred=anchor.centred, epsilon=anchor.epsilon)
        value = _apart(scale, tap)
        new = tap(value)
        if new is value and not tap.tracks_gradient:
            return None
        bias = module.forward(torch.zeros_like(x[:1, :1]))
        # Both are s'/s - 1. Unedited, the first one adds exactly nothing to gradients either.
        excess = (new - scale) / scale.detach() if new is value else new / scale - 1
        return y + ((y - bias) * excess).to(y.dtype)

    return hook


def _head_result_hook(module: nn.Module, anchor: Anchor, tap: Tap) -> Callable[..., Any]:
    """y = Σ_h r_h + b with r_h = z_h W_O[h]; with r' in place of r, y' = y + Σ_h (r'_h - r_h)."""
    view = anchor.view
    if view is None:
        raise ValueError(f"{anchor.location}: the head result needs the columns of the heads")
    weight = view.get(affine_map(module)[0].mT[None])[0]

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        z = view.get(element(args, kwargs, anchor.slot))
        result = einsum(z, weight, "batch pos head d, out head d -> batch pos head out")
        value = _apart(result, tap)
        new = tap(value)
        if new is value and not tap.tracks_gradient:
            return None
        return y + (new - result).sum(2)

    return hook
