"""Enter a model between two layers: the layers before do not run."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from hookgraph.binding.data.findings import FREE, Layer
from hookgraph.binding.data.layouts import restored
from hookgraph.binding.running.mechanisms import element, replaced
from hookgraph.graph.abstract import Start
from hookgraph.hooks.handles import installed


@contextmanager
def entering(modules: Mapping[str, nn.Module], layers: Sequence[Layer], start: Start) -> Generator[None]:
    """Within this context the layers before `start.block` hand their input on, and `start.value`
    is what the last of them returns.
    """
    skipped = layers[: start.block]
    after = skipped[-1].after if skipped else FREE
    with ExitStack() as stack:
        for i, layer in enumerate(skipped):
            value = start.value if layer is skipped[-1] else None
            stack.enter_context(
                _forward_replaced(modules[layer.module], layer, value, runs=i in after.needed)
            )
        if not skipped:
            stack.enter_context(_input_replaced(modules[layers[0].module], layers[0], start.value))
        yield


@contextmanager
def _forward_replaced(
    module: nn.Module, layer: Layer, value: Tensor | None, *, runs: bool
) -> Generator[None]:
    """The layer hands on its input, or `value`; where it `runs`, what else it returns is its own."""
    before, own = module.__dict__.get("forward"), module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = element(args, kwargs, layer.input_slot) if value is None else _given(layer, value)
        if layer.output_slot is None:
            if runs:  # for what it leaves elsewhere
                own(*args, **kwargs)
            return result
        beside = own(*args, **kwargs) if runs else (None,) * layer.output_size
        return tuple(result if i == layer.output_slot else other for i, other in enumerate(beside))

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
