"""What a pass of a model is measured by: one of the tensors that it returns."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hookgraph.binding.tracing.trace import tensors_in
from hookgraph.errors import BindingError

_PREFERRED = ("logits", "last_hidden_state")
_BEGINNING = "encoder_last_hidden_state"


def read_output(output: Any) -> Float[Tensor, "batch ..."]:
    """The logits; without a head, the last hidden state, of several parts the last one's; without either, the
    first tensor of activations. What an encoder returns is what others begin with, and comes after these.

    Raises:
        BindingError: the model returns no tensor.
    """
    for name in _names(output) if isinstance(output, Mapping) else ():
        if isinstance(output.get(name), Tensor):
            return output[name]
    for tensor in tensors_in(output):
        if tensor.is_floating_point() and tensor.ndim > 1:
            return tensor
    raise BindingError(f"the model returns no tensor of activations, but {type(output).__name__}")


def _names(output: Mapping[str, Any]) -> Iterator[str]:
    """Under which names to look for what a model is measured by, the best first."""
    yield from _PREFERRED
    ends = (name for name in reversed(tuple(output)) if name.endswith(_PREFERRED[-1]))
    yield from (name for name in ends if name != _BEGINNING)


def per_example(output: Float[Tensor, "..."], shape: tuple[int, ...]) -> Float[Tensor, "batch ..."]:
    """An output of several equal examples, of which one alone has `shape` behind the batch axis.

    A model that compares each text with each picture returns a square: what an example is to itself lies on
    its diagonal. One that lays its examples end to end returns them so.
    """
    size = math.prod(shape)
    if output.shape[0] == 1 and output.shape[1:] != shape and output.numel() % size == 0:
        return output.reshape(-1, *shape)
    if output.ndim == 2 and output.shape[1:] != shape and output.shape[0] == output.shape[1]:
        return output.diagonal()[:, None]
    return output
