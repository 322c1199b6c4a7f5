"""Which chain of layers is which stack: told by what each reads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from hookgraph.binding.resolving.blocks import Block
from hookgraph.binding.running.outputs import read_output
from hookgraph.binding.tracing.trace import Trace
from hookgraph.binding.tracing.values import Slot, Value
from hookgraph.ontology.transformer import ENCODER, STEM, VISION, TransformerStack

_PICTURE_AXES: Final = 4
"""Batch, channel, height, width; films have one more."""

_PIXELS: Final = "pixel"
"""How the names of arguments begin that hold the patches of pictures."""


def joined(chains: Mapping[str, list[Block]]) -> list[list[Block]]:
    """The chains, with the stages of one as one: lists at the same place in the members of some list, each
    of which reads what the one before returns.
    """
    found: list[list[Block]] = []
    last: dict[tuple[str, str], list[Block]] = {}
    for path, blocks in sorted(chains.items(), key=lambda pair: pair[1][0].call.number):
        parts = path.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
        place = (
            (".".join(parts[: numbers[-1]]), ".".join(parts[numbers[-1] + 1 :])) if numbers else (path, "")
        )
        before = last.get(place)
        if before is None or before[-1].leaving not in values_behind(blocks[0].entering):
            last[place] = blocks
            found.append(blocks)
            continue
        stage = before[-1].stage + 1
        before += [replace(block, stage=stage) for block in blocks]
    return found


def main_chain(trace: Trace, chains: Sequence[list[Block]]) -> list[Block]:
    """The stack whose names need no prefix: the last one that reads tokens, if any does, of those from which
    what is read of the output was computed.
    """
    read = values_behind(trace.value_of(read_output(trace.output)))
    leading = [blocks for blocks in chains if blocks[-1].leaving in read] or chains
    reading = [blocks for blocks in leading if _tokens_behind(trace, blocks)]
    return max(reading or leading, key=lambda blocks: blocks[-1].call.last)


def name_stacks(
    trace: Trace, others: Sequence[list[Block]], *, crossed: bool
) -> Iterator[tuple[TransformerStack, list[Block]]]:
    """The name of each other stack, as far as there are names: the first that reads pictures is the vision
    tower; of what is left the last is the encoder, and the one before it the stem.

    Args:
        trace: the pass.
        others: the chains that are not the main one.
        crossed: whether the main one attends to another. That is the encoder: the last of all.
    """
    rest = sorted(others, key=lambda blocks: blocks[-1].call.last)
    names = [ENCODER, STEM]
    if crossed:
        yield names.pop(0), rest.pop()
    tower = next((blocks for blocks in rest if _pictures_behind(trace, blocks)), None)
    if tower is not None:
        rest.remove(tower)
        yield VISION, tower
    yield from zip(names, reversed(rest), strict=False)


def values_behind(value: Value) -> set[Value]:
    """Everything that a value was computed from, itself included."""
    seen: set[Value] = set()
    waiting = [value]
    while waiting:
        here = waiting.pop()
        if here not in seen:
            seen.add(here)
            waiting.extend(here.inputs)
    return seen


def _tokens_behind(trace: Trace, blocks: list[Block]) -> bool:
    """Whether the first layer was computed from an embedding of integers that the model was given."""
    tokens = {v for v in trace.root.inputs.values() if not v.tensor.is_floating_point()}
    looked_up = [v for v in values_behind(blocks[0].entering) if v.op == "embedding"]
    return any(tokens & values_behind(i) for v in looked_up for i in v.inputs)


def _pictures_behind(trace: Trace, blocks: list[Block]) -> bool:
    given = {v for name, v in trace.root.inputs.items() if _is_picture(name, v)}
    return bool(given & values_behind(blocks[0].entering))


def _is_picture(slot: Slot, value: Value) -> bool:
    """Whether an argument holds pictures: by its axes; of patches side by side only its name tells."""
    patches = value.tensor.is_floating_point() and str(slot).startswith(_PIXELS)
    return value.tensor.ndim >= _PICTURE_AXES or patches
