"""`AutoencoderGraph`: a dictionary at a location, its latents and its error as locations."""

from collections.abc import Mapping
from typing import Any, final

from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.errors import ShapeMismatchError, SubgraphError
from hookgraph.graph.abstract import AbstractSubgraph, Frame
from hookgraph.graph.arguments import a_location
from hookgraph.ontology.autoencoder import ERROR, LATENTS, LATENTS_PRE, RECONSTRUCTION
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.subgraphs.dictionary import Autoencoder, EncodesAndDecodes, Opaque
from hookgraph.subgraphs.differentiating import pulled, pushed
from hookgraph.subgraphs.splicing import (
    ErrorTerm,
    Places,
    Splice,
    SpliceGradient,
    decode,
    encode,
    part_asked,
)


@final
class AutoencoderGraph(AbstractSubgraph):
    """A dictionary at a location: f = enc(x), and what goes on is dec(f) + e with e = x - dec(f).

    Order of events at the site, for the value x after its hooks and saves: `latents_pre` and `latents`,
    then `reconstruction`, of the edited latents, and `error`, of the unedited ones. With nothing edited x
    itself goes on, bit for bit. Where only some latents are asked for, only those are computed, if the
    activation function allows it; where only some were edited, only those are decoded again.

    Args:
        autoencoder: an `Autoencoder`, or anything that has `encode` and `decode`.
        at: the site; by default what the autoencoder was trained to read.
        name: its name, a part of its locations' names.
        splice_gradient: `identity`, `reconstruction` or `frozen`, see `SpliceGradient`.
        error: `kept`, `detached` or `dropped`, see `ErrorTerm`.

    Raises:
        SubgraphError: no site, one without positions, a part or a gradient, no dictionary, or an unknown
            option.
    """

    def __init__(
        self,
        autoencoder: EncodesAndDecodes,
        at: Location | None = None,
        name: str = "sae",
        *,
        splice_gradient: SpliceGradient = "identity",
        error: ErrorTerm = "kept",
    ) -> None:
        self.autoencoder = autoencoder
        self.name = name
        self.site = site_of(autoencoder, at)
        self.splice = Splice(splice_gradient, error)
        self._coder = coder_of(autoencoder)
        self.latents_pre = LATENTS_PRE().within(self.site, name)
        self.latents = LATENTS().within(self.site, name)
        self.reconstruction = RECONSTRUCTION().within(self.site, name)
        self.error = ERROR().within(self.site, name)

    @staticmethod
    def every(
        autoencoders: Mapping[int, EncodesAndDecodes], at: LocationType, name: str = "sae", **options: Any
    ) -> "tuple[AutoencoderGraph, ...]":
        """One for each layer of a mapping from layers to autoencoders, all of one name:
        `graph.inject(*AutoencoderGraph.every(autoencoders, at=MLP_OUT))`.

        Raises:
            SubgraphError: as for one of them.
            LocationError: `at` has no layers.
        """
        return tuple(AutoencoderGraph(one, at[layer], name, **options) for layer, one in autoencoders.items())

    def with_gradient(self, splice_gradient: SpliceGradient) -> "AutoencoderGraph":
        """The same with another gradient."""
        return AutoencoderGraph(
            self.autoencoder,
            self.site,
            self.name,
            splice_gradient=splice_gradient,
            error=self.splice.error,
        )

    @property
    def pointwise(self) -> bool:
        """Unless the dictionary expects something of earlier positions, or is not known."""
        return isinstance(self._coder, Autoencoder) and self._coder.expectation is None

    @property
    def acts(self) -> bool:
        """Whether the splice says so."""
        return self.splice.may_act

    @property
    def splice_gradient(self) -> SpliceGradient:
        """What the gradient through the splice is."""
        return self.splice.gradient

    @property
    def locations(self) -> tuple[Location, ...]:
        """latents_pre where the encoder tells it, latents, reconstruction, and the error unless dropped."""
        pre = (self.latents_pre,) if self._coder.has_pre else ()
        rest = () if self.splice.error == "dropped" else (self.error,)
        return (*pre, self.latents, self.reconstruction, *rest)

    def visit(self, site: Location, value: Float[Tensor, "..."], frame: Frame) -> Float[Tensor, "..."]:
        """Encode, decode what is needed, and go on."""
        if not frame.wanted(*self.locations) and not self.splice.acts:
            return value
        x = value if value.ndim == 3 else value.flatten(2)
        check_width(self._coder, x, site)
        new = self._visit(x, frame)
        return value if new is x else new.view_as(value)

    def _visit(
        self, x: Float[Tensor, "batch pos d_model"], frame: Frame
    ) -> Float[Tensor, "batch pos d_model"]:
        places: Places = self._coder, self.latents_pre, self.latents
        needed = self.splice.error == "dropped" or frame.wanted(self.reconstruction, self.error)
        if not needed and not self.splice.acts:
            places = part_asked(frame, places, x.device)
        apart = self.splice.error == "dropped" or frame.is_given(self.error)
        code = encode(*places, self.splice.input_of(x), frame, apart=apart)
        decoded = decode(places[0], code, self.splice.past(x), needed=needed)
        return self.splice.write(x, decoded, frame, reconstruction=self.reconstruction, error=self.error)

    def is_linear(self, location: Location) -> bool:
        """Of latents and the error, where no other gradient was chosen."""
        plain = isinstance(self._coder, Autoencoder) and self.splice == Splice()
        return plain and location.type in (LATENTS, ERROR)

    def pull(
        self,
        location: Location,
        x: Float[Tensor, "batch d_model"],
        left: Float[Tensor, "..."],
        chosen: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch d_model"]:
        """The gradient of Σ left · f, or of left · e with e = x - dec(enc(x)), row by row."""
        return pulled(self._coder, location.type, x, left, chosen)

    def push(
        self,
        location: Location,
        x: Float[Tensor, "batch d_model"],
        delta: Float[Tensor, "..."],
        chosen: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch d_model"]:
        """delta W_dec of latents, delta itself of the error."""
        return pushed(self._coder, location.type, x, delta, chosen)

    def __repr__(self) -> str:
        return f"AutoencoderGraph({self.autoencoder!r}, at={self.site}, name={self.name!r})"


def coder_of(autoencoder: EncodesAndDecodes) -> Autoencoder | Opaque:
    """What a subgraph computes with.

    Raises:
        SubgraphError: it does not encode and decode.
    """
    if not isinstance(autoencoder, EncodesAndDecodes):
        raise SubgraphError(
            f"a {type(autoencoder).__name__} is no dictionary: it needs the methods encode and decode"
        )
    return autoencoder if isinstance(autoencoder, Autoencoder) else Opaque(autoencoder)


def site_of(autoencoder: object, at: Location | None) -> Location:
    """Where a dictionary is injected.

    Raises:
        SubgraphError: no site is given or known, or it has no positions, or several streams.
        LocationError: what is given is no location.
    """
    known = autoencoder.origin.reads if isinstance(autoencoder, Autoencoder) else None
    site = known if at is None else a_location(at)
    if site is None:
        raise SubgraphError(
            "this dictionary does not say where it belongs: give its site, as in at=MLP_OUT[8]"
        )
    dims = site.type.dims
    if dims[:2] != (Dimension.BATCH, Dimension.POS) or Dimension.STREAM in dims:
        raise SubgraphError(
            f"a dictionary reads one vector per position, and {site} has the axes {' '.join(dims)}"
        )
    return site


def check_width(coder: Autoencoder | Opaque, x: Float[Tensor, "..."], site: Location) -> None:
    """That a dictionary is of the width of what it reads.

    Raises:
        ShapeMismatchError: it is not.
    """
    if isinstance(coder, Autoencoder) and x.shape[-1] != coder.d_in:
        raise ShapeMismatchError(
            f"the dictionary reads width {coder.d_in}, and {site} has width {x.shape[-1]}: it was made for "
            "another model or another site"
        )
