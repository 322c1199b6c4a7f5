"""Attention whose function is called once for each of several pieces, as picture by picture."""

from collections.abc import Mapping, Sequence

from hookgraph.binding.data.anchors import Role
from hookgraph.binding.data.views import Axes
from hookgraph.binding.resolving.own_attention import Found, operand_of
from hookgraph.binding.tracing.trace import AttentionCall, Trace
from hookgraph.binding.tracing.values import Value


def of_pieces(trace: Trace, calls: Sequence[AttentionCall]) -> tuple[Mapping[Role, Found], Value | None]:
    """Where the whole of queries, keys and values is split into pieces of which each attends alone, and what
    they are joined to.
    """
    operations = [o for o in trace.operations if calls[0].call in o.within]
    found: dict[Role, Found] = {}
    ways: tuple[tuple[Role, list[Value]], ...] = (
        ("query", [a.query for a in calls]),
        ("key", [a.key for a in calls]),
        ("value", [a.value for a in calls]),
    )
    for role, pieces in ways:
        splits = (o for o in operations if o.form.kind == "split")
        split = next((o for o in splits if _are_all(pieces, o.operands[0])), None)
        if split is not None:
            view = Axes((0, 2, 1, 3))
            found[role] = Found(operand_of(operations, split, 0), view, split.operands[0])
    outs = [a.out for a in calls]
    joined = (v for v in trace.values[outs[-1].number :] if v.op == "cat" and list(v.inputs) == outs)
    return found, next(joined, None)


def _are_all(pieces: Sequence[Value], whole: Value) -> bool:
    """Whether these are all the pieces of a tensor, in order."""
    numel = sum(v.tensor.numel() for v in pieces)
    inside = all(v.inputs and v.inputs[0] is whole and v.output == i for i, v in enumerate(pieces))
    return inside and numel == whole.tensor.numel() and whole.tensor.ndim == 4
