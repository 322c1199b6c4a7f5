"""One forward pass as a graph of values: who computed what from what, inside which module call.

The trace is what every decision of the binding rests on; names of modules play no part in it.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from hookgraph.binding.tracing.operations import Form, Noticing
from hookgraph.binding.tracing.sums import taken_apart
from hookgraph.binding.tracing.values import ALIASES, Slot, Value
from hookgraph.graph.pictures import are_packed, packed_rows

_interface_lock = threading.Lock()


@final
@dataclass(eq=False, slots=True, repr=False)
class Call:
    """One call of a module."""

    number: int
    path: str
    module: nn.Module
    nth: int
    """How many calls of the same module came before."""
    parents: tuple["Call", ...]
    first: int
    """Number of the first value computed inside."""
    inputs: Mapping[Slot, Value]
    outputs: Mapping[Slot, Value] = field(default_factory=dict[Slot, Value])
    last: int = 0
    """One more than the number of the last value computed inside."""
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    """What it was called with."""
    size: int = 0
    """How many elements what it returned has, if that is a tuple; tensors or not."""
    named: bool = False
    """Whether what it returned is a tuple whose elements have names."""

    @property
    def is_identity(self) -> bool:
        """Whether it only hands on what it got, as dropout does in evaluation."""
        return set(self.outputs.values()) <= set(self.inputs.values())

    @property
    def activation(self) -> tuple[Slot, Value] | None:
        """The first activation that it is given, and where."""
        return next(((s, v) for s, v in self.inputs.items() if v.is_activation), None)

    def __repr__(self) -> str:
        return f"Call({self.path or 'model'}#{self.nth})"


@final
@dataclass(eq=False, slots=True)
class AttentionCall:
    """One call of the attention interface."""

    call: Call
    query: Value
    key: Value
    value: Value
    out: Value
    eager: Callable[..., Any]
    """The eager function of the modelling code, whatever implementation was used."""
    first: int
    last: int


@final
@dataclass(eq=False, slots=True)
class Operation:
    """One call of a function that attention in a model's own code goes through."""

    form: Form
    within: tuple[Call, ...]
    """The modules that it is called in, outermost first."""
    operands: tuple[Value, ...]
    out: Value
    first: int
    last: int


def tensors_in(thing: object) -> Iterator[Tensor]:
    """Every tensor inside nested lists, tuples and mappings."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for item in thing.values():
            yield from tensors_in(item)
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from tensors_in(item)


def slots_of(thing: object) -> Iterator[tuple[Slot, Tensor]]:
    """The tensors directly in a module's output, with the slot of each."""
    if isinstance(thing, Tensor):
        yield None, thing
    elif isinstance(thing, Mapping):
        yield from ((k, v) for k, v in thing.items() if isinstance(v, Tensor))
    elif isinstance(thing, (list, tuple)):
        yield from ((i, v) for i, v in enumerate(thing) if isinstance(v, Tensor))


