"""Which updates move information between positions: found by moving it.

A layer is called again as it was in the trace, with what enters it changed at one position; an update
that changes at other positions mixes them.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hookgraph.binding.blocks import Block, Update
from hookgraph.binding.tracing import Trace, evaluating

_POSITION = 1
"""The position that is changed: neither the first nor the last."""


def find_mixing(trace: Trace, blocks: Sequence[Block]) -> frozenset[Update]:
    """The updates of `blocks` that move information between positions."""
    mixing: set[Update] = set()
    for block in blocks:
        candidates = [u for u in block.updates if not u.softmax and u.call is not None]
        if not candidates:
            continue
        before, after = (_updates_of(trace, block, candidates, moved) for moved in (False, True))
        for update, a, b in zip(candidates, before, after, strict=True):
            if a is None or b is None or a.shape != b.shape or a.ndim < 3 or a.shape[1] <= _POSITION + 1:
                continue
            changed = (a - b).abs().flatten(2).amax(-1)
            others = torch.cat([changed[:, :_POSITION], changed[:, _POSITION + 1 :]], dim=1)
            if float(others.max()) > 1e-6 * float(a.abs().max()):
                mixing.add(update)
    return frozenset(mixing)


def _updates_of(
    trace: Trace, block: Block, updates: Sequence[Update], moved: bool
) -> Sequence[Tensor | None]:
    """What the updates are when the layer is called again as in the trace, its input moved or not."""
    call = block.call
    seen: dict[nn.Module, Tensor] = {}
    args, kwargs = call.arguments
    entering = block.entering.tensor.clone()
    if moved:
        entering[:, _POSITION] = entering[:, _POSITION] * 1.5 + 0.5

    def replaced(thing: Any) -> Any:
        return entering if isinstance(thing, Tensor) and thing is block.entering.tensor else thing

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        seen[module] = output

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(call.module))
        for update in updates:
            if update.call is not None:
                stack.callback(update.call.module.register_forward_hook(keep).remove)
        try:
            call.module(*map(replaced, args), **{k: replaced(v) for k, v in kwargs.items()})
        except Exception:
            return [None] * len(updates)
    return [_output(seen, update) for update in updates]


def _output(seen: Mapping[nn.Module, Any], update: Update) -> Tensor | None:
    if update.call is None or update.call.module not in seen:
        return None
    output = seen[update.call.module]
    slot = next(s for s, v in update.call.outputs.items() if v is update.value)
    found = output if slot is None else output[slot]
    return found if isinstance(found, Tensor) else None
