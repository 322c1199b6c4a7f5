"""Between which layers a pass can begin: where all that later layers read is the stream.

A layer may hand on more than the stream: keys that later layers share, a table of relative positions,
features that are added much later. What depends on the stream is lost when the layer is left out. What does
not is there again if the layer runs, whatever it is given.
"""

from bisect import bisect
from collections.abc import Sequence

from hookgraph.binding.data.findings import Resumption
from hookgraph.binding.resolving.blocks import Block
from hookgraph.binding.running.outputs import read_output
from hookgraph.binding.tracing.trace import Trace
from hookgraph.binding.tracing.values import Value, alias_chain, alias_root


def resumptions(trace: Trace, blocks: Sequence[Block]) -> list[Resumption]:
    """For each layer of a stack, what it takes to begin a pass after it."""
    output = trace.value_of(read_output(trace.output))
    moved = _made_of(blocks[0].entering, trace)
    found: list[Resumption] = []
    for i, block in enumerate(blocks):
        handed = blocks[i + 1].entering if i + 1 < len(blocks) else block.leaving
        if block.leaving not in alias_chain(handed):
            found.append(Resumption(lost=i))  # what it returns is not what the next layer is given
            continue
        beside = _computed_in(blocks[: i + 1], output, handed)
        lost = [layer for layer, value in beside if value in moved]
        needed = tuple(sorted({layer for layer, _ in beside}))
        found.append(Resumption(lost=min(lost)) if lost else Resumption(needed))
    return found


def _made_of(source: Value, trace: Trace) -> set[Value]:
    """Everything that was computed from a value, itself included: inputs come before what is made of them."""
    found = {source}
    for value in trace.values[source.number :]:
        if not found.isdisjoint(value.inputs):
            found.add(value)
    return found


def _computed_in(blocks: Sequence[Block], output: Value, stream: Value) -> list[tuple[int, Value]]:
    """What the output reads of what these layers computed, beside the stream that the last one returns."""
    given = alias_chain(stream)
    starts = [block.call.first for block in blocks]
    found: list[tuple[int, Value]] = []
    waiting, seen = [output], set[Value]()
    while waiting:
        here = waiting.pop()
        if here in seen or here.is_source or alias_root(here, given) in given:
            continue
        seen.add(here)
        layer = bisect(starts, here.number) - 1
        if layer >= 0 and here.number < blocks[layer].call.last:
            found.append((layer, here))
        else:
            waiting.extend(here.inputs)
    return found
