"""Lenses: what the model would say if it stopped at a location."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hookgraph.errors import LoadError, SubgraphError
from hookgraph.graph.abstract import AbstractSubgraph, Frame
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import RESID_POST
from hookgraph.subgraphs.autoencoder import site_of
from hookgraph.subgraphs.loading.files import read_weights

LENS_LOGITS: Final = LocationType(
    "lens_logits", (Dimension.BATCH, Dimension.POS, Dimension.VOCAB), 10, layered=False
)
"""Logits that a lens reads off a location."""

Decoder = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos vocab"]]
"""What turns a residual stream into logits, such as final norm and unembedding."""


@final
class Translator(nn.Module):
    """The affine map of a tuned lens: h + h Wᵀ + b, into the basis of the last layer.

    Source: Belrose et al., arXiv:2303.08112.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Linear(width, width)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, h: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The translated stream."""
        return h + self.change(h)


@final
class LensGraph(AbstractSubgraph):
    """A lens: `lens_logits` = decoder(translator(h)) at a location. It reads, and what goes on is h itself.

    Args:
        decoder: hidden states -> logits: for the logit lens, the model's final norm and unembedding.
        at: the site.
        translator: for the tuned lens, applied before the decoder.
        name: its name, a part of its location's name.
    """

    def __init__(
        self,
        decoder: Decoder,
        at: Location,
        translator: Callable[[Tensor], Tensor] | None = None,
        name: str = "lens",
    ) -> None:
        self.decoder = decoder
        self.translator = translator
        self.name = name
        self.site = site_of(decoder, at)
        self.logits = LENS_LOGITS().within(self.site, name)

    @property
    def locations(self) -> tuple[Location, ...]:
        """The logits."""
        return (self.logits,)

    def visit(self, site: Location, value: Float[Tensor, "..."], frame: Frame) -> Float[Tensor, "..."]:
        """Decode if anyone asks.

        Raises:
            SubgraphError: someone edits the logits, which nothing reads.
        """
        if frame.wanted(self.logits):
            h = value if self.translator is None else self.translator(value)
            if frame.tap(self.logits, self.decoder(h)) is not None and frame.edited(self.logits):
                raise SubgraphError(f"{self.logits} is read by nothing: an edit there would do nothing")
        return value


def logit_lens(
    graph: HookGraph, run: Run, at: Sequence[Location]
) -> Mapping[Location, Float[Tensor, "batch pos vocab"]]:
    """The logit lens: the model's own end, from the last layer on, applied to what a run saved at locations.

    All locations are decoded in one replay, with soft-cap and scale as in the model.

    Raises:
        UnknownLocationError: the run has not saved a location.
    """
    last = graph.every(RESID_POST)[-1]
    stacked = torch.cat([run[place] for place in at])
    found = HookGraph(graph.binding).replay(run, last, value=stacked).logits
    return dict(zip(at, found.split(len(found) // len(at)), strict=True))


def load_translators(path: str | Path) -> Mapping[int, Translator]:
    """The translators of a published tuned lens, by layer: `params.pt`, or the folder that holds it.

    Raises:
        LoadError: the file is missing, damaged, or no tuned lens.
    """
    place = Path(path)
    weights = read_weights(place / "params.pt" if place.is_dir() else place)
    layers = sorted({int(found[1]) for name in weights if (found := re.match(r"(\d+)\.weight$", name))})
    if not layers:
        raise LoadError(f"{place}: expected tensors 0.weight, 0.bias, ..., found {', '.join(weights)}")
    translators: dict[int, Translator] = {}
    for layer in layers:
        translator = Translator(weights[f"{layer}.weight"].shape[0])
        translator.change.weight.data = weights[f"{layer}.weight"]
        translator.change.bias.data = weights[f"{layer}.bias"]
        translators[layer] = translator.requires_grad_(False)
    return translators
