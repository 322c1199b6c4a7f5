"""How one location is reached in a model, as data: printable and comparable."""

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, final

from hookgraph.binding.data.layouts import Layout
from hookgraph.binding.data.views import View
from hookgraph.binding.tracing.operations import Operand
from hookgraph.binding.tracing.trace import Call, Trace
from hookgraph.binding.tracing.values import Slot, is_overwritten
from hookgraph.ontology.locations import Location

Mechanism: TypeAlias = Literal[
    "output",
    "input",
    "sum",
    "returned sum",
    "interior",
    "own code",
    "norm scale",
    "head result",
    "head input",
    "experts",
    "product",
]
"""How the tensor is read and replaced:

* `output`: what a module returns, replaced in what it returns.
* `input`: what a module is given, replaced in what it is given.
* `sum`: what a module is given, changed in place, because others hold the same tensor.
* `returned sum`: what a module returns that it was given and changed in place itself, changed in place too,
  because its caller may go on with what it gave.
* `interior`: inside the attention function.
* `own code`: in attention by code of the model's own: what a product, the softmax or a fused attention reads
  or returns; in a layer: what its own product with a parameter returns.
* `norm scale`: computed from a norm's input; an edit rescales its output.
* `head input`: a projection's input once per head; an edit adds the difference to what the head gets.
* `experts`: inside routed experts, by token and choice.
* `product`: what the only matrix product inside a module returns.
* `head result`: computed from the input of the output projection; an edit adds the difference.
"""

# fmt: off
Role: TypeAlias = Literal[
    "", "query", "key", "value", "scores", "pattern", "out", "neurons", "outputs", "product",
    "attention", "cross-attention", "mixer", "mlp", "extra",
]
# fmt: on
"""Which tensor of an attention function, of experts, or of a module that computes a product; or which update
of a layer.
"""


Kept: TypeAlias = Literal["", "states", "shared", "source"]
"""What a cache keeps of keys and values: these themselves, which later layers may share, or what they are
made from.
"""


@final
@dataclass(frozen=True, slots=True)
class Way:
    """Where code of a model's own has a tensor, and how it lies there."""

    operand: Operand
    view: View = None


@final
@dataclass(frozen=True, slots=True)
class Anchor:
    """How one location is reached.

    Args:
        location: what is reached.
        mechanism: see `Mechanism`.
        module: path of the module.
        slot: which element of the module's arguments or outputs.
        also: for `input`: other arguments that are the same tensor, replaced with it.
        view: how the value lies in that tensor.
        role: for `interior`, `experts` and `product`: which tensor.
        eager: for `interior`: the model's own eager function, as `module:name`.
        centred: for `norm scale`: whether the norm subtracts the mean.
        epsilon: for `norm scale`: what the norm adds to the mean square.
        layout: in which order the tensor's axes lie.
        overwritten: the model changes the tensor in place afterwards, so that a copy goes on.
        limit: the values are integers below it; 0 if they are none.
        kept: for keys and values at `interior`: whether a cache keeps these very tensors (`states`; `shared`
            where later layers are given them too) or what they are made from; empty where no cache was seen.
        call: which of the module's calls in one pass.
        calls: how many calls of the module there are in one pass.
        operand: for `own code`: which tensor of which function.
        other: the same where the model is told to use the other kernel, eager or fused.
    """

    location: Location
    mechanism: Mechanism
    module: str
    slot: Slot = None
    view: View = None
    role: Role = ""
    eager: str = ""
    centred: bool = False
    epsilon: float = 0.0
    layout: Layout = ""
    overwritten: bool = False
    limit: int = 0
    kept: Kept = ""
    call: int = 0
    calls: int = 1
    operand: Operand | None = None
    other: Way | None = None
    also: tuple[Slot, ...] = ()

    @property
    def ways(self) -> tuple[Way, ...]:
        """For `own code`: every way in which the model may have it."""
        if self.operand is None:
            return ()
        own = Way(self.operand, self.view)
        return (own,) if self.other is None else (own, self.other)

    def __str__(self) -> str:
        slots = () if self.slot is None else (self.slot, *self.also)
        slot = f"[{', '.join(map(repr, slots))}]" if slots else ""
        role = f" {self.role}" if self.role else ""
        view = "" if self.view is None else f" as {self.view}"
        layout = f", {self.layout}" if self.layout else ""
        operand = "" if self.operand is None else f" at {self.operand.kind} {self.operand.nth}"
        call = f", call {self.call} of {self.calls}" if self.calls > 1 else ""
        return f"{self.mechanism}{role}{operand} of {self.module or 'the model'}{slot}{view}{layout}{call}"


def on_call(trace: Trace, call: Call, anchor: Anchor) -> Anchor:
    """An anchor of one call of its module: which of several in a pass, if there are several, and whether what
    it reaches is changed in place after it.
    """
    side = call.outputs if anchor.mechanism in ("output", "returned sum") else call.inputs
    value = side.get(anchor.slot)
    overwritten = anchor.overwritten or (value is not None and is_overwritten(value))
    calls = trace.calls_of(call.module)
    return replace(anchor, call=call.nth, calls=calls, overwritten=overwritten)
