"""Transcoders: dictionaries that read at one site and write at another, or at all later ones."""

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from hookgraph.errors import ShapeMismatchError, SubgraphError
from hookgraph.graph.abstract import AbstractSubgraph, Frame
from hookgraph.ontology.autoencoder import ERROR, LATENTS, LATENTS_PRE, RECONSTRUCTION
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs.activations import Activation, ReLU
from hookgraph.subgraphs.autoencoder import check_width, coder_of, site_of
from hookgraph.subgraphs.dictionary import Autoencoder, EncodesAndDecodes
from hookgraph.subgraphs.splicing import (
    Code,
    ErrorTerm,
    Places,
    Splice,
    SpliceGradient,
    decode,
    decode_sum,
    encode,
    part_asked,
)

_CODE, _READ = "code", "read"


@final
class TranscoderGraph(AbstractSubgraph):
    """A transcoder: f = enc(x) at `read`, and at `write`, in place of y, dec(f) + e with e = y - dec(f).

    Order of events: `latents_pre` and `latents` stand at the site that is read, `reconstruction` and `error`
    at the one that is written. With nothing edited y itself goes on, bit for bit. A skip connection is a
    part of dec.

    Args:
        transcoder: an `Autoencoder`, or anything that has `encode` and `decode`.
        read: where x is; by default what the transcoder was trained to read.
        write: where y is, behind `read`; by default what it was trained to reconstruct.
        name: its name, a part of its locations' names.
        splice_gradient: `identity`: d out / d y = I; `reconstruction`: the gradient goes to x through the
            transcoder, none to y; `frozen`: to x through the skip connection only.
        error: `kept`, `detached` or `dropped`.

    Raises:
        SubgraphError: no site, sites in the wrong order, no dictionary, or an unknown option.
    """

    def __init__(
        self,
        transcoder: EncodesAndDecodes,
        read: Location | None = None,
        write: Location | None = None,
        name: str = "transcoder",
        *,
        splice_gradient: SpliceGradient = "identity",
        error: ErrorTerm = "kept",
    ) -> None:
        known = transcoder.origin.writes if isinstance(transcoder, Autoencoder) else None
        self.transcoder = transcoder
        self.name = name
        self._coder = coder_of(transcoder)
        self.read = site_of(transcoder, read)
        self.write = site_of(transcoder, known if write is None else write)
        if not self.read.precedes(self.write):
            raise SubgraphError(
                f"a transcoder writes behind what it reads: {self.write} is not behind {self.read}"
            )
        self.sites = (self.read, self.write)
        self.splice = Splice(splice_gradient, error)
        self.latents_pre = LATENTS_PRE().within(self.read, name)
        self.latents = LATENTS().within(self.read, name)
        self.reconstruction = RECONSTRUCTION().within(self.write, name)
        self.error = ERROR().within(self.write, name)

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
        """Encode at the one site, decode what is needed at the other."""
        if not frame.wanted(*self.locations) and not self.splice.acts:
            return value
        x = value if value.ndim == 3 else value.flatten(2)
        if site == self.read:
            check_width(self._coder, x, site)
            self._encode(x, frame)
            return value
        coder, code = frame.memory.pop(_CODE)
        past = self.splice.past(frame.memory.pop(_READ))
        skips = self.splice.acts and past.requires_grad
        decoded = decode(coder, code, past, needed=skips or self._needed(frame))
        new = self.splice.write(x, decoded, frame, reconstruction=self.reconstruction, error=self.error)
        return value if new is x else new.view_as(value)

    def _encode(self, x: Tensor, frame: Frame) -> None:
        places: Places = self._coder, self.latents_pre, self.latents
        if not self._needed(frame) and not self.splice.acts:
            places = part_asked(frame, places, x.device)
        apart = self.splice.error == "dropped" or frame.is_given(self.error)
        code = encode(*places, self.splice.input_of(x), frame, apart=apart)
        frame.memory[_CODE] = places[0], code
        frame.memory[_READ] = x

    def _needed(self, frame: Frame) -> bool:
        return self.splice.error == "dropped" or frame.wanted(self.reconstruction, self.error)


