"""The functions of PyTorch that a model's own code goes through in attention, and around what layers add.

Each is described like an Einstein sum: a letter for each axis of what it is given and of what it returns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Final, Literal, NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

Kind: TypeAlias = Literal["product", "softmax", "fused", "split", "weighing"]
"""A product of two tensors, a softmax, a fused attention, a split into pieces that attend each alone, or a
multiplication with a parameter, feature by feature.
"""

RESULT: Final = -1
"""Instead of the number of an operand: what a function returns."""

INSIDE: Final = -2
"""Instead of the number of an operand: what a fused attention computes on the way."""

_SOFTMAX: Final = frozenset({torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax})
_SPLIT: Final = frozenset({torch.split, torch.Tensor.split})
_MATMUL: Final = frozenset(
    {torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm}
)
_TIMES: Final = frozenset({torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply})
_ADDED: Final = frozenset({torch.baddbmm, torch.Tensor.baddbmm})
_FUSED: Final = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@final
@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that a function is given, computes or returns.

    Args:
        kind: which functions are counted.
        nth: how many calls of them in the module came before.
        of: how many there are.
        place: which of the tensors that it computes with, or `RESULT`, or `INSIDE`.
    """

    kind: Kind
    nth: int
    of: int
    place: int


class Form(NamedTuple):
    """A call of such a function.

    Args:
        kind: what it computes.
        slots: where in its arguments the tensors are that it computes with.
        terms: the letters of the axes of each of these, and of the result; none where they cannot be told.
    """

    kind: Kind
    slots: tuple[int | str, ...]
    terms: tuple[str, ...] = ()

    def operands(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The tensors that it computes with."""
        return tuple(kwargs[x] if isinstance(x, str) else args[x] for x in self.slots)

    def replaced(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Sequence[Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors to compute with."""
        new = dict(zip(self.slots, operands, strict=True))
        return tuple(new.get(i, x) for i, x in enumerate(args)), {k: new.get(k, x) for k, x in kwargs.items()}


def form_of(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Form | None:
    """What a call of a function is; None if it is none of those that attention goes through."""
    if func in _SOFTMAX:
        return Form("softmax", _slots(("input",), args))
    if func in _SPLIT:
        return Form("split", _slots(("tensor",), args))
    if func is scaled_dot_product_attention:
        form = Form("fused", _slots(_FUSED[:3], args))
        return form._replace(terms=_FUSED_TERMS.get(_axes(form, args, kwargs), ()))
    if func in _TIMES:
        weighs = len(args) == 2 and sum(isinstance(x, Parameter) for x in args) == 1
        return Form("weighing", (0, 1)) if weighs and all(isinstance(x, Tensor) for x in args) else None
    if func is torch.einsum:
        alone = len(args) == 2 and isinstance(args[1], Tensor)  # its axes in another order are no product
        return None if alone else Form("product", *_einsum(args))
    if func in _MATMUL:
        form = Form("product", _slots(("input", "mat2" if "mat2" in kwargs else "other"), args))
    elif func in _ADDED:
        form = Form("product", _slots(("input", "batch1", "batch2"), args)[1:])
    else:
        return None
    return form._replace(terms=_MATMUL_TERMS.get(_axes(form, args, kwargs), ()))


def fused_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a fused attention by their names."""
    return {**dict(zip(_FUSED, args, strict=False)), **kwargs}


_MATMUL_TERMS: Final[Mapping[tuple[int, ...], tuple[str, ...]]] = {
    (3, 3): ("xik", "xkj", "xij"),
    (4, 4): ("xyik", "xykj", "xyij"),
    (5, 5): ("xyzik", "xyzkj", "xyzij"),
}
_FUSED_TERMS: Final[Mapping[tuple[int, ...], tuple[str, ...]]] = {
    (3, 3, 3): ("xik", "xjk", "xjl", "xil"),
    (4, 4, 4): ("xyik", "xyjk", "xyjl", "xyil"),
    (5, 5, 5): ("xyzik", "xyzjk", "xyzjl", "xyzil"),
}


def _slots(names: Sequence[str], args: Sequence[Any]) -> tuple[int | str, ...]:
    return tuple(i if i < len(args) else name for i, name in enumerate(names))


def _axes(form: Form, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(x.ndim for x in form.operands(args, kwargs))


def _einsum(args: Sequence[Any]) -> tuple[tuple[int | str, ...], tuple[str, ...]]:
    """Slots and letters of an Einstein sum of two tensors, if it is one, with all its axes named."""
    equation = args[0].replace(" ", "") if args and isinstance(args[0], str) else ""
    given, arrow, result = equation.partition("->")
    terms = given.split(",")
    named = arrow and len(terms) == len(args) - 1 == 2 and "." not in equation
    return ((1, 2), (*terms, result)) if named else ((), ())


def _without_asking(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of PyTorch once more, but for its question whether it is watched: if it is, it would be
    handed over as a whole. It must be written in Python.
    """
    made = FunctionType(function.__code__, {**function.__globals__, "has_torch_function": _nobody})
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made


def _nobody(tensors: object) -> bool:
    return False


SEEN_THROUGH: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {
    multi_head_attention_forward: _without_asking(multi_head_attention_forward)
}
"""Functions that call those above, and what to call in place of each to see these."""


@final
class Noticing(TorchFunctionMode):
    """Within this context a function is called at each such call, before and after it.

    Args:
        begin: called before it; what it returns is handed to `end`.
        end: called with that, the form, the tensors computed with, and the result.
    """

    def __init__(
        self,
        begin: Callable[[], int],
        end: Callable[[int, Form, tuple[Tensor, ...], object], None],
    ) -> None:
        super().__init__()
        self._begin, self._end = begin, end

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SEEN_THROUGH:
            with self:
                return SEEN_THROUGH[func](*args, **kwargs)
        form = form_of(func, args, kwargs)
        if form is None:
            return func(*args, **kwargs)
        first, operands = self._begin(), form.operands(args, kwargs)
        result = func(*args, **kwargs)
        self._end(first, form, operands, result)
        return result
