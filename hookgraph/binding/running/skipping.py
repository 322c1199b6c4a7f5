"""Enter a model between two layers: the layers before do not run."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

from torch import Tensor, nn

from hookgraph.binding.data.findings import Boundary, Findings, Layer
from hookgraph.binding.data.layouts import restored
from hookgraph.binding.running.mechanisms import element, replaced, with_element
from hookgraph.binding.running.others import are_all_seen, is_known, replaces_output
from hookgraph.errors import LocationError
from hookgraph.graph.abstract import Start
from hookgraph.hooks.handles import Handle, installed
from hookgraph.ontology.locations import Location

_EVERYWHERE: Final = (
    "others have put hooks on all modules of this process, which would have their effect twice, or not at "
    "all: remove them, or run the whole pass"
)


@contextmanager
def skipping(modules: Mapping[str, nn.Module], findings: Findings, start: Start | None) -> Generator[None]:
    """Within this context the layers before `start.block` hand their input on, and `start.value` is what the
    last of them returns. Hooks of others on layers that do not run are not called.

    Enter it before there are hooks of our own.

    Raises:
        LocationError: no pass can begin there.
    """
    if start is None:
        yield
        return
    reason = why_closed(modules, findings, start.stack, start.block, start.location)
    if reason:
        where = f"after layer {start.block - 1}" if start.block else "before its layers"
        raise LocationError(f"this model cannot be entered {where} of its {start.stack}: {reason}")
    skipped = findings.layers[start.stack][: start.block]
    needed = skipped[-1].after.needed if skipped else ()
    silent = [modules[layer.module] for i, layer in enumerate(skipped) if i not in needed]
    with ExitStack() as stack:
        stack.enter_context(_silenced(silent))
        for i, layer in enumerate(skipped):
            module, value = modules[layer.module], start.value if layer is skipped[-1] else None
            if value is not None and i in needed and replaces_output(module):
                # The value has been through the hooks that see it once more.
                put = partial(_put, layer, value)
                stack.enter_context(installed(partial(module.register_forward_hook, put)))
            stack.enter_context(_forward_replaced(module, layer, value, runs=i in needed))
        yield


def why_closed(
    modules: Mapping[str, nn.Module],
    findings: Findings,
    stack: str,
    block: int,
    after: Location | None = None,
) -> str:
    """Why no pass can begin before a layer; with a value of `after`, if that is told.

    A value that a layer returns lies before the hooks of others on it, which may ask what it was given.
    """
    reason = findings.why_closed(stack, block) or (_EVERYWHERE if are_all_seen() else "")
    if reason or after is None or not block:
        return reason
    layer, anchor = findings.layers[stack][block - 1], findings.anchors.get(after)
    ways = ("output", "returned sum")
    returned = anchor is not None and anchor.module == layer.module and anchor.mechanism in ways
    if not returned or not replaces_output(modules[layer.module]):
        return ""
    return f"{after} lies before forward hooks that others have put on {layer.module}, which need its inputs"


def miscounted(modules: Mapping[str, nn.Module], findings: Findings) -> dict[Boundary, str]:
    """Where no pass can begin since a later location is reached by counting the calls of a module of which
    layers before make some, such as one nonlinearity for all layers.
    """
    found: dict[Boundary, str] = {}
    several = {x: a for x, a in findings.anchors.items() if a.calls > 1 and a.module in modules}
    for stack, layers in findings.layers.items() if several else ():
        before: set[nn.Module] = set()
        for block, layer in enumerate(layers, 1):
            before |= set(modules[layer.module].modules()) if layer.module in modules else set()
            for location, anchor in several.items():
                skipped = location.type.stack == stack and (location.layer or 0) < block
                if not skipped and modules[anchor.module] in before:
                    reason = f"{location} is a call of {anchor.module}, which earlier layers call as well"
                    found.setdefault((stack, block), reason)
    return found


def enter_first(module: nn.Module, layer: Layer, value: Tensor) -> Handle:
    """Give the first layer `value`. Install it last, so that it is there before any tap sees it."""
    return module.register_forward_pre_hook(partial(_put_in, layer, value), with_kwargs=True, prepend=True)


@contextmanager
def _silenced(modules: Iterable[nn.Module]) -> Generator[None]:
    """Nobody is called by modules that do not run, except transformers, which collects what layers return.

    Hooks keep their places, so that they may be removed, and others added, in between.
    """
    kinds = [x for m in modules for x in (m._forward_pre_hooks, m._forward_hooks, m._backward_hooks) if x]
    silent = [(hooks, key, hook) for hooks in kinds for key, hook in hooks.items() if not is_known(hook)]
    for hooks, key, _ in silent:
        hooks[key] = _nothing
    try:
        yield
    finally:
        for hooks, key, hook in silent:
            if key in hooks:
                hooks[key] = hook


def _nothing(*args: Any) -> None:
    """A hook that leaves everything as it is."""


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


def _put_in(
    layer: Layer, value: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return replaced(args, kwargs, layer.input_slot, _given(layer, value))


def _put(layer: Layer, value: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    new = _given(layer, value)
    return new if layer.output_slot is None else with_element(output, layer.output_slot, new)


def _given(layer: Layer, value: Tensor) -> Tensor:
    """The value of a location between layers, as layers take it; a copy, where they change it in place."""
    given = restored(layer.layout, value.flatten(2) if layer.joined else value)
    return given.clone() if layer.overwritten else given
