"""Carry out anchors: install a tap on a module so that it reads and replaces the location's value.

What hooks know is bound to functions by `partial`: nothing is defined anew for each hook of each pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from einops import einsum
from torch import Tensor, nn

from hookgraph.binding.data.anchors import Anchor
from hookgraph.binding.data.layouts import arranged, restored
from hookgraph.binding.data.views import Columns
from hookgraph.binding.running.checkpointing import is_checkpointed
from hookgraph.binding.running.normalising import scale_of
from hookgraph.binding.running.passes import PassState
from hookgraph.binding.running.weights import affine_map
from hookgraph.binding.tracing.values import Slot
from hookgraph.errors import InputError, ShapeMismatchError
from hookgraph.hooks.handles import Handle
from hookgraph.hooks.taps import Tap

_Change: TypeAlias = Callable[[Tensor], Tensor]


def notice_recomputing(state: PassState, shared: str, *args: Any) -> None:
    """Note whether a hook's module runs again in a backward pass; a pre-hook, if given what these are given.

    Raises:
        InputError: it is edited in one of several calls, `shared` is its path: which runs again is not known.
    """
    if (state.recomputed and not shared) or not is_checkpointed():
        return
    state.recomputed = True
    if shared:
        raise InputError(
            f"{shared} is edited in one of several calls of a pass, and checkpointed: a backward pass runs "
            "it again, but in which call cannot be told; switch checkpointing off, or ask for no gradients"
        )


def _noticing(hook: Callable[..., Any], state: PassState, shared: str, *args: Any) -> Any:
    notice_recomputing(state, shared)
    return hook(*args)


def needs_state(anchor: Anchor) -> bool:
    """Whether an anchor's hook must know of the pass it is in."""
    return anchor.layout in ("flat", "one row", "frames") or anchor.calls > 1


def install(module: nn.Module, anchor: Anchor, tap: Tap, state: PassState) -> Handle:
    """Install a tap. The latest installed is called first, before the hooks of others on the module."""
    hook, side, with_kwargs = _hook(module, anchor, tap, state)
    if anchor.calls > 1:
        hook = _on_one_call(hook, anchor, state)
    if state.looks:
        hook = partial(_noticing, hook, state, anchor.module if anchor.calls > 1 and tap.edits else "")
    if state.watches:
        hook = partial(aside, hook, state)
    if side == "output":
        return module.register_forward_hook(hook, with_kwargs=with_kwargs, prepend=True)
    return module.register_forward_pre_hook(hook, with_kwargs=with_kwargs, prepend=True)


def give_copies(module: nn.Module, slots: Sequence[Slot]) -> Handle:
    """Give a module copies of what the model changes in place later on: autograd may keep it."""
    return module.register_forward_pre_hook(partial(_copied, slots), with_kwargs=True, prepend=True)


