"""Crosscoders: one code of the activations at several sites."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hookgraph.errors import ShapeMismatchError, SubgraphError
from hookgraph.graph.abstract import AbstractSubgraph, Frame
from hookgraph.ontology.autoencoder import ERROR, LATENTS, LATENTS_PRE, RECONSTRUCTION
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs.activations import Activation
from hookgraph.subgraphs.autoencoder import site_of
from hookgraph.subgraphs.dictionary import Autoencoder
from hookgraph.subgraphs.splicing import Code, ErrorTerm, Splice, SpliceGradient, decode_sum, encode

_CODE = "code"


@final
class Crosscoder(nn.Module):
    """f = act(Σ_s x_s W_enc[s] + b_enc), x̂_s = f W_dec[:, s] + b_dec[s], over sites s.

    Args:
        W_enc: (site, d_model, latent).
        W_dec: (latent, site, d_model).
        b_enc: (latent).
        b_dec: (site, d_model).
        activation: latents_pre -> latents; by default ReLU.

    Raises:
        ShapeMismatchError: the weights do not fit each other.

    Source: Lindsey et al., "Sparse crosscoders for cross-layer features and model diffing" (2024).
    """

    def __init__(
        self,
        W_enc: Float[Tensor, "*site d_model latent"],
        W_dec: Float[Tensor, "latent *site d_model"],
        b_enc: Float[Tensor, " latent"],
        b_dec: Float[Tensor, "*site d_model"],
        *,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        if W_enc.ndim != 3 or W_dec.shape != (W_enc.shape[2], *W_enc.shape[:2]):
            raise ShapeMismatchError(
                f"W_enc has shape {tuple(W_enc.shape)} and W_dec {tuple(W_dec.shape)}; they have to be "
                "(site, d_model, latent) and (latent, site, d_model)"
            )
        # Side by side the sites are one long vector, and the crosscoder is an autoencoder of it.
        self.joined = Autoencoder(
            W_enc.flatten(0, 1), W_dec.flatten(1), b_enc, b_dec.flatten(), activation=activation
        )
        self.n_sites, self.d_model = W_enc.shape[:2]

    @property
    def n_latents(self) -> int:
        """How many latents it has."""
        return self.joined.n_latents

    def encode(self, x: Float[Tensor, "..."]) -> Float[Tensor, "... latent"]:
        """f of the activations (..., site, d_model)."""
        return self.joined.encode(x.flatten(-2))

    def decode(self, latents: Float[Tensor, "... latent"]) -> Float[Tensor, "..."]:
        """x̂ of every site: (..., site, d_model)."""
        return self.joined.decode(latents).unflatten(-1, (self.n_sites, self.d_model))

    def decoder(self, site: int) -> tuple[Float[Tensor, "latent d_model"], Float[Tensor, " d_model"]]:
        """Directions and bias of one site."""
        columns = slice(site * self.d_model, (site + 1) * self.d_model)
        bias = self.joined.b_dec
        if bias is None:
            raise ValueError("a crosscoder has a bias")
        return self.joined.W_dec[:, columns], bias[columns]


@final
class CrosscoderGraph(AbstractSubgraph):
    """A crosscoder: reads at all of its sites, and writes at those that are not before the last one read.

    The latents stand at the last site, where all that they are made of is known. What lies before it has
    been computed by then: an edit cannot reach it, and those sites have no reconstruction and no error.

    Args:
        crosscoder: the dictionary.
        at: a site for each of its sites, in causal order.
        name: its name, a part of its locations' names.
        splice_gradient: as for `AutoencoderGraph`, at each site that is written.
        error: `kept`, `detached` or `dropped`.
        write: where it writes, one for each of its sites or None for those where it does not, if not at the
            sites that it reads.

    Raises:
        SubgraphError: as many sites as the crosscoder has are needed, in order; an unknown option.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        at: Sequence[Location],
        name: str = "crosscoder",
        *,
        splice_gradient: SpliceGradient = "identity",
        error: ErrorTerm = "kept",
        write: Sequence[Location | None] | None = None,
    ) -> None:
        self.crosscoder = crosscoder
        self.name = name
        self.splice = Splice(splice_gradient, error)
        self.reads = tuple(site_of(crosscoder, site) for site in at)
        wanted = tuple(at if write is None else write)
        if {len(self.reads), len(wanted)} != {crosscoder.n_sites}:
            raise SubgraphError(f"this crosscoder has {crosscoder.n_sites} sites, {len(at)} are given")
        if any(not a.precedes(b) for a, b in zip(self.reads, self.reads[1:], strict=False)):
            raise SubgraphError("the sites of a crosscoder are given in causal order, each once")
        last = self.reads[-1]
        late = {site: i for i, site in enumerate(wanted) if site is not None and not site.precedes(last)}
        early = [site for site in wanted if site is not None and site.precedes(last)]
        if write is not None and early:
            raise SubgraphError(f"a crosscoder cannot write at {early[0]}, before {last} is known")
        self.writes = late
        self.sites = tuple(dict.fromkeys((*self.reads, *late)))
        self.latents_pre = LATENTS_PRE().within(last, name)
        self.latents = LATENTS().within(last, name)
        self.reconstructions = {site: RECONSTRUCTION().within(site, name) for site in late}
        self.errors = {site: ERROR().within(site, name) for site in late}

    @property
    def error(self) -> Location:
        """The error at the last site that is written."""
        return list(self.errors.values())[-1]

    @property
    def reconstruction(self) -> Location:
        """The reconstruction at the last site that is written."""
        return list(self.reconstructions.values())[-1]

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
        """latents_pre, latents, and the reconstructions and errors of what is written."""
        rest = () if self.splice.error == "dropped" else self.errors.values()
        return (self.latents_pre, self.latents, *self.reconstructions.values(), *rest)

    def visit(self, site: Location, value: Float[Tensor, "..."], frame: Frame) -> Float[Tensor, "..."]:
        """Keep what is read; encode at the last site; decode what is needed at those that are written."""
        if not frame.wanted(*self.locations) and not self.splice.acts:
            return value
        if site in self.reads:
            frame.memory[f"read {self.reads.index(site)}"] = self.splice.input_of(value)
        if site == self.reads[-1]:
            self._encode(frame)
        if site not in self.writes:
            return value
        code: Code = frame.memory[_CODE]
        weight, bias = self.crosscoder.decoder(self.writes[site])
        here = self.reconstructions[site], self.errors[site]
        needed = self.splice.error == "dropped" or frame.wanted(*here)
        decoded = decode_sum([(code, weight)], bias, needed=needed)
        return self.splice.write(value, decoded, frame, reconstruction=here[0], error=here[1])

    def _encode(self, frame: Frame) -> None:
        x = torch.cat([frame.memory[f"read {i}"] for i in range(len(self.reads))], dim=-1)
        frame.memory[_CODE] = encode(self.crosscoder.joined, self.latents_pre, self.latents, x, frame)
