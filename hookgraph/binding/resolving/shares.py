"""What is added to the residual stream, as a sum of terms, each owned by a module as far as one does."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import ALIASES, Value, alias_chain, alias_root


@final
@dataclass(frozen=True, slots=True)
class Term:
    """A term: `coefficient` times a value; with `spread`, each of so many streams adds a share of it."""

    value: Value
    coefficient: float
    call: Call | None
    """The module that returns the value."""
    source: Call | None
    """The module that computes it; `call`, or one behind a multiplication by weights."""
    spread: int = 0


def terms_of(trace: Trace, block: Call, value: Value | None, coefficient: float = 1.0) -> Iterator[Term]:
    """The terms of a value that is added to the stream inside the call of a layer."""
    if value is None:
        return
    owners = [c for c in trace.producers.get(value, ()) if block in c.parents and not c.is_identity]
    operands = value.inputs
    shared = _shared(trace, block, value, coefficient)
    if owners:
        owner = min(owners, key=lambda c: len(c.parents))
        yield Term(value, coefficient, owner, owner)
    elif shared is not None:
        yield shared
    elif value.op in ALIASES and operands and operands[0].tensor.numel() == value.tensor.numel():
        yield from terms_of(trace, block, operands[0], coefficient)
    elif value.op in ("mul", "div") and len(operands) == 1 and value.scalars:
        factor = value.scalars[0] if value.op == "mul" else 1 / value.scalars[0]
        yield from terms_of(trace, block, operands[0], coefficient * factor)
    elif (
        value.op == "add"
        and len(operands) == 2
        and all(o.tensor.shape == value.tensor.shape for o in operands)
    ):
        for operand in operands:
            yield from terms_of(trace, block, operand, coefficient)
    else:
        yield Term(value, coefficient, None, _behind_weights(trace, block, value))


def is_weight(value: Value) -> bool:
    """Whether a value was computed from parameters alone."""
    if value.is_source:
        return value.op == "parameter"
    return value.tensor.ndim <= 1 and bool(value.inputs) and all(is_weight(v) for v in value.inputs)


def is_mask(value: Value) -> bool:
    """Whether a value is made of truth values or whole numbers: it may leave positions out."""
    return not alias_root(value).tensor.is_floating_point()


def _shared(trace: Trace, block: Call, value: Value, coefficient: float) -> Term | None:
    """An outer product: what a module returns, times one number per stream."""
    if value.op != "mul" or value.tensor.ndim != 4 or len(value.inputs) != 2:
        return None
    batch, positions, streams, width = value.tensor.shape
    for whole, share in (value.inputs, value.inputs[::-1]):
        shapes = (tuple(whole.tensor.shape), tuple(share.tensor.shape))
        if shapes == ((batch, positions, 1, width), (batch, positions, streams, 1)):
            chain = alias_chain(whole)
            owner = next(trace.owners(whole, block), None)
            returned = [] if owner is None else [v for v in owner.outputs.values() if v in chain]
            if returned:
                return Term(returned[0], coefficient, owner, owner, streams)
    return None


def _behind_weights(trace: Trace, block: Call, value: Value) -> Call | None:
    """The module whose output was multiplied by weights."""
    if value.op != "mul":
        return None
    others = [v for v in value.inputs if not is_weight(v)]
    return next(trace.owners(others[0], block), None) if len(others) == 1 else None