@final
class CrossLayerTranscoder(nn.Module):
    """f_l = act(x_l W_enc[l] + b_enc[l]) at each layer, ŷ_l = Σ_{m ≤ l} f_m W_dec[m][:, l - m] + b_dec[l].

    Args:
        W_enc: for each layer (d_model, latent).
        W_dec: for each layer l (latent, layers - l, d_model): one decoder for each layer from l on.
        b_enc: for each layer (latent).
        b_dec: for each layer (d_model).
        activations: for each layer; by default ReLU.
        reads: for each layer the location that it was trained to read, where that is known.
        writes: likewise what it was trained to reconstruct.

    Raises:
        ShapeMismatchError: the layers do not fit each other.
    """

    def __init__(
        self,
        W_enc: Sequence[Float[Tensor, "d_model latent"]],
        W_dec: Sequence[Float[Tensor, "latent ... d_model"]],
        b_enc: Sequence[Float[Tensor, " latent"]],
        b_dec: Sequence[Float[Tensor, " d_model"]],
        *,
        activations: Sequence[Activation] = (),
        reads: Sequence[Location | None] = (),
        writes: Sequence[Location | None] = (),
    ) -> None:
        super().__init__()
        layers = len(W_enc)
        for i, decoder in enumerate(W_dec):
            if decoder.ndim != 3 or decoder.shape[1] != layers - i:
                raise ShapeMismatchError(
                    f"W_dec[{i}] has shape {tuple(decoder.shape)}; of {layers} layers it has to be "
                    f"(latent, {layers - i}, d_model)"
                )
        self.W_enc = _frozen(W_enc)
        self.W_dec = _frozen(W_dec)
        self.b_enc = _frozen(b_enc)
        self.b_dec = _frozen(b_dec)
        self.activations: Sequence[Activation] = list(activations) or [ReLU() for _ in W_enc]
        self.reads = tuple(reads) or (None,) * layers
        self.writes = tuple(writes) or (None,) * layers

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return len(self.W_enc)

    def encoder(self, layer: int) -> Autoencoder:
        """The encoder of a layer, as a dictionary with the decoder to the same layer."""
        return Autoencoder(
            self.W_enc[layer],
            self.W_dec[layer][:, 0],
            self.b_enc[layer],
            self.b_dec[layer],
            activation=self.activations[layer],
        )

    def encode(self, x: Float[Tensor, "... d_model"], layer: int) -> Float[Tensor, "... latent"]:
        """f_l."""
        return self.encoder(layer).encode(x)

    def decode(self, latents: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
        """ŷ_l of the last layer l for which latents are given: those of layers 0 to l."""
        last = len(latents) - 1
        parts = [f @ self.W_dec[m][:, last - m] for m, f in enumerate(latents)]
        return sum(parts[1:], start=parts[0]) + self.b_dec[last]


@final
class CrossLayerTranscoderGraph(AbstractSubgraph):
    """A cross-layer transcoder: latents of every layer, each writing at its own layer and all later ones.

    `latents[l]` stand at what layer l reads; `reconstructions[l]` and `errors[l]` at what it writes, in the
    order of `TranscoderGraph`. An edit of a latent moves every layer that it writes to.

    Args:
        transcoder: the dictionary.
        reads: a site for each layer; by default what it was trained to read.
        writes: likewise; by default what it was trained to reconstruct.
        name: its name, a part of its locations' names.
        splice_gradient: as for `TranscoderGraph`.
        error: `kept`, `detached` or `dropped`.

    Raises:
        SubgraphError: sites are missing, or in the wrong order; an unknown option.
    """

    def __init__(
        self,
        transcoder: CrossLayerTranscoder,
        reads: Sequence[Location] = (),
        writes: Sequence[Location] = (),
        name: str = "clt",
        *,
        splice_gradient: SpliceGradient = "identity",
        error: ErrorTerm = "kept",
    ) -> None:
        self.transcoder = transcoder
        self.name = name
        self.splice = Splice(splice_gradient, error)
        self.reads = _given(reads, transcoder.reads, transcoder.layers, "reads")
        self.writes = _given(writes, transcoder.writes, transcoder.layers, "writes")
        self.sites = (*self.reads, *self.writes)
        for read, write in zip(self.reads, self.writes, strict=True):
            if not read.precedes(write):
                raise SubgraphError(f"a transcoder writes behind what it reads: {write} is not behind {read}")
        self.latents_pre = tuple(LATENTS_PRE().within(site, name) for site in self.reads)
        self.latents = tuple(LATENTS().within(site, name) for site in self.reads)
        self.reconstructions = tuple(RECONSTRUCTION().within(site, name) for site in self.writes)
        self.errors = tuple(ERROR().within(site, name) for site in self.writes)
        self._encoders = [transcoder.encoder(layer) for layer in range(transcoder.layers)]

    @property
    def pointwise(self) -> bool:
        """Each position is encoded by itself."""
        return True

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
        """Those of every layer."""
        rest = () if self.splice.error == "dropped" else self.errors
        return (*self.latents_pre, *self.latents, *self.reconstructions, *rest)

    def visit(self, site: Location, value: Float[Tensor, "..."], frame: Frame) -> Float[Tensor, "..."]:
        """Encode at what a layer reads, decode what is needed at what it writes."""
        if not frame.wanted(*self.locations) and not self.splice.acts:
            return value
        if site in self.reads:
            layer = self.reads.index(site)
            coder = self._encoders[layer]
            check_width(coder, value, site)
            x = self.splice.input_of(value)
            code = encode(coder, self.latents_pre[layer], self.latents[layer], x, frame)
            frame.memory[f"{_CODE} {layer}"] = code
            return value
        layer = self.writes.index(site)
        codes: list[Code] = [frame.memory[f"{_CODE} {m}"] for m in range(layer + 1)]
        weights = [self.transcoder.W_dec[m][:, layer - m] for m in range(layer + 1)]
        here = self.reconstructions[layer], self.errors[layer]
        needed = self.splice.error == "dropped" or frame.wanted(*here)
        decoded = decode_sum(
            list(zip(codes, weights, strict=True)), self.transcoder.b_dec[layer], needed=needed
        )
        return self.splice.write(value, decoded, frame, reconstruction=here[0], error=here[1])


def _frozen(weights: Sequence[Tensor]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(w.detach(), requires_grad=False) for w in weights])


def _given(
    sites: Sequence[Location], known: Sequence[Location | None], layers: int, name: str
) -> tuple[Location, ...]:
    found = tuple(sites) or tuple(x for x in known if x is not None)
    if len(found) != layers:
        raise SubgraphError(
            f"a transcoder of {layers} layers needs {layers} sites in `{name}`, not {len(found)}"
        )
    return found
