"""Which updates move information between positions: found by moving it.

A layer is called again as it was in the trace, with what enters it changed at one position and every
other update held at what it was; an update that then changes at other positions mixes them.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hookgraph.binding.data.layouts import arranged
from hookgraph.binding.resolving.blocks import Block, Update
from hookgraph.binding.running.mechanisms import with_element
from hookgraph.binding.tracing.trace import Trace, evaluating
from hookgraph.binding.tracing.values import Slot

_POSITION = 1
"""The position that is changed: neither the first nor the last."""


def find_mixing(trace: Trace, blocks: Sequence[Block]) -> frozenset[Update]:
    """The updates of `blocks` that move information between positions."""
    mixing: set[Update] = set()
    for block in blocks:
        candidates = [u for u in block.updates if not u.softmax and u.call is not None]
        if not candidates:
            continue
        for update in candidates:
            before, after = (_output_of(trace, block, update, moved=moved) for moved in (False, True))
            if before is None or after is None or before.shape != after.shape:
                continue
            before, after = (
                arranged(block.grid.layout_of(update.value), x, block.grid.batch) for x in (before, after)
            )
            if before.ndim < 3:
                continue
            changed = (before - after).abs().flatten(2).amax(-1)
            others = torch.cat([changed[:, :_POSITION], changed[:, _POSITION + 1 :]], dim=1)
            if others.numel() and float(others.max()) > 1e-6 * float(before.abs().max()):
                mixing.add(update)
    return frozenset(mixing)


def _output_of(trace: Trace, block: Block, update: Update, *, moved: bool) -> Tensor | None:
    """What an update is when the layer is called again as in the trace, its input moved or not."""
    call = block.call
    entering = block.entering.tensor.clone()
    if moved:
        lying = arranged(block.grid.layout, entering, block.grid.batch)
        if lying.shape[1] <= _POSITION:
            return None  # one position: nothing else to move
        lying[:, _POSITION] = lying[:, _POSITION] * 1.5 + 0.5
    seen: list[Tensor] = []

    def replaced(thing: Any) -> Any:
        return entering if isinstance(thing, Tensor) and thing is block.entering.tensor else thing

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        seen.append(_term(output, update))

    args, kwargs = call.arguments
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(call.module))
        for other in block.updates:
            if other.call is not None:
                hook = keep if other is update else _holding(other)
                stack.callback(other.call.module.register_forward_hook(hook).remove)
        try:
            call.module(*map(replaced, args), **{k: replaced(v) for k, v in kwargs.items()})
        except Exception:  # a layer that cannot be called again tells nothing
            return None
    return seen[0] if seen else None


def _term(output: Any, update: Update) -> Tensor:
    """The tensor of an update in what its module returns."""
    slot = _slot(update)
    return output if slot is None else output[slot]


def _slot(update: Update) -> Slot:
    outputs = {} if update.call is None else update.call.outputs
    return next(s for s, v in outputs.items() if v is update.value)


def _holding(update: Update) -> Callable[..., Any]:
    """A hook that has a module return what it returned in the trace."""
    slot, value = _slot(update), update.value.tensor

    def hold(module: nn.Module, _: Any, output: Any) -> Any:
        return value if slot is None else with_element(output, slot, value)

    return hold
