"""Which updates move information between positions: found by moving it.

A layer is called again as it was in the trace, with what enters it changed at one position and every
update, as soon as it is known what became of it, held at what it was; an update that became another one at
other positions mixes them. How many these are is its reach: a state space or a Fourier transform reads every
position, a convolution those under its kernel, a token shift the one before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hookgraph.binding.data.layouts import arranged, restored
from hookgraph.binding.resolving.blocks import Block, Update
from hookgraph.binding.resolving.paths import STREAM_AXES
from hookgraph.binding.running.mechanisms import with_element
from hookgraph.binding.tracing.trace import Call, Trace, evaluating
from hookgraph.binding.tracing.values import Slot, Value

_SEED: Final = 0
"""Of the change: the same model is always told the same."""

_ROUNDED: Final = 1e-6
"""Of the largest number of an update: what changes less did not change. It is some roundings of a sum in
single precision, as those of experts that take tokens in other groups, and no mixer found is so weak."""

_ROUNDINGS: Final = 8
"""As many of a coarser precision did not change it either."""


class _Returned(NamedTuple):
    """A tensor that the call of a module returns."""

    call: Call
    slot: Slot
    value: Value


def find_mixing(trace: Trace, blocks: Sequence[Block]) -> frozenset[Update]:
    """The updates of `blocks` that are there to move information between positions.

    Of the updates of a layer without a softmax that all read other positions, those which read the fewest are
    there for the features, provided that another update reads more, or an attention: an MLP on what it reads
    mixed with the token before it (RWKV), or beside a convolution.
    """
    return frozenset(update for block in blocks for update in _mixers(trace, block))


def _mixers(trace: Trace, block: Block) -> Iterator[Update]:
    reach = _reach(trace, block)
    attended = [block.grid.positions - 1 for u in block.updates if u.softmax]
    nearest, farthest = min(reach.values(), default=0), max([*reach.values(), *attended], default=0)
    apart = nearest if nearest < farthest else 0
    yield from (update for update, positions in reach.items() if positions > apart)


def _reach(trace: Trace, block: Block) -> Mapping[Update, int]:
    """At how many other positions the updates without a softmax change with one position: the most there are.

    The position is one inside first, then, unless that told all, the first and the last, of which one or the
    other may be the only one that is read.
    """
    measured = {u: found for u in block.updates if (found := _measured_at(u)) is not None}
    before = _computed(trace, block, measured, None)
    positions = block.grid.positions
    reach = {u: 0 for u in before if not u.softmax and before[u].shape[1:2] == (positions,)}
    last = positions - 1
    for position in dict.fromkeys((last // 2, 0, last)):
        if len(reach) == 1 and any(reach.values()):
            break
        after = _computed(trace, block, measured, position)
        for update in reach.keys() & after.keys():
            count = _others(before[update], after[update], position)
            reach[update] = max(reach[update], count)
    return reach


def _measured_at(update: Update) -> _Returned | None:
    """Where a module returns an update; one that the layer weighs itself as it is before that."""
    call = None if update.step.partial else update.call or update.source
    if call is None:
        return None
    wanted = {update.value} if update.call is not None else update.cone
    return next((_Returned(call, s, v) for s, v in call.outputs.items() if v in wanted), None)


def _others(
    before: Float[Tensor, "batch pos *features"], after: Float[Tensor, "batch pos *features"], position: int
) -> int:
    """At how many positions but one two tensors differ."""
    if before.shape != after.shape or before.ndim < 3:
        return 0
    changed = (before - after).abs().flatten(2).amax((0, 2))
    told = max(_ROUNDED, _ROUNDINGS * torch.finfo(before.dtype).eps) * before.abs().max()
    return int((changed > told).sum()) - int(changed[position] > told)


def _computed(
    trace: Trace, block: Block, measured: Mapping[Update, _Returned], position: int | None
) -> Mapping[Update, Tensor]:
    """What each update becomes when the layer is called again as in the trace, its input moved or not."""
    entering = block.entering.tensor
    given = entering.clone() if position is None else _moved(block, position)
    holding = {u: _Holding(trace, block, returned) for u, returned in measured.items()}
    args, kwargs = block.call.arguments
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(block.call.module))
        for held in holding.values():
            stack.callback(held.returned.call.module.register_forward_hook(held).remove)
        try:
            block.call.module(
                *(given if x is entering else x for x in args),
                **{k: given if x is entering else x for k, x in kwargs.items()},
            )
        except Exception:  # a layer that cannot be called again tells nothing
            return {}
    computed = {u: held.computed for u, held in holding.items() if held.computed is not None}
    return {u: _by_position(block, measured[u].value, x) for u, x in computed.items()}


def _by_position(block: Block, value: Value, computed: Tensor) -> Tensor:
    """What an update became with positions on the second axis, also where it has rows and columns of them."""
    lying = arranged(block.grid.layout_of(value), computed, block.grid.batch)
    rows = lying.ndim == STREAM_AXES and lying.shape[1:3].numel() == block.grid.positions
    return lying.flatten(1, 2) if rows else lying


def _moved(block: Block, position: int) -> Tensor:
    """What enters a layer with noise as large as it is at one position: no norm undoes that."""
    entering, grid = block.entering.tensor, block.grid
    lying = arranged(grid.layout, entering, grid.batch).clone()
    here = lying[:, position]
    noise = torch.randn(here.shape, generator=torch.Generator().manual_seed(_SEED)).to(here)
    size = here.square().mean().sqrt()
    lying[:, position] = here + noise * torch.where(size > 0, size, torch.ones_like(size))
    return restored(grid.layout, lying, like=entering)


@final
class _Holding:
    """A hook that has the module of an update return what it returned in the trace.

    Args:
        trace: the pass.
        block: the layer, which is called again.
        returned: where the module returns the update.
    """

    def __init__(self, trace: Trace, block: Block, returned: _Returned) -> None:
        self.returned = returned
        self.computed: Tensor | None = None
        """What the module computed instead."""
        earlier = trace.calls[block.call.number + 1 : returned.call.number]
        self._before = sum(c.module is returned.call.module for c in earlier)

    def __call__(self, module: nn.Module, args: object, output: Any) -> Any:
        """Keep what is returned, and return what was."""
        self._before -= 1
        if self._before != -1:
            return None  # another call of the same module
        slot, held = self.returned.slot, self.returned.value.tensor.clone()
        self.computed = (output if slot is None else output[slot]).clone()
        return held if slot is None else with_element(output, slot, held)
