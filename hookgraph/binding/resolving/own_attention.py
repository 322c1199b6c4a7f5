"""What attention in a model's own code multiplies, as far as its calls of PyTorch show it.

Scores are one product of queries and keys, whatever is done to them before the softmax; z is the product of
the pattern and the values. Or a fused attention computes all of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from hookgraph.binding.data.anchors import Role
from hookgraph.binding.data.views import Axes
from hookgraph.binding.resolving.blocks import Block
from hookgraph.binding.resolving.projections import behind
from hookgraph.binding.tracing.operations import INSIDE, RESULT, Operand
from hookgraph.binding.tracing.trace import AttentionCall, Call, Operation, Trace
from hookgraph.binding.tracing.values import ALIASES, Value

WEIGHED: Final = frozenset({*ALIASES, "mul", "native_dropout", "masked_fill"})
"""What may be done to the pattern before it is multiplied with the values."""

_TURNS: Final = frozenset({"transpose", "permute", "t"})


@final
@dataclass(frozen=True, slots=True)
class Found:
    """A tensor that a function in a module is given or returns.

    Args:
        operand: where.
        view: how it lies.
        value: it in the trace.
    """

    operand: Operand
    view: Axes | None
    value: Value


def own_attention(trace: Trace, block: Block, owner: Call, softmax: Value) -> Mapping[Role, Found]:
    """How the tensors of attention are reached in the code of a module; those that can be."""
    operations = [o for o in trace.operations if owner in o.within]
    made = next((o for o in operations if o.first <= softmax.number < o.last), None)
    if made is None:
        return {}
    if made.form.kind == "fused":
        return _of_fused(operations, made, block)
    if made.form.kind != "softmax":
        return {}
    heads = _heads_of(made.out, block)
    if heads is None and made.out.tensor.ndim == 3:
        return {}
    view = Axes((0, 1, 2, 3), heads) if heads and made.out.tensor.ndim == 3 else None
    found: dict[Role, Found] = {
        "scores": Found(_operand(operations, made, 0), view, made.operands[0]),
        "pattern": Found(_operand(operations, made, RESULT), view, made.out),
    }
    if heads is None:
        return found
    copies = _copies(trace, made.out, owner)
    found.update(_of_scores(operations, made, owner, heads))
    found.update(_of_pattern(operations, made, copies, heads))
    return found


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
            found[role] = Found(_operand(operations, split, 0), view, split.operands[0])
    outs = [a.out for a in calls]
    joined = (v for v in trace.values[outs[-1].number :] if v.op == "cat" and list(v.inputs) == outs)
    return found, next(joined, None)


def _are_all(pieces: Sequence[Value], whole: Value) -> bool:
    """Whether these are all the pieces of a tensor, in order."""
    numel = sum(v.tensor.numel() for v in pieces)
    inside = all(v.inputs and v.inputs[0] is whole and v.output == i for i, v in enumerate(pieces))
    return inside and numel == whole.tensor.numel() and whole.tensor.ndim == 4


def _of_fused(operations: Sequence[Operation], made: Operation, block: Block) -> Mapping[Role, Found]:
    terms = made.form.terms
    if not terms:
        return {}
    query = made.operands[0].tensor
    heads = _heads_of(made.operands[0], block)
    if heads is None:
        return {}
    places: tuple[tuple[Role, int], ...] = (("query", 0), ("key", 1), ("value", 2), ("out", RESULT))
    found: dict[Role, Found] = {}
    for role, place in places:
        letters = terms[place]
        view = _view(letters, letters[:-2], letters[-2], letters[-1], heads)
        if view is not None:
            found[role] = Found(_operand(operations, made, place), view, (*made.operands, made.out)[place])
    alike = Axes((0, 1, 2, 3), heads) if query.ndim == 3 else None
    found["scores"] = found["pattern"] = Found(_operand(operations, made, INSIDE), alike, made.out)
    return found


def _of_scores(
    operations: Sequence[Operation], softmax: Operation, owner: Call, heads: int
) -> Mapping[Role, Found]:
    """Queries and keys: of the only product that the scores come from, those in its factors apart."""
    before = behind(softmax.operands[0], owner.first)
    made = [o for o in operations if o.form.kind == "product" and o.out in before]
    inner = {v for o in made for x in o.operands for v in behind(x, owner.first)}
    last = [o for o in made if o.out not in inner]
    if len(last) != 1 or not last[0].form.terms:
        return {}
    product = last[0]
    left, right, result = product.form.terms
    if len(result) < 3 or _turned(product.out, before):
        return {}
    shared, pos, key = result[:-2], result[-2], result[-1]
    inside = [x for x in left if x in right and x not in result]
    if len(inside) != 1:
        return {}
    found: dict[Role, Found] = {}
    for place, letters in enumerate((left, right)):
        role, along = ("query", pos) if pos in letters else ("key", key)
        view = _view(letters, shared, along, inside[0], heads)
        if view is not None:
            found[role] = Found(_operand(operations, product, place), view, product.operands[place])
    return found


def _turned(product: Value, before: set[Value]) -> bool:
    """Whether axes change places on the way from a product to the softmax."""
    later = {product}
    for value in sorted(before, key=lambda v: v.number):
        if any(v in later for v in value.inputs):
            later.add(value)
    return any(v.op in _TURNS for v in later - {product})


def _of_pattern(
    operations: Sequence[Operation], softmax: Operation, copies: set[Value], heads: int
) -> Mapping[Role, Found]:
    """Values and z: of the first product with the pattern."""
    later = [o for o in operations if o.form.kind == "product" and o.first >= softmax.last]
    product = next((o for o in later if any(v in copies for v in o.operands)), None)
    if product is None or not product.form.terms:
        return {}
    terms, result = product.form.terms[:2], product.form.terms[2]
    place = 0 if product.operands[0] in copies else 1
    pattern, values = terms[place], terms[1 - place]
    keys = [x for x in pattern if x in values and x not in result]
    features = [x for x in values if x not in pattern]
    queries = [x for x in pattern if x not in values]
    if not len(keys) == len(features) == len(queries) == 1:
        return {}
    shared = pattern[:-2]
    found: dict[Role, Found] = {}
    ways: tuple[tuple[Role, str, str, int], ...] = (
        ("value", values, keys[0], 1 - place),
        ("out", result, queries[0], RESULT),
    )
    for role, letters, along, at in ways:
        view = _view(letters, shared, along, features[0], heads)
        if view is not None:
            value = (*product.operands, product.out)[at]
            found[role] = Found(_operand(operations, product, at), view, value)
    return found


def _copies(trace: Trace, pattern: Value, owner: Call) -> set[Value]:
    """The pattern, and what is it but for dropout, masks and views."""
    copies = {pattern}
    for value in trace.values[pattern.number + 1 : owner.last]:
        if value.op in WEIGHED and value.inputs and value.inputs[0] in copies:
            copies.add(value)
    return copies


def _view(letters: str, shared: str, along: str, features: str, heads: int) -> Axes | None:
    """How axes with these letters become batch, positions, heads and features."""
    if len(shared) == 1:  # examples times heads, which must come first to be told apart
        if not letters.startswith(shared):
            return None
        letters, shared = f"{shared}*{letters[1:]}", f"{shared}*"
    else:
        heads = 0
    wanted = f"{shared[0]}{along}{shared[1]}{features}"
    if len(shared) != 2 or sorted(wanted) != sorted(letters):
        return None
    return Axes(tuple(letters.index(x) for x in wanted), heads)


def _heads_of(computed: Value, block: Block) -> int | None:
    """How many heads there are: on an axis of their own, or with the examples on the first one.

    Where an attention is not over the positions of the stream, windows may lie on that axis too.
    """
    shape, batch = computed.tensor.shape, block.grid.batch
    if len(shape) == 4:
        return shape[1]
    whole = len(shape) == 3 and shape[0] % batch == 0 and shape[1] == block.grid.positions
    return shape[0] // batch if whole else None


def _operand(operations: Sequence[Operation], one: Operation, place: int) -> Operand:
    same = [o for o in operations if o.form.kind == one.form.kind]
    return Operand(one.form.kind, same.index(one), len(same), place)
