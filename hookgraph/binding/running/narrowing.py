"""The last MLP at the positions that are read: what is not read is not computed.

After the last layer only the unembedding reads the stream, at the positions that a metric reads. The MLP
before it takes two thirds of the layer's time, and treats each position by itself.
"""

from collections.abc import Generator, Mapping, Set
from contextlib import contextmanager
from itertools import dropwhile
from typing import Any

from torch import Tensor, nn

from hookgraph.binding.data.anchors import Anchor
from hookgraph.binding.data.findings import Findings, StreamStep
from hookgraph.binding.running.checkpointing import is_checkpointed
from hookgraph.binding.running.mechanisms import element, replaced
from hookgraph.graph.measuring import Reads, put, take
from hookgraph.hooks.handles import installed
from hookgraph.ontology.locations import MAIN_STACK, Location
from hookgraph.ontology.transformer import MLP_IN, MLP_OUT

_JOINING: Set[str] = frozenset({"anew", "add", "share"})
"""Steps of the stream by which something joins it."""

NARROWED = "narrowed"
"""The invariant: what lies at some positions is computed from these positions alone."""


def last_mlp(findings: Findings) -> Location | None:
    """What the last MLP reads, where nothing but it joins the stream after that; None where it is not so."""
    layers = findings.layers.get(MAIN_STACK, [])
    place, added = Location(MLP_IN, len(layers) - 1), Location(MLP_OUT, len(layers) - 1)
    if not layers or layers[-1].shared or not is_plain(findings.anchors.get(place)):
        return None
    if MAIN_STACK in findings.packed:
        return None
    if any(x.layer == place.layer and x.type.name.startswith("moe.") for x in findings.anchors):
        return None  # routers may count the tokens that an expert has
    steps = layers[-1].stream
    joins = [i for i, step in enumerate(steps) if step.location == added and step.kind == "add"]
    later = dropwhile(_is_added, steps[joins[0] :]) if len(joins) == 1 else steps
    return None if any(step.kind in _JOINING for step in later) else place


def _is_added(step: StreamStep) -> bool:
    """Whether a step adds an update. Those added in one go, as in parallel blocks, read the stream before."""
    return step.kind == "add"


def modules_behind(modules: Mapping[str, nn.Module], findings: Findings) -> list[nn.Module]:
    """The modules of the last layer, and those of no layer: what may see what the last MLP returns."""
    layers = [layer.module for stack in findings.layers.values() for layer in stack]
    last = findings.layers[MAIN_STACK][-1].module if findings.layers.get(MAIN_STACK) else ""
    before = tuple(f"{path}." for path in layers if path != last)
    return [m for path, m in modules.items() if not f"{path}.".startswith(before)]


def is_plain(anchor: Anchor | None) -> bool:
    """Whether an anchor is the input of a module that is called once, as it lies there."""
    return (
        anchor is not None
        and anchor.mechanism == "input"
        and anchor.calls == 1
        and not anchor.layout
        and anchor.view is None
    )


def is_one_each(reads: Reads) -> bool:
    """Whether one position of each example is read."""
    return isinstance(reads, int) or reads.ndim == 1


@contextmanager
def narrowing(module: nn.Module, anchor: Anchor, reads: Reads) -> Generator[None]:
    """Within this context a module sees these positions only; what it returns is 0 at all others."""
    lengths: list[int] = []

    def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_checkpointed():
            return None  # it runs again when this context is left
        given = element(args, kwargs, anchor.slot)
        lengths.append(given.shape[1])
        return replaced(args, kwargs, anchor.slot, take(given, reads).contiguous())

    def widen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return put(output, reads, lengths.pop()) if lengths else output

    with installed(
        lambda: module.register_forward_pre_hook(narrow, with_kwargs=True),
        lambda: module.register_forward_hook(widen),
    ):
        yield
