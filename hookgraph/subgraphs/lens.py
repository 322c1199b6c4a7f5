"""Lenses: what the model would say if it stopped at a location."""

from collections.abc import Callable
from typing import Final, final

from jaxtyping import Float
from torch import Tensor

from hookgraph.errors import SubgraphError
from hookgraph.graph.abstract import AbstractSubgraph, Frame
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.subgraphs.autoencoder import site_of

LENS_LOGITS: Final = LocationType(
    "lens_logits", (Dimension.BATCH, Dimension.POS, Dimension.VOCAB), 10, layered=False
)
"""Logits that a lens reads off a location."""

Decoder = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos vocab"]]
"""What turns a residual stream into logits, such as final norm and unembedding."""


@final
class LensGraph(AbstractSubgraph):
    """A lens: `lens_logits` = decoder(translator(h)) at a location. It reads, and what goes on is h itself.

    Args:
        decoder: hidden states -> logits: for the logit lens, the model's final norm and unembedding.
        at: the site.
        translator: applied before the decoder, such as what `TunedLens.translation` gives for a location.
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
    def acts(self) -> bool:
        """Only if someone asks."""
        return False

    @property
    def locations(self) -> tuple[Location, ...]:
        """The logits."""
        return (self.logits,)

    def visit(self, site: Location, value: Float[Tensor, "..."], frame: Frame) -> Float[Tensor, "..."]:
        """Decode.

        Raises:
            SubgraphError: someone edits the logits, which nothing reads.
        """
        h = value if self.translator is None else self.translator(value)
        frame.tap(self.logits, self.decoder(h))
        if frame.edited(self.logits):
            raise SubgraphError(f"{self.logits} is read by nothing: an edit there would do nothing")
        return value
