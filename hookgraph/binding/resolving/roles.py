"""What each update of a layer is: attention, cross-attention, a mixer, the MLP, or a further branch."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from hookgraph.binding.resolving.blocks import Block, Update
from hookgraph.binding.tracing.trace import Trace
from hookgraph.binding.tracing.values import Value, alias_chain

Role: TypeAlias = Literal["attention", "cross-attention", "mixer", "mlp", "extra"]


def assign_roles(
    trace: Trace, block: Block, mixing: frozenset[Update], other_stacks: frozenset[Value]
) -> dict[Role, list[Update]]:
    """The updates of a layer by role.

    Attention is computed through a softmax over positions, cross-attention from the values of another
    stack; a mixer moves information between positions without one. Of the rest the update with the most
    parameters is the MLP.

    Args:
        trace: the pass.
        block: the layer.
        mixing: updates known to move information between positions.
        other_stacks: values that were computed from the output of another stack.
    """
    roles: dict[Role, list[Update]] = {}
    plain: list[Update] = []
    # A stream may itself have been made of another stack: what attends to it attends to itself.
    beside = other_stacks - alias_chain(block.entering)
    for update in block.updates:
        if _reads_any(update, beside):
            roles.setdefault("cross-attention", []).append(update)
        elif update.softmax:
            roles.setdefault("attention", []).append(update)
        elif update in mixing:
            roles.setdefault("mixer", []).append(update)
        else:
            plain.append(update)
    plain.sort(key=_parameters, reverse=True)
    if plain:
        roles["mlp"] = plain[:1]
    if plain[1:]:
        roles["extra"] = plain[1:]
    return roles


def is_ambiguous(block: Block) -> bool:
    """Whether more than one update, or the only one, could be a mixer."""
    plain = [u for u in block.updates if not u.softmax]
    return len(plain) != 1 or len(block.updates) == 1


def values_from(trace: Trace, sources: Sequence[Value], before: int) -> frozenset[Value]:
    """The values computed from `sources` before number `before`, the sources included."""
    found = set(sources)
    for value in trace.values[:before]:
        if any(v in found for v in value.inputs):
            found.add(value)
    return frozenset(found)


def _reads_any(update: Update, values: frozenset[Value]) -> bool:
    return update.softmax and any(i in values for v in update.cone for i in v.inputs)


def _parameters(update: Update) -> int:
    """How many parameters took part in an update."""
    sources = {i for v in update.cone for i in v.inputs if i.op == "parameter"}
    return sum(v.tensor.numel() for v in sources)
