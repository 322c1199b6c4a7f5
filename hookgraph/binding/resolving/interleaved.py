"""Layers that are not called: several lists of parts, of which a model's forward calls one each in turn, or
modules whose `forward` is called past their hooks.

Such a layer is a call made up around the calls of its parts: it is given what its first part is given, and
returns what its last part returns.
"""

from collections.abc import Iterator
from typing import TypeAlias

from torch import nn

from hookgraph.binding.tracing.trace import Call, Trace

Ends: TypeAlias = tuple[Call, Call]
"""The first part of a layer and the last one."""


def interleaved_layers(trace: Trace) -> Iterator[tuple[str, list[tuple[Call, Ends]]]]:
    """The layers whose parts lie in several lists of one module, each with its ends, by its path."""
    for path, module in trace.root.module.named_modules():
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        numbers = {part: number for parts in lists for number, part in enumerate(parts)}
        calls = [c for c in trace.calls if c.module in numbers]
        layers = _layers(calls, [numbers[c.module] for c in calls])
        if layers:
            yield path, [(_made_up(trace, parts), (parts[0], parts[-1])) for parts in layers]


def bypassed_layers(trace: Trace) -> Iterator[tuple[str, list[tuple[Call, Ends]]]]:
    """The layers of a list that are never called, while two parts of each or more are, one after another."""
    called = {c.module for c in trace.calls}
    for path, module in trace.root.module.named_modules():
        if not isinstance(module, nn.ModuleList) or any(layer in called for layer in module):
            continue
        layers = [_parts(trace, f"{path}.{number}.") for number in range(len(module))]
        if layers and all(len(parts) > 1 for parts in layers):
            yield path, [(_made_up(trace, parts), (parts[0], parts[-1])) for parts in layers]


def _parts(trace: Trace, prefix: str) -> list[Call]:
    """The outermost calls of the modules below a path."""
    inside = [c for c in trace.calls if c.path.startswith(prefix)]
    return [c for c in inside if not any(p.path.startswith(prefix) for p in c.parents)]


def _layers(calls: list[Call], numbers: list[int]) -> list[list[Call]]:
    """Calls by layer, if every layer has as many, more than one, and the layers come one after another."""
    count = max(numbers, default=0) + 1
    size = len(calls) // count
    in_turn = numbers == [number for number in range(count) for _ in range(size)]
    if size < 2 or not in_turn or any(c.parents != calls[0].parents for c in calls):
        return []
    return [calls[start : start + size] for start in range(0, len(calls), size)]


def _made_up(trace: Trace, parts: list[Call]) -> Call:
    """A call around the calls of its parts, and among the parents of whatever is called inside of them."""
    first, last = parts[0], parts[-1]
    layer = Call(first.number - 1, "", nn.Module(), 0, first.parents, first.first, first.inputs)
    layer.outputs, layer.last = last.outputs, last.last
    depth = len(first.parents)
    for call in trace.calls[first.number :]:
        if call in parts or any(part in call.parents for part in parts):
            call.parents = (*call.parents[:depth], layer, *call.parents[depth:])
    return layer
