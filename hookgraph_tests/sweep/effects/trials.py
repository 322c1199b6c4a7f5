"""What is tried of an architecture: a model, two inputs, metrics, a few nodes of every kind of location."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hookgraph.algorithms.metrics import logit_diff
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType

_MASKED_OR_PLACED: Final = ("mask", "position", "grid", "shape", "size", "bbox", "longer", "padding")
"""Parts of the names of inputs that say where something is, and stay as they are."""
_ORDINARY: Final = (8, 90)
"""From and up to which numbers tokens stand for nothing special in a tiny model."""
_WITHIN: Final = frozenset(
    {Dimension.D_MODEL, Dimension.D_HEAD, Dimension.KEY_POS, Dimension.VOCAB, Dimension.ONE}
)
"""Axes of which a node has every entry."""


@final
@dataclass(frozen=True, eq=False)
class Trial:
    """A bound model, and what it is run on.

    Args:
        graph: the model, bound.
        clean: what is run.
        corrupt: where the nodes' values come from.
    """

    graph: HookGraph
    model: PreTrainedModel
    clean: Mapping[str, Any]
    corrupt: Mapping[str, Any]


def corrupted(inputs: Mapping[str, Any], special: set[int]) -> dict[str, Any]:
    """Other tokens, pictures and sounds; placeholders, masks and positions stay."""
    return {name: _corrupted(name, value, special) for name, value in inputs.items()}


def _corrupted(name: str, value: Any, special: set[int]) -> Any:
    if not isinstance(value, Tensor) or any(word in name for word in _MASKED_OR_PLACED):
        return value
    if value.is_floating_point():
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=value.dtype)
        return value + 0.5 * noise
    if value.dtype == torch.bool or not name.endswith(("ids", "tokens")):
        return value
    low, high = _ORDINARY
    other = (value - low + 7 + torch.arange(value.shape[-1])) % (high - low) + low
    kept = (value < low) | (value >= high) | torch.isin(value, torch.tensor(sorted(special) or [-1]))
    kept |= torch.isin(other, torch.tensor(sorted(special) or [-1]))
    return torch.where(kept, value, other)


def special_tokens(model: PreTrainedModel) -> set[int]:
    """Tokens that a configuration, or one inside it, gives a meaning of their own."""
    configs = [model.config, *(getattr(model.config, n, None) for n in model.config.sub_configs or {})]
    found = [v for c in configs if c is not None for k, v in vars(c).items() if k.endswith(("_id", "_index"))]
    return {x for v in found for x in (v if isinstance(v, list) else [v]) if type(x) is int}


@final
@dataclass(frozen=True, eq=False)
class Weighted:
    """A metric of all that a model returns, which does not say what it reads."""

    weights: Tensor
    examples: int

    def __call__(self, logits: Tensor) -> Tensor:
        return (logits.reshape(self.examples, -1) * self.weights).sum(-1)

    def rows(self, _: slice) -> "Weighted":
        return self


def metrics(logits: Tensor, examples: int) -> dict[str, Metric]:
    """Of the last position, of another position in each example, and of everything."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(logits.numel() // examples, generator=generator, dtype=logits.dtype)
    found: dict[str, Metric] = {"all": Weighted(weights / weights.numel() ** 0.5, examples)}
    if logits.ndim != 3 or logits.shape[0] != examples or logits.shape[-1] < 8:
        return found
    last = logits.shape[1] - 1
    places = [last - (i * last) // 2 for i in range(examples)] if examples < 3 else [last] * examples
    found["last"] = logit_diff(3, logits.shape[-1] // 2)
    found["each"] = logit_diff([4, 5] * (examples // 2) or 4, 3, places)
    return found


def kinds(graph: HookGraph) -> dict[LocationType, list[Location]]:
    """The locations of each type that can be patched."""
    found: dict[LocationType, list[Location]] = {}
    for location in graph.locations:
        found.setdefault(location.type, []).append(location)
    return found


def nodes_of(
    locations: Sequence[Location], values: Mapping[Location, Tensor], shift: int
) -> Iterator[Location]:
    """A node at the first, a middle and the last position, of one layer each: a head, a few neurons.

    Args:
        locations: those of one type.
        values: what they hold.
        shift: which layer and which head to begin with.
    """
    for i, share in enumerate((0, 0.5, 1)):
        place = locations[(i + shift) % len(locations)]
        sizes = dict(zip(place.dims, values[place].shape, strict=True))
        pos = round(share * (sizes.get(Dimension.POS, 1) - 1))
        index = {
            d.value: (i + shift) % n for d, n in sizes.items() if d not in _WITHIN | set(place.type.joint)
        }
        del index[Dimension.BATCH.value]
        if Dimension.POS in sizes:
            index[Dimension.POS.value] = pos
        for dim in (Dimension.D_MLP, Dimension.D_MIXER):
            if dim.value in index:
                index[dim.value] = slice(0, sizes[dim] // 2)
        yield place.at(**index)
