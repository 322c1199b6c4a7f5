"""What attention in a model's own code multiplies, as far as its calls of PyTorch show it.

Scores are one product of queries and keys, whatever is done to them before the softmax; z is the product of
the pattern and the values. Or a fused attention computes all of it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, final

from jaxtyping import Float
from torch import Tensor

from hookgraph.binding.data.anchors import Role
from hookgraph.binding.data.views import Axes
from hookgraph.binding.resolving.added_keys import added_around
from hookgraph.binding.resolving.blocks import Block
from hookgraph.binding.resolving.head_order import are_shared_in_turn, orders_of_heads
from hookgraph.binding.resolving.projections import behind, is_matrix_product
from hookgraph.binding.tracing.operations import INSIDE, RESULT, Operand
from hookgraph.binding.tracing.trace import Call, Operation, Trace
from hookgraph.binding.tracing.values import ALIASES, Value

WEIGHED: Final = frozenset({*ALIASES, "mul", "native_dropout", "masked_fill"})
"""What may be done to the pattern before it is multiplied with the values."""

_EVERY: Final[tuple[Role, ...]] = ("query", "key", "value", "scores", "pattern", "out")

_ODD: Final = "batch, heads and positions are not an axis each in the product"

_BEFORE: Final = "keys of no token stand before those of tokens: {} of them"

_PAIRS: Final[tuple[Role, Role]] = ("scores", "pattern")

_GROUPED: Final = 5
"""As many axes the tensors have where heads lie in groups: batch, groups, heads of a group, and two more."""

_IN_TURN: Final = "heads share keys and values in turn: heads in a row have others each"

_NO_ORDER: Final = "heads lie on two axes, and no projection tells in which order they are counted"

_TWO_ORDERS: Final = "heads lie on two axes, and those of the queries are counted in another order than z's"

_PRODUCTS: Final = frozenset({"bmm", "baddbmm", "mm"})

_SHIFTED: Final = frozenset({*ALIASES, "mul", "div", "add", "sub"})

_ROUNDED: Final = 0.05
"""So little do probabilities that were rounded to half precision miss 1 together."""

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


@final
@dataclass(frozen=True, slots=True)
class Own:
    """The tensors of an attention that are reached in the code of a module, and why others are not."""

    found: Mapping[Role, Found] = field(default_factory=dict[Role, Found])
    why: Mapping[Role, str] = field(default_factory=dict[Role, str])
    heads: int = 0
    """How many there are, if known."""
    seen: Mapping[Role, Value] = field(default_factory=dict[Role, Value])
    """What the trace shows, also where no function is given or returns it whose axes are known."""

    def and_also(self, other: "Own") -> "Own":
        """Both together, of one attention."""
        found, why = {**self.found, **other.found}, {**self.why, **other.why}
        return replace(self, found=found, why=why)


def own_attention(trace: Trace, block: Block, owner: Call, softmax: Value) -> Own:
    """How the tensors of attention are reached in the code of a module; those that can be."""
    own = _without_added(_reached(trace, block, owner, softmax), block.call.first)
    seen: dict[Role, Value] = {**_seen(trace, block, owner, softmax)}
    seen.update({role: found.value for role, found in own.found.items()})
    return replace(own, seen={role: v for role, v in seen.items() if own.why.get(role) != _IN_TURN})


def _without_added(own: Own, first: int) -> Own:
    """The same with the keys and values of tokens only; scores for such as stand before them are left out."""
    found = dict(own.found)
    before = 0
    roles: tuple[Role, Role] = ("key", "value")
    for role in roles:
        here = found.get(role)
        if here is None or here.view is None:
            continue
        added = added_around(here.value, here.view, first)
        before = max(before, added[0])
        found[role] = replace(here, view=replace(here.view, added=added))
    if not before:
        return replace(own, found=found)
    left: dict[Role, Found] = {role: x for role, x in found.items() if role not in ("scores", "pattern")}
    return replace(own, found=left, why={**own.why, **dict.fromkeys(_PAIRS, _BEFORE.format(before))})


def _reached(trace: Trace, block: Block, owner: Call, softmax: Value) -> Own:
    operations = [o for o in trace.operations if owner in o.within]
    made = next((o for o in operations if o.first <= softmax.number < o.last), None)
    if made is None:
        return _none_of("the softmax is computed by no function that is looked into", *_EVERY)
    if made.form.kind == "fused":
        return _counted(trace, block, made.operands[0], partial(_of_fused, operations, made, block))
    if not _is_over_last(softmax.tensor):
        return _none_of("the softmax is not over the last axis, so that is not known to be the keys", *_EVERY)
    heads = _heads_of(made.out, block)
    if heads is None:
        return _none_of(_axes_of(made.out), *_EVERY)
    copies = _copies(trace, made.out, owner)
    return _counted(trace, block, made.out, partial(_of_softmax, operations, made, owner, copies, heads))


def _counted(trace: Trace, block: Block, computed: Value, make: Callable[[bool], Own]) -> Own:
    """What is reached, its heads counted as projections do where they lie on two axes.

    Args:
        trace: the pass.
        block: the layer.
        computed: what tells how many axes there are.
        make: what is reached if the second axis counts before the first, or not.
    """
    straight = make(False)
    out = straight.found.get("out")
    if computed.tensor.ndim != _GROUPED or not straight.found:
        return straight
    turned = make(True)
    query = straight.found.get("query")
    views = [own.found["out"].view for own in (straight, turned) if "out" in own.found]
    orders = orders_of_heads(
        trace, block.call, None if query is None else query.value, None if out is None else out.value, views
    )
    if len(orders) == 1:
        return turned if True in orders else straight
    return _none_of(_TWO_ORDERS if orders else _NO_ORDER, *_EVERY)


def _of_softmax(
    operations: Sequence[Operation],
    made: Operation,
    owner: Call,
    copies: set[Value],
    heads: int,
    turned: bool,
) -> Own:
    view = _by_pair(made.out, heads, turned)
    inside = Own(
        {
            "scores": Found(operand_of(operations, made, 0), view, made.operands[0]),
            "pattern": Found(operand_of(operations, made, RESULT), view, made.out),
        },
        heads=heads,
    )
    before = _of_scores(operations, made, owner, heads, turned)
    return inside.and_also(before).and_also(_of_pattern(operations, made, copies, heads, turned))


def _is_over_last(pattern: Float[Tensor, "..."]) -> bool:
    """Whether what a softmax returned adds up to 1 along the last axis."""
    total = pattern.detach().double().sum(-1)
    return bool((total - 1).abs().max() < _ROUNDED)


def _none_of(why: str, *roles: Role) -> Own:
    return Own({}, dict.fromkeys(roles, why))


def _axes_of(value: Value) -> str:
    """Why heads are not told apart in what a softmax returns, or in queries of a fused attention."""
    told = {
        3: "its tensors have 3 axes, of which the first is not examples times heads",
        5: "its tensors have 5 axes, which are not batch, groups, heads of a group, and positions",
    }
    return told.get(value.tensor.ndim, f"its tensors have {value.tensor.ndim} axes")


def _of_fused(operations: Sequence[Operation], made: Operation, block: Block, turned: bool) -> Own:
    terms = made.form.terms
    heads = _heads_of(made.operands[0], block)
    if heads is None or not terms:
        return _none_of(_axes_of(made.operands[0]), *_EVERY)
    places: tuple[tuple[Role, int], ...] = (("query", 0), ("key", 1), ("value", 2), ("out", RESULT))
    found: dict[Role, Found] = {}
    why: dict[Role, str] = {}
    shared = _in_order(terms[0][:-2], turned)
    for role, place in places:
        letters, value = terms[place], (*made.operands, made.out)[place]
        view = _view(letters, shared, letters[-2], letters[-1], heads)
        if are_shared_in_turn(letters, shared, value.tensor):
            why[role] = _IN_TURN
        elif view is not None:
            found[role] = Found(operand_of(operations, made, place), view, value)
    alike = _by_pair(made.operands[0], heads, turned)
    found["scores"] = found["pattern"] = Found(operand_of(operations, made, INSIDE), alike, made.out)
    return Own(found, why, heads=heads)


def _of_scores(
    operations: Sequence[Operation], softmax: Operation, owner: Call, heads: int, turned: bool
) -> Own:
    """Queries and keys: of the only product that the scores come from, those in its factors apart."""
    before = behind(softmax.operands[0], owner.first)
    made = [o for o in operations if o.form.kind == "product" and o.out in before]
    inner = {v for o in made for x in o.operands for v in behind(x, owner.first)}
    last = [o for o in made if o.out not in inner]
    roles: tuple[Role, Role] = ("query", "key")
    if not last:
        return _none_of("no product that is looked into makes the scores", *roles)
    if len(last) > 1:
        several = f"the scores are the sum of {len(last)} products, each with queries and keys of its own"
        return _none_of(several, *roles)
    product = last[0]
    left, right, result = product.form.terms or ("", "", "")
    if _turned(product.out, before):
        return _none_of("the axes of the scores change places between the product and the softmax", *roles)
    inside = [x for x in left if x in right and x not in result]
    if len(inside) != 1 or len(result) < 3:
        return _none_of(f"{_ODD} that makes the scores", *roles)
    shared, pos, key = _in_order(result[:-2], turned), result[-2], result[-1]
    found: dict[Role, Found] = {}
    for place, letters in enumerate((left, right)):
        role, along = ("query", pos) if pos in letters else ("key", key)
        view = _view(letters, shared, along, inside[0], heads)
        if are_shared_in_turn(letters, shared, product.operands[place].tensor):
            return Own(found, {role: _IN_TURN})
        if view is not None:
            found[role] = Found(operand_of(operations, product, place), view, product.operands[place])
    return _with_reason(found, f"{_ODD} that makes the scores", *roles)


def _seen(trace: Trace, block: Block, owner: Call, softmax: Value) -> Mapping[Role, Value]:
    """Factors and results of the products that lead to a softmax, and on from it. Queries, or keys, are there
    only if they are the same in all products that lead to it, of one of which rows stay rows; the rest if one
    product leads on.
    """
    before = behind(softmax, block.call.first)
    made = {v for v in before if v.op in _PRODUCTS and not is_matrix_product(v)}
    inner = {b for v in made for x in v.inputs for b in behind(x, block.call.first)}
    last = sorted(made - inner, key=lambda v: v.number)
    returned = [next((o.out for o in trace.operations if o.first <= v.number < o.last), v) for v in last]
    weights = _made_of_weights(before)
    straight = any(not _turned(v, before) for v in returned)
    seen: dict[Role, Value] = {}
    places: tuple[tuple[Role, int], ...] = (("query", -2), ("key", -1))
    for role, place in places:
        if straight and len({_origin(v.inputs[place], weights) for v in last}) == 1:
            seen[role] = last[-1].inputs[place]
    copies = _copies(trace, softmax, owner)
    after = trace.values[softmax.number + 1 : owner.last]
    onward = [v for v in after if v.op in _PRODUCTS and v.inputs[0] in copies]
    if len(onward) == 1:
        seen |= {"value": onward[0].inputs[1], "out": onward[0]}
    return seen


def _origin(value: Value, weights: Set[Value]) -> Value:
    """What a value is but for views, numbers and weights that it was multiplied with or added to."""
    while value.op in _SHIFTED:
        inputs = [v for v in value.inputs if v.op != "parameter" and v not in weights]
        if len(inputs) != 1:
            break
        value = inputs[0]
    return value


def _made_of_weights(values: Collection[Value]) -> set[Value]:
    """Those of some values that were computed from parameters alone."""
    found: set[Value] = set()
    for value in sorted(values, key=lambda v: v.number):
        if value.inputs and all(v.op == "parameter" or v in found for v in value.inputs):
            found.add(value)
    return found


def _with_reason(found: Mapping[Role, Found], why: str, *roles: Role) -> Own:
    return Own(found, {role: why for role in roles if role not in found})


def _turned(product: Value, before: set[Value]) -> bool:
    """Whether axes change places on the way from a product to the softmax."""
    later = {product}
    for value in sorted(before, key=lambda v: v.number):
        if any(v in later for v in value.inputs):
            later.add(value)
    return any(v.op in _TURNS for v in later - {product})


def _of_pattern(
    operations: Sequence[Operation], softmax: Operation, copies: set[Value], heads: int, turned: bool
) -> Own:
    """Values and z: of the only product with the pattern."""
    later = [o for o in operations if o.form.kind == "product" and o.first >= softmax.last]
    given = [o for o in later if any(v in copies for v in o.operands)]
    roles: tuple[Role, Role] = ("value", "out")
    if not given:
        return _none_of("no product that is looked into is given the pattern", *roles)
    if len(given) > 1:
        return _none_of(f"the pattern is multiplied with {len(given)} tensors", *roles)
    product = given[0]
    *terms, result = product.form.terms or ("", "", "")
    place = 0 if product.operands[0] in copies else 1
    pattern, values = terms[place], terms[1 - place]
    keys = [x for x in pattern if x in values and x not in result]
    features = [x for x in values if x not in pattern]
    shared = _in_order(pattern[:-2], turned)
    queries = [x for x in pattern if x not in values and x not in shared]
    if not len(keys) == len(features) == len(queries) == 1:
        return _none_of(f"{_ODD} of the pattern and the values", *roles)
    found: dict[Role, Found] = {}
    why: dict[Role, str] = {}
    ways: tuple[tuple[Role, str, str, int], ...] = (
        ("value", values, keys[0], 1 - place),
        ("out", result, queries[0], RESULT),
    )
    for role, letters, along, at in ways:
        view, value = _view(letters, shared, along, features[0], heads), (*product.operands, product.out)[at]
        if are_shared_in_turn(letters, shared, value.tensor):
            why[role] = _IN_TURN
        elif view is not None:
            found[role] = Found(operand_of(operations, product, at), view, value)
    missing = _with_reason(found, f"{_ODD} of the pattern and the values", *roles)
    return replace(missing, why={**missing.why, **why})


def _copies(trace: Trace, pattern: Value, owner: Call) -> set[Value]:
    """The pattern, and what is it but for dropout, masks and views."""
    copies = {pattern}
    for value in trace.values[pattern.number + 1 : owner.last]:
        if value.op in WEIGHED and value.inputs and value.inputs[0] in copies:
            copies.add(value)
    return copies


def _in_order(shared: str, turned: bool) -> str:
    """The letters of the batch and of the heads, in the order in which heads are counted."""
    return shared[0] + shared[:0:-1] if turned else shared


def _by_pair(value: Value, heads: int, turned: bool) -> Axes | None:
    """How scores and pattern lie: by example, head, position and key, but for the axes of heads."""
    if value.tensor.ndim == 3:
        return Axes((0, 1, 2, 3), heads)
    of_groups = (0, 2, 1, 3, 4) if turned else (0, 1, 2, 3, 4)
    return None if value.tensor.ndim == 4 else Axes(of_groups, grouped=1)


def _view(letters: str, shared: str, along: str, features: str, heads: int) -> Axes | None:
    """How axes with these letters become batch, positions, heads and features."""
    if len(shared) == 1:  # examples times heads, which must come first to be told apart
        if not letters.startswith(shared):
            return None
        letters, shared = f"{shared}*{letters[1:]}", f"{shared}*"
    else:
        heads = 0
    of_heads = [x for x in shared[1:] if x in letters]  # groups of heads, and the heads of a group, are two
    wanted = f"{shared[0]}{along}{''.join(of_heads)}{features}"
    if not 1 <= len(of_heads) <= 2 or sorted(wanted) != sorted(letters):
        return None
    return Axes(tuple(letters.index(x) for x in wanted), heads, 2 if len(of_heads) == 2 else 0)


def _heads_of(computed: Value, block: Block) -> int | None:
    """How many heads there are: on an axis of their own, in groups, or with the examples on the first one.

    Where an attention is not over the positions of the stream, windows may lie on these axes too.
    """
    shape, grid = computed.tensor.shape, block.grid
    if len(shape) == 4:
        return shape[1]
    if len(shape) == 5:
        apart = shape[0] == grid.batch and min(shape[1:3]) > 1 and shape[3] == grid.positions
        return shape[1] * shape[2] if apart else None
    whole = len(shape) == 3 and shape[0] % grid.batch == 0 and shape[1] == grid.positions
    return shape[0] // grid.batch if whole else None


def operand_of(operations: Sequence[Operation], one: Operation, place: int) -> Operand:
    """A tensor of one of some calls of functions, told by its number among those of its kind."""
    same = [o for o in operations if o.form.kind == one.form.kind]
    return Operand(one.form.kind, same.index(one), len(same), place)
