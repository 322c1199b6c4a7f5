"""Enter a model between two layers: the layers before do not run."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from hookgraph.binding.findings import Layer
from hookgraph.binding.layouts import restored
from hookgraph.binding.mechanisms import element, replaced
from hookgraph.errors import LocationError
from hookgraph.graph.abstract import Start
from hookgraph.hooks.handles import installed


@contextmanager
def entering(modules: Mapping[str, nn.Module], layers: Sequence[Layer], start: Start) -> Generator[None]:
    """Within this context the layers before `start.block` hand their input on, and `start.value`
    is what the last of them returns.
    """
    if any(layer.shared for layer in layers):
        raise LocationError(
            "this model's layers are no modules of their own: it cannot be entered between them"
        )
    skipped = layers[: start.block]
    with ExitStack() as stack:
        for layer in skipped[:-1]:
            stack.enter_context(_forward_replaced(modules[layer.module], layer, None))
        if skipped:
            last = skipped[-1]
            stack.enter_context(_forward_replaced(modules[last.module], last, start.value))
        else:
            stack.enter_context(_input_replaced(modules[layers[0].module], layers[0], start.value))
        yield


@contextmanager
def _forward_replaced(module: nn.Module, layer: Layer, value: Tensor | None) -> Generator[None]:
    before = module.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = element(args, kwargs, layer.input_slot) if value is None else _given(layer, value)
        if layer.output_slot is None:
            return result
        return tuple(result if i == layer.output_slot else None for i in range(layer.output_size))

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


@contextmanager
def _input_replaced(module: nn.Module, layer: Layer, value: Tensor) -> Generator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replaced(args, kwargs, layer.input_slot, _given(layer, value))

    with installed(lambda: module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)):
        yield


def _given(layer: Layer, value: Tensor) -> Tensor:
    """The value of a location between layers, as layers take it."""
    return restored(layer.layout, value.flatten(2) if layer.joined else value)