def _copied(
    slots: Sequence[Slot], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    copies: dict[int, Tensor] = {}  # what is one tensor stays one: attention asks whether it is
    for slot in slots:
        if slot in kwargs or (not isinstance(slot, str) and (slot or 0) < len(args)):
            given = element(args, kwargs, slot)
            copy = copies.setdefault(id(given), given.clone())
            args, kwargs = replaced(args, kwargs, slot, copy)
    return args, kwargs


def _hook(
    module: nn.Module, anchor: Anchor, tap: Tap, state: PassState
) -> tuple[Callable[..., Any], str, bool]:
    """The hook, the side of the module it belongs to, and whether it takes keyword arguments."""
    if anchor.mechanism == "norm scale":
        return partial(_norm_scale, anchor, tap, state), "output", True
    if anchor.mechanism == "head result":
        return _head_result_hook(module, anchor, tap, state), "output", True
    if anchor.mechanism == "head input":
        return _head_input_hook(anchor, tap, state), "output", True
    sums = anchor.mechanism in ("sum", "returned sum")
    change = partial(_in_place, anchor, tap, state) if sums else _through(anchor, tap, state)
    returned = anchor.mechanism in ("output", "returned sum")
    if returned and anchor.slot is None:
        return partial(_whole_output, change), "output", False
    if returned:
        return partial(_part_of_output, anchor.slot, change), "output", False
    if anchor.also:
        return partial(_everywhere, (anchor.slot, *anchor.also), change), "input", True
    if isinstance(anchor.slot, str):
        return partial(_keyword, anchor.slot, change), "input", True
    return partial(_positional, anchor.slot or 0, change), "input", False


def aside(function: Callable[..., Any], state: PassState, *args: Any) -> Any:
    """Call a function that computes what is not to be taken for the model's own."""
    before, state.aside = state.aside, True
    try:
        return function(*args)
    finally:
        state.aside = before


def _on_one_call(hook: Callable[..., Any], anchor: Anchor, state: PassState) -> Callable[..., Any]:
    """Call a hook on one of several calls of its module in a pass."""
    seen = {"pass": -1, "calls": 0}

    def counted(*args: Any) -> Any:
        if seen["pass"] != state.number:
            seen.update({"pass": state.number, "calls": 0})
        seen["calls"] += 1
        return hook(*args) if seen["calls"] == anchor.call + 1 else None

    return counted


def _shaped(anchor: Anchor, state: PassState, raw: Tensor) -> Tensor:
    """The tensor with batch and position as axes of their own."""
    return arranged(anchor.layout, raw, state.batch if needs_state(anchor) else 0)


def element(args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> Tensor:
    """The argument in a slot."""
    return kwargs[slot] if isinstance(slot, str) else args[slot or 0]


def replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another tensor in a slot."""
    if isinstance(slot, str):
        return args, {**kwargs, slot: new}
    place = slot or 0
    return (*args[:place], new, *args[place + 1 :]), kwargs


def with_element(output: Any, slot: Slot, new: Tensor) -> Any:
    """What a module returned, with another tensor in a slot; a tuple whose elements have names keeps them."""
    if isinstance(output, tuple):
        make = getattr(output, "_make", type(output))
        return make(tuple(new if i == slot else x for i, x in enumerate(output)))
    output[slot] = new
    return output


def _through(anchor: Anchor, tap: Tap, state: PassState) -> _Change:
    """Call a tap on the view of a tensor; the tensor itself comes back if nothing is to be replaced."""
    view = anchor.view
    if view is None and not anchor.layout and not anchor.overwritten and not anchor.limit:
        if anchor.mechanism == "input" and tap.tracks_gradient:
            # Others may be given the same tensor: the gradient is that of this module's use of it.
            return lambda raw: tap(raw.view_as(raw))
        return tap
    return partial(_through_view, anchor, tap, state)


def _through_view(anchor: Anchor, tap: Tap, state: PassState, raw: Tensor) -> Tensor:
    # What the model will overwrite is kept from it: the tap sees a copy, and a copy goes on.
    shaped = _shaped(anchor, state, raw.clone() if anchor.overwritten else raw)
    view = anchor.view
    value = shaped if view is None else view.get(shaped)
    new = tap(value)
    if new is value and not tap.tracks_gradient:
        return raw
    if anchor.limit:
        _check_limit(anchor, new)
    result = new if view is None else view.put(shaped, new)
    result = restored(anchor.layout, result, raw)
    return result.clone() if anchor.overwritten else result


def _check_limit(anchor: Anchor, new: Tensor) -> None:
    if new.numel() and not 0 <= int(new.min()) <= int(new.max()) < anchor.limit:
        raise ShapeMismatchError(
            f"the edit at {anchor.location} holds {int(new.min())} to {int(new.max())}; "
            f"these are indices of {anchor.limit} experts, 0 to {anchor.limit - 1}"
        )


def _in_place(anchor: Anchor, tap: Tap, state: PassState, raw: Tensor) -> Tensor:
    """Call a tap on a tensor that others hold too, and change it for all of them.

    The tap sees a copy, because hooks, saves and autograd may keep what they see, and the model may change
    the tensor later on.
    """
    view = anchor.view
    if anchor.overwritten and not tap.edits and not tap.tracks_gradient:
        kept = _shaped(anchor, state, raw.clone())
        tap(kept if view is None else view.get(kept))
        return raw
    # The gradient of a view is not that of what it is a view of, which others hold.
    apart = tap.tracks_gradient and raw._is_view()
    if not (tap.edits or anchor.layout or view or apart or anchor.overwritten):
        return tap(raw)
    shaped = _shaped(anchor, state, raw.clone())
    new = tap(shaped) if view is None else view.put(shaped, tap(view.get(shaped)))
    return raw.copy_(restored(anchor.layout, new, raw))


def _positional(
    slot: int, change: _Change, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    raw = args[slot]
    new = change(raw)
    return None if new is raw else (*args[:slot], new, *args[slot + 1 :])


def _keyword(
    slot: str, change: _Change, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    raw = kwargs[slot]
    new = change(raw)
    return None if new is raw else (args, {**kwargs, slot: new})


def _everywhere(
    slots: tuple[Slot, ...], change: _Change, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Replace one tensor that is given as several arguments in all of them."""
    raw = element(args, kwargs, slots[0])
    new = change(raw)
    if new is raw:
        return None
    for slot in slots:
        args, kwargs = replaced(args, kwargs, slot, new)
    return args, kwargs


def _whole_output(change: _Change, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    new = change(output)
    return None if new is output else new


def _part_of_output(slot: Slot, change: _Change, module: nn.Module, args: Any, output: Any) -> Any:
    raw = output[slot]
    new = change(raw)
    if new is raw:
        return None
    return with_element(output, slot, new)


def _apart(value: Tensor, tap: Tap) -> Tensor:
    """`value` once more, so that its gradient, and edits of it in place, are apart from it."""
    return value.clone() if tap.edits else value.view_as(value)


def _norm_scale(
    anchor: Anchor,
    tap: Tap,
    state: PassState,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    y: Tensor,
) -> Tensor | None:
    """y = gain · (x - centre) · s + b; with s' in place of s, y' = y + (y - b)(s'/s - 1)."""
    x = element(args, kwargs, anchor.slot)
    scale = scale_of(x, centred=anchor.centred, epsilon=anchor.epsilon)
    value = _apart(_shaped(anchor, state, scale), tap)
    new = tap(value)
    if new is value and not tap.tracks_gradient:
        return None
    flat = restored(anchor.layout, new, scale)
    bias = module.forward(torch.zeros_like(x[..., :1, :]))[..., :1, :]
    # Both are s'/s - 1. Unedited, the first one adds exactly nothing, to gradients either.
    excess = (flat - scale) / scale.detach() if new is value else flat / scale - 1
    return y + ((y - bias) * excess).to(y.dtype)


def _head_result_hook(module: nn.Module, anchor: Anchor, tap: Tap, state: PassState) -> Callable[..., Any]:
    view = anchor.view
    if view is None:
        raise ValueError(f"{anchor.location}: the head result needs the columns of the heads")
    weight = view.get(affine_map(module)[0].mT[None])[0]
    return partial(_head_result, anchor, tap, state, view.get, weight)


def _head_result(
    anchor: Anchor,
    tap: Tap,
    state: PassState,
    heads_of: _Change,
    weight: Tensor,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    y: Tensor,
) -> Tensor | None:
    """y = Σ_h r_h + b with r_h = z_h W_O[h]; with r' in place of r, y' = y + Σ_h (r'_h - r_h)."""
    z = heads_of(_shaped(anchor, state, element(args, kwargs, anchor.slot)))
    result = einsum(z, weight.to(z.dtype), "batch pos head d, out head d -> batch pos head out")
    value = _apart(result, tap)
    new = tap(value)
    if new is value and not tap.tracks_gradient:
        return None
    return y + restored(anchor.layout, (new - result).sum(2), y)


def _head_input_hook(anchor: Anchor, tap: Tap, state: PassState) -> Callable[..., Any]:
    view = anchor.view
    if not isinstance(view, Columns):
        raise ValueError(f"{anchor.location}: what a head reads needs the columns of the heads")
    return partial(_head_input, anchor, tap, state, view)


def _head_input(
    anchor: Anchor,
    tap: Tap,
    state: PassState,
    view: Columns,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    y: Tensor,
) -> Tensor | None:
    """q_h = x W_Q[h] + b; with x'_h in place of head h's x, q'_h = q_h + (x'_h - x) W_Q[h]."""
    raw = element(args, kwargs, anchor.slot)
    x = _shaped(anchor, state, raw.clone() if anchor.overwritten else raw)
    copies = x.unsqueeze(2).expand(-1, -1, view.count, -1)
    value = _apart(copies, tap)
    new = tap(value)
    if new is value and not tap.tracks_gradient:
        return None
    weight = view.get(affine_map(module)[0][None])[0]
    change = einsum(new - copies, weight.to(x.dtype), "batch pos head into, into head d -> batch pos head d")
    before = _shaped(anchor, state, y)
    return restored(anchor.layout, view.put(before, view.get(before) + change), y)
