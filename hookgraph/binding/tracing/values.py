"""A tensor of a traced pass: what computed it, from what, and what it is a view or a cast of."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import final

from jaxtyping import Shaped
from torch import Tensor

Slot = int | str | None
"""Which element of the arguments or outputs of a module: a position, a name, or the thing itself."""

# fmt: off
ALIASES = frozenset(
    {
        "view", "_unsafe_view", "reshape", "clone", "_to_copy", "detach", "alias", "contiguous",
        "lift_fresh", "expand", "unsqueeze", "squeeze", "permute", "transpose", "t", "slice", "select",
        "split", "split_with_sizes", "unbind", "chunk", "flatten", "unflatten", "to"
    }
)
# fmt: on
"""Operations whose output holds elements of their first input, unchanged but for the dtype."""

_COPIES = frozenset({"clone", "_to_copy"})
"""Those of them that share no memory with it."""


@final
@dataclass(eq=False, slots=True, repr=False)
class Value:
    """A tensor of the pass, computed once. In-place operations make a new value."""

    number: int
    op: str
    inputs: "tuple[Value, ...]"
    tensor: Shaped[Tensor, "..."]
    scalars: tuple[float, ...] = ()
    replay: Callable[[Tensor], object] | None = None
    """The operation again, with another tensor in place of its first input."""
    output: int = 0
    """Which output of the operation this is."""
    overwritten: bool = False
    """Whether the pass changes this tensor in place later on."""
    changed: int = 0
    """How many values there were when it did."""
    name: str = ""
    """For a parameter or a buffer: its name."""
    axes: int = 3
    """How many axes an activation of this pass has at least."""

    @property
    def is_source(self) -> bool:
        """A parameter, a buffer or an input of the model: nothing computed it in this pass."""
        return not self.op or self.op == "parameter"

    @property
    def is_activation(self) -> bool:
        """A floating-point tensor with at least an axis for batch, positions and features, or packed ones."""
        return self.tensor.is_floating_point() and self.tensor.ndim >= self.axes

    def __repr__(self) -> str:
        return f"{self.number}:{self.op or 'input'}{tuple(self.tensor.shape)}"


def alias_root(value: Value, stop: Iterable[Value] = ()) -> Value:
    """The value whose elements this one holds, all of them: views and casts undone."""
    stops = set(stop)
    while value not in stops and value.op in ALIASES and value.inputs:
        source = value.inputs[0]
        if source.tensor.numel() != value.tensor.numel():
            return value
        value = source
    return value


def is_overwritten(value: Value) -> bool:
    """Whether the pass changes a tensor in place later on, or what it is a view of."""
    while not value.overwritten and value.op in ALIASES - _COPIES and value.inputs:
        value = value.inputs[0]
    return value.overwritten


def is_changed(value: Value, given: Collection[Value]) -> bool:
    """Whether a value is one of those `given`, changed in place."""
    here = value
    while here not in given:
        before = here.inputs[0] if here.inputs else here
        if not before.overwritten or before.changed > here.number:
            return False
        here = before
    return here is not value


def alias_chain(value: Value) -> set[Value]:
    """A value, and those of which it is a view or a cast with all their elements."""
    chain = {value}
    while value.op in ALIASES and value.inputs and value.inputs[0].tensor.numel() == value.tensor.numel():
        value = value.inputs[0]
        chain.add(value)
    return chain