@final
class Trace:
    """One traced forward pass of `model` on `inputs`, in evaluation and without gradients."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self.attention_calls: list[AttentionCall] = []
        self.operations: list[Operation] = []
        self.written: list[Value] = []
        """Views through which the pass writes into what they are views of, and what it overwrites."""
        self._stack: list[Call] = []
        self._current: dict[int, Value] = {}
        self._alive: list[Tensor] = []
        self._names = {id(p): name for name, p in (*model.named_parameters(), *model.named_buffers())}
        self._nth: dict[str, int] = {}
        self.packed = packed_rows(inputs)
        """How many patches there are, of pictures that lie packed: there batch and positions are one axis."""
        self._axes = 2 if are_packed(inputs) or _is_masked_sound(inputs) else 3
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            self._watch_modules(model, stack)
            stack.enter_context(self._watch_attention())
            stack.enter_context(torch.no_grad())
            stack.enter_context(_Recording(self))
            stack.enter_context(Noticing(lambda: len(self.values), self._notice))
            self.output = model(**inputs)
        self.producers = self._producers()
        self.root = next(c for c in self.calls if not c.path)

    def value_of(self, tensor: Tensor) -> Value:
        """The value that this tensor is now; a source if nothing in the pass computed it."""
        found = self._current.get(id(tensor))
        if found is None:
            name = self._names.get(id(tensor)) or self._brought(tensor)
            found = self.add("parameter" if name else "", (), tensor, name=name)
        return found

    def _brought(self, tensor: Tensor) -> str:
        """The name of a weight that was brought from elsewhere for this pass, as accelerate does."""
        if not isinstance(tensor, nn.Parameter) or not self._stack:
            return ""
        call = self._stack[-1]
        own = next((name for name, p in call.module._parameters.items() if p is tensor), None)
        return f"{call.path}.{own}" if own else ""

    def add(self, op: str, inputs: tuple[Value, ...], tensor: Tensor, **details: Any) -> Value:
        """Record that `op` computed `tensor`."""
        axes = 2 if tensor.ndim and len(tensor) in self.packed else self._axes
        value = Value(len(self.values), op, inputs, tensor, axes=axes, **details)
        self.values.append(value)
        self._current[id(tensor)] = value
        self._alive.append(tensor)
        return value

    def _notice(self, first: int, form: Form, operands: tuple[Tensor, ...], result: object) -> None:
        values = tuple(self.value_of(t) for t in operands)
        out, last = self.value_of(next(tensors_in(result))), len(self.values)
        self.operations.append(Operation(form, tuple(self._stack), values, out, first, last))

    def before_mutation(self, tensor: Tensor, *, whole: bool = False) -> None:
        """Keep what a tensor holds before an in-place operation changes it, or overwrites it as a `whole`."""
        known = self._current.get(id(tensor))
        if known is not None and (whole or (tensor._is_view() and known.op in ALIASES)):
            self.written.append(known)
        if known is not None and known.op != "parameter":
            known.tensor = tensor.detach().clone()
            known.overwritten, known.changed = True, len(self.values)

    def inside(self, call: Call) -> list[Call]:
        """The module calls made inside `call`, at any depth."""
        return [c for c in self.calls[call.number + 1 :] if call in c.parents]

    def calls_of(self, module: nn.Module) -> int:
        """How often a module is called in one pass."""
        return sum(c.module is module for c in self.calls)

    def owners(self, value: Value, within: Call) -> Iterator[Call]:
        """The modules inside `within` that return `value`, outermost first; then those that return the
        tensor that it is a view of, and so on.
        """
        here = value
        while True:
            calls = [c for c in self.producers.get(here, ()) if within in c.parents and not c.is_identity]
            yield from sorted(calls, key=lambda c: len(c.parents))
            if (
                here.op not in ALIASES
                or not here.inputs
                or here.inputs[0].tensor.numel() != here.tensor.numel()
            ):
                return
            here = here.inputs[0]

    def _producers(self) -> dict[Value, list[Call]]:
        producers: dict[Value, list[Call]] = {}
        for call in self.calls:
            handed_on = set(call.inputs.values())
            for value in call.outputs.values():
                if value not in handed_on:
                    producers.setdefault(value, []).append(call)
        return producers

    def _watch_modules(self, model: PreTrainedModel, stack: ExitStack) -> None:
        for path, module in model.named_modules():
            stack.enter_context(
                _removing(module.register_forward_pre_hook(self._entering(path), with_kwargs=True))
            )
            stack.enter_context(_removing(module.register_forward_hook(self._leaving)))

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = {slot: self.value_of(t) for slot, t in (*slots_of(args), *slots_of(kwargs))}
            nth = self._nth.get(path, 0)
            self._nth[path] = nth + 1
            call = Call(len(self.calls), path, module, nth, tuple(self._stack), len(self.values), inputs)
            call.arguments = (args, kwargs)
            self.calls.append(call)
            self._stack.append(call)

        return enter

    def _leaving(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._stack.pop()
        call.outputs = {slot: self.value_of(t) for slot, t in slots_of(output)}
        call.last = len(self.values)
        call.size = len(output) if isinstance(output, (list, tuple)) else 0
        call.named = isinstance(output, tuple) and type(output) is not tuple

    @contextmanager
    def _watch_attention(self) -> Generator[None]:
        """See every call of the attention interface. Other models pass through unchanged."""
        original = AttentionInterface.get_interface
        thread = threading.get_ident()

        def get_interface(interface: AttentionInterface, name: str, default: Callable[..., Any]) -> Any:
            function = original(interface, name, default)
            return self._watched(function, default) if threading.get_ident() == thread else function

        with _interface_lock:
            AttentionInterface.get_interface = get_interface  # pyright: ignore[reportAttributeAccessIssue]
            try:
                yield
            finally:
                AttentionInterface.get_interface = original

    def _watched(self, function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        def watched(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            q, k, v = (self.value_of(t) for t in (query, key, value))
            first = len(self.values)
            output = function(module, query, key, value, *args, **kwargs)
            out = self.value_of(output[0] if isinstance(output, tuple) else output)
            call = next(c for c in reversed(self._stack) if c.module is module)
            self.attention_calls.append(AttentionCall(call, q, k, v, out, eager, first, len(self.values)))
            return output

        return watched


class _Recording(TorchDispatchMode):
    """Adds every operation to a trace."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = list(tensors_in((args, kwargs)))
        inputs = tuple(self._trace.value_of(t) for t in operands)
        name = func.overloadpacket.__name__
        if func._schema.is_mutable and operands:
            self._trace.before_mutation(operands[0], whole=name == "copy_")
        name = name if name.startswith("_") else name.rstrip("_")
        last = taken_apart(self._trace.add, name, args, kwargs, inputs)
        output = func(*args, **kwargs)
        scalars = tuple(float(a) for a in args if isinstance(a, (int, float)) and not isinstance(a, bool))
        replay = None
        if name in ALIASES and args and isinstance(args[0], Tensor):
            replay = lambda tensor: func(tensor, *args[1:], **kwargs)  # noqa: E731
        if last is not None:
            name, inputs = last
            scalars = ()
        for number, tensor in enumerate(tensors_in(output)):
            self._trace.add(name, inputs, tensor, scalars=scalars, replay=replay, output=number)
        return output


@contextmanager
def _removing(handle: Any) -> Generator[None]:
    try:
        yield
    finally:
        handle.remove()


def _is_masked_sound(inputs: Mapping[str, Any]) -> bool:
    """Whether there is nothing but numbers and masks of them: a model may go on with what is not masked, on
    one axis for batch and positions.
    """
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.ndim > 1}
    masks = [name for name in tensors if "mask" in name]
    return bool(masks) and all(x.is_floating_point() for name, x in tensors.items() if name not in masks)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Within this context every module is in evaluation mode, and afterwards what it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
