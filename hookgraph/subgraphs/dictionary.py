"""`Autoencoder`: an encoder into latents and a linear decoder, whatever tool trained it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, final, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from hookgraph.errors import HookGraphError, ShapeMismatchError, nearest
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs.activations import Activation, ReLU
from hookgraph.subgraphs.encoders import Expectation, Pursuit


@runtime_checkable
class EncodesAndDecodes(Protocol):
    """Anything that can be injected as a dictionary: it encodes an activation and decodes its latents."""

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... latent"]:
        """f = enc(x)."""
        ...

    def decode(self, latents: Float[Tensor, "... latent"]) -> Float[Tensor, "... d_model"]:
        """x̂ = dec(f)."""
        ...


Normalisation: TypeAlias = Literal["none", "layer norm", "unit norm"]
"""What is done to the input of each position, and undone in the reconstruction:

* `layer norm`: (x - mean) / (standard deviation + ε), undone by the deviation and the mean.
* `unit norm`: x · sqrt(d) / |x|.
"""
_NORMALISATIONS: tuple[Normalisation, ...] = ("none", "layer norm", "unit norm")
_EPSILON = 1e-5


@final
@dataclass(frozen=True, slots=True)
class Origin:
    """Where a dictionary comes from.

    Args:
        format: the format of its file.
        reads: the location that it was trained to read, where the file says it.
        writes: the location that it was trained to reconstruct: the same one, but for transcoders.
        model: the model that it was trained on.
        config: everything that the file says of it.
    """

    format: str = ""
    reads: Location | None = None
    writes: Location | None = None
    model: str = ""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def layer(self) -> int | None:
        """The layer of what it reads."""
        return None if self.reads is None else self.reads.layer


@final
class Autoencoder(nn.Module):
    """f = act((norm(x) - b_in) W_enc + b_enc), x̂ = norm⁻¹(f W_dec + b_dec) + x W_skip.

    With an expectation p of norm(x) - b_in, that less p is encoded, and p is added to f W_dec + b_dec. With a
    pursuit the latents are chosen one after another, by the decoder alone.

    It computes in the precision of its weights. They are parameters that ask for no gradient; call
    `requires_grad_()` to train them.

    Args:
        W_enc: (d_model, latent).
        W_dec: (latent, d_model); in a transcoder, of what it writes.
        b_enc: (latent).
        b_dec: (d_model).
        b_in: (d_model), taken from the input; often b_dec.
        W_skip: (d_model, d_model), past the latents, in transcoders that have it.
        activation: latents_pre -> latents.
        normalisation: of the input.
        expectation: what each position is expected to be, from those before it.
        pursuit: what makes the latents, in place of W_enc, b_enc and the activation; there is no latents_pre.
        origin: where it comes from.

    Raises:
        ShapeMismatchError: the weights do not fit each other.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor | None
    b_dec: Tensor | None
    b_in: Tensor | None
    W_skip: Tensor | None

    def __init__(
        self,
        W_enc: Float[Tensor, "d_model latent"],
        W_dec: Float[Tensor, "latent *out"],
        b_enc: Float[Tensor, " latent"] | None = None,
        b_dec: Float[Tensor, "*out"] | None = None,
        *,
        b_in: Float[Tensor, " d_model"] | None = None,
        W_skip: Float[Tensor, "d_model *out"] | None = None,
        activation: Activation | None = None,
        normalisation: Normalisation = "none",
        expectation: Expectation | None = None,
        pursuit: Pursuit | None = None,
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        weights = {
            "W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "b_in": b_in, "W_skip": W_skip
        }  # fmt: skip
        _check_shapes(weights)
        for name, weight in weights.items():
            kept = None if weight is None else nn.Parameter(weight.detach(), requires_grad=False)
            self.register_parameter(name, kept)
        if normalisation not in _NORMALISATIONS:
            near = nearest(normalisation, _NORMALISATIONS)
            raise HookGraphError(f"unknown normalisation {normalisation!r}: {near}")
        self.activation: Activation = ReLU() if activation is None else activation
        self.normalisation: Normalisation = normalisation
        self.expectation = expectation
        self.pursuit = pursuit
        self.origin = Origin() if origin is None else origin

    @property
    def d_in(self) -> int:
        """Width of what it reads."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what it reconstructs."""
        return self.W_dec.shape[1]

    @property
    def n_latents(self) -> int:
        """How many latents it has."""
        return self.W_enc.shape[1]

    @property
    def has_pre(self) -> bool:
        """Whether there is one input of the activation function."""
        return self.pursuit is None

    def encode_pre(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... latent"]:
        """The input of the activation function.

        Raises:
            HookGraphError: there is none, as latents are chosen one after another.
        """
        if self.pursuit is not None:
            raise HookGraphError(
                "this dictionary chooses its latents one after another: it has no latents_pre"
            )
        x = self._centred(x)
        x = x if self.expectation is None else x - self.expectation(x, self.W_enc, self.W_dec)
        pre = x @ self.W_enc
        return pre if self.b_enc is None else pre + self.b_enc

    def activate(self, pre: Float[Tensor, "... latent"]) -> Float[Tensor, "... latent"]:
        """The latents of what `encode_pre` returned."""
        return self.activation(pre)

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... latent"]:
        """f = enc(x)."""
        if self.pursuit is not None:
            return self.pursuit(self._centred(x), self.W_dec)
        return self.activate(self.encode_pre(x))

    def decode(
        self, latents: Float[Tensor, "... latent"], x: Float[Tensor, "... d_model"] | None = None
    ) -> Float[Tensor, "..."]:
        """x̂ = dec(f).

        Args:
            latents: f.
            x: the input, for dictionaries that normalise it, expect a part of it or have a skip connection.

        Raises:
            HookGraphError: the input is needed and not given.
        """
        reasons = {
            "normalises its input": self.normalisation != "none",
            "expects a part of its input": self.expectation is not None,
            "has a skip connection": self.W_skip is not None,
        }
        if x is None and any(reasons.values()):
            why = " and ".join(reason for reason, holds in reasons.items() if holds)
            raise HookGraphError(f"this dictionary {why}: decode(latents, x) needs the input x")
        result = latents.to(self.W_dec.dtype) @ self.W_dec
        result = result if self.b_dec is None else result + self.b_dec
        if x is None:
            return result
        x = x.to(self.W_enc.dtype)
        _, scale, shift = self._normal(x)
        if self.expectation is not None:
            result = result + self.expectation(self._centred(x), self.W_enc, self.W_dec)
        result = result if scale is None else result * scale
        result = result if shift is None else result + shift
        return result if self.W_skip is None else result + x @ self.W_skip

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "..."]:
        """The reconstruction."""
        return self.decode(self.encode(x), x)

    def change(
        self, difference: Float[Tensor, "... latent"], x: Float[Tensor, "... d_model"]
    ) -> Float[Tensor, "..."]:
        """By how much the reconstruction changes with the latents: dec(f + difference) - dec(f).

        Latents that differ nowhere cost nothing.
        """
        moved = difference.flatten(0, -2).any(0)
        count = int(moved.sum())
        if 2 * count > len(moved):
            result = difference @ self.W_dec
        else:
            chosen = moved.nonzero()[:, 0]
            result = difference[..., chosen] @ self.W_dec[chosen]
        _, scale, _ = self._normal(x.to(self.W_enc.dtype))
        return result if scale is None else result * scale

    def moved(
        self,
        delta: Float[Tensor, " batch"],
        chosen: Int[Tensor, " batch"],
        x: Float[Tensor, "batch d_model"],
    ) -> Float[Tensor, "..."]:
        """By how much the reconstruction of each row changes if one latent of it changes by delta."""
        result = self.W_dec[chosen] * delta.to(self.W_dec.dtype)[:, None]
        _, scale, _ = self._normal(x.to(self.W_enc.dtype))
        return result if scale is None else result * scale

    def part(self, chosen: Int[Tensor, " latent"]) -> "Autoencoder | None":
        """The dictionary of some latents only; None where latents depend on each other."""
        activation = self.activation.part(chosen)
        if activation is None or self.expectation is not None or self.pursuit is not None:
            return None
        return Autoencoder(
            self.W_enc[:, chosen],
            self.W_dec[chosen],
            None if self.b_enc is None else self.b_enc[chosen],
            self.b_dec,
            b_in=self.b_in,
            W_skip=self.W_skip,
            activation=activation,
            normalisation=self.normalisation,
            origin=self.origin,
        )

    def _centred(self, x: Tensor) -> Tensor:
        """norm(x) - b_in."""
        x = self._normal(x.to(self.W_enc.dtype))[0]
        return x if self.b_in is None else x - self.b_in

    def _normal(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The normalised input, and scale and shift that undo it."""
        if self.normalisation == "none":
            return x, None, None
        if self.normalisation == "unit norm":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return x / scale, scale, None
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        deviation = centred.std(-1, keepdim=True)
        return centred / (deviation + _EPSILON), deviation, mean

    def extra_repr(self) -> str:
        """What `repr` says besides the activation."""
        at = "" if self.origin.reads is None else f", {self.origin.reads}"
        width = f"{self.d_in}" if self.d_in == self.d_out else f"{self.d_in} to {self.d_out}"
        return f"{self.n_latents} latents of {width} dimensions{at}"


@final
class Opaque:
    """A dictionary of which nothing is known but that it encodes and decodes.

    It is used like an `Autoencoder`, but has no latents_pre, and a change costs two decodes.
    """

    has_pre = False

    def __init__(self, coder: EncodesAndDecodes) -> None:
        self.encode = coder.encode
        self._decode = coder.decode

    def decode(self, latents: Float[Tensor, "..."], x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """x̂ = dec(f)."""
        return self._decode(latents)

    def part(self, chosen: Int[Tensor, " latent"]) -> None:
        """None: nothing is known of single latents."""


def _check_shapes(weights: Mapping[str, Tensor | None]) -> None:
    encoder, decoder = weights["W_enc"], weights["W_dec"]
    if encoder is None or decoder is None or encoder.ndim != 2 or decoder.ndim != 2:
        raise ShapeMismatchError(
            "a dictionary needs two matrices: W_enc (d_model, latent), W_dec (latent, d_model)"
        )
    (d_in, latents), d_out = encoder.shape, decoder.shape[1]
    expected = {
        "W_dec": (latents, d_out),
        "b_enc": (latents,),
        "b_dec": (d_out,),
        "b_in": (d_in,),
        "W_skip": (d_in, d_out),
    }
    for name, shape in expected.items():
        weight = weights[name]
        if weight is not None and tuple(weight.shape) != shape:
            raise ShapeMismatchError(
                f"{name} has shape {tuple(weight.shape)}; with W_enc {tuple(encoder.shape)} and W_dec "
                f"{tuple(decoder.shape)} it has to be {shape}"
            )
