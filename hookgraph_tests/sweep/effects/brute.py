"""One plain pass per node: nothing is replayed, packed, narrowed or remembered."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hookgraph.binding.running.outputs import read_output
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.hooks.slicing import write
from hookgraph.ontology.locations import Location


def patched_logits(
    graph: HookGraph, clean: Inputs, corrupt: Run, nodes: Iterable[Location]
) -> dict[Location, Tensor]:
    """The logits of the clean inputs with each node alone at its corrupt value."""
    found: dict[Location, Tensor] = {}
    for node in nodes:
        value = corrupt[node]
        found[node] = graph.hook(node, lambda _, value=value: value).run(clean).logits
    return found


def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """What every module returns in a pass, the first tensor of it, by path; several if called often."""
    found: dict[str, list[Tensor]] = {}

    def keep(path: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            found.setdefault(path, []).append(first.clone())

    with ExitStack() as stack, torch.no_grad():
        for path, module in model.named_modules():
            hook = module.register_forward_hook(lambda _, __, out, path=path: keep(path, out))
            stack.callback(hook.remove)
        model(**inputs)
    return found


def module_at(outputs: Mapping[str, Sequence[Tensor]], value: Tensor) -> str | None:
    """The path of a module that returns just this, once; the outermost one."""
    for path, found in outputs.items():
        if path and len(found) == 1 and found[0].shape == value.shape and torch.equal(found[0], value):
            return path
    return None


def logits_with(
    model: nn.Module, inputs: Mapping[str, Any], path: str, node: Location, value: Tensor
) -> Tensor:
    """The logits with a node of what a module returns replaced, by a hook of PyTorch's own."""

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return write(node, output, value)
        return (write(node, output[0], value), *output[1:])

    hook = model.get_submodule(path).register_forward_hook(replace)
    try:
        with torch.no_grad():
            return read_output(model(**inputs))
    finally:
        hook.remove()
