"""How a dictionary takes its place at a location: values, and the three gradients.

With x the value at the site, f the latents of x and f' what hooks made of them, x̂ = dec(f) and x̂' = dec(f'),
e = x - x̂ and e' what hooks made of it, what goes on is

    dec(f') + e'  =  x + (x̂' - x̂) + (e' - e)

in the second form: with nothing edited it is x, bit for bit, and no second decode is needed. Its gradient is
chosen apart from its value: it is that of the sum of some of x, x̂' and e'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.errors import ShapeMismatchError, SubgraphError, nearest
from hookgraph.graph.abstract import Frame
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs.dictionary import Autoencoder, Opaque

SpliceGradient: TypeAlias = Literal["identity", "reconstruction", "frozen"]
"""What the gradient through a splice is:

* `identity`: d out / d x = I, as if nothing were injected; at a latent W_decᵀ g, at the error g.
* `reconstruction`: d out / d x = J_dec J_enc; at a latent W_decᵀ g; the error is a constant.
* `frozen`: d out / d x = 0 but for a skip connection; at a latent W_decᵀ g, at the error g.
"""

ErrorTerm: TypeAlias = Literal["kept", "detached", "dropped"]
"""What becomes of the error: `kept`, `detached` (added, without a gradient) or `dropped` (the output is the
reconstruction)."""


@final
@dataclass(frozen=True, slots=True)
class Code:
    """Latents at a site: as the encoder made them, and as hooks left them.

    Those that hooks put in place of any others, where nobody needs the others, stand `alone`, as both.
    """

    unedited: Float[Tensor, "..."]
    latents: Float[Tensor, "..."]
    changed: bool
    alone: bool = False

    @property
    def tracked(self) -> bool:
        """Whether a gradient at the latents is asked for, or flows through them."""
        return torch.is_grad_enabled() and self.latents.requires_grad


@final
@dataclass(frozen=True, slots=True)
class Decoded:
    """What a decoder made of a code. Nothing is computed that nobody needs.

    Args:
        edited: x̂', and the way of the gradient to the latents.
        unedited: x̂.
        change: x̂' - x̂; None where no latent was edited.
    """

    edited: Float[Tensor, "..."] | None = None
    unedited: Float[Tensor, "..."] | None = None
    change: Float[Tensor, "..."] | None = None

    @property
    def alone(self) -> bool:
        """Whether x̂' is all that is known: of x̂, and so of x, nothing goes on."""
        return self.edited is not None and self.unedited is None and self.change is None


@final
@dataclass(frozen=True, slots=True)
class Splice:
    """The two choices that a splice leaves open.

    Raises:
        SubgraphError: an unknown one.
    """

    gradient: SpliceGradient = "identity"
    error: ErrorTerm = "kept"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("splice_gradient", self.gradient, get_args(SpliceGradient)),
            ("error", self.error, get_args(ErrorTerm)),
        ):
            if value not in known:
                raise SubgraphError(f"{name}={value!r} is unknown: {nearest(str(value), known)}")

    def input_of(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What the encoder reads: a constant, unless the gradient goes through it."""
        return value if self.gradient == "reconstruction" else value.detach()

    def past(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What a skip connection reads."""
        return value.detach() if self.gradient == "identity" else value

    @property
    def may_act(self) -> bool:
        """Whether what goes on may differ, in value or gradient, where nobody asks anything."""
        return self.error == "dropped" or self.gradient != "identity"

    @property
    def acts(self) -> bool:
        """Whether it does so now: without gradients there is none to differ."""
        return self.error == "dropped" or (self.may_act and torch.is_grad_enabled())

    def write(
        self,
        value: Float[Tensor, "..."],
        decoded: Decoded,
        frame: Frame,
        *,
        reconstruction: Location,
        error: Location,
    ) -> Float[Tensor, "..."]:
        """What goes on in place of `value`; visits reconstruction and error."""
        hat, change = decoded.edited, decoded.change
        if hat is not None and hat.shape != value.shape:
            raise ShapeMismatchError(
                f"the dictionary of {reconstruction} reconstructs {tuple(hat.shape)}, the value there has "
                f"shape {tuple(value.shape)}"
            )
        if hat is not None and frame.wanted(reconstruction):
            made = hat.to(value.dtype)
            hat = frame.tap(reconstruction, made)
            change = _added(change, hat, made) if frame.edited(reconstruction) else change
        rest = None
        if decoded.alone and self.error != "dropped":
            rest = frame.tap(error, _unread(value, value.shape))
        elif decoded.unedited is not None and self.error != "dropped" and frame.wanted(error):
            missing = (value - decoded.unedited).detach().to(value.dtype)
            rest = frame.tap(error, missing)
            change = _added(change, rest, missing) if frame.edited(error) else change
        if hat is not None and (self.error == "dropped" or decoded.alone):
            base, change = hat.detach().to(value.dtype), None if rest is None else rest.detach()
        else:
            base = value.detach()
        return self._with_gradient(value, base, change, hat, rest)

    def _with_gradient(
        self, value: Tensor, base: Tensor, change: Tensor | None, hat: Tensor | None, rest: Tensor | None
    ) -> Tensor:
        """base + change, with the gradient of the sum of what the kind of splice lets through."""
        untouched = change is None and self.error != "dropped"
        sources = [hat]
        if self.gradient != "reconstruction" and self.error == "kept":
            sources.append(rest)
        if self.gradient == "identity":
            sources.append(value)
        live = [s for s in sources if s is not None and s.requires_grad] if torch.is_grad_enabled() else []
        if untouched and (not live or (len(live) == 1 and live[0] is value)):
            return value if live or not value.requires_grad else base
        result = base if change is None else base + change.to(base.dtype)
        return through(result, *live) if live else result


def encode(
    coder: Autoencoder | Opaque,
    pre: Location,
    latents: Location,
    x: Float[Tensor, "..."],
    frame: Frame,
    *,
    apart: bool = False,
) -> Code:
    """The latents of x, after everything that is asked for at `latents_pre` and `latents`.

    `apart` says that what goes on does not depend on the latents as they were made: where hooks put others in
    their place, they are not made.

    Raises:
        SubgraphError: the dictionary reads earlier positions, and this pass does not hold them.
    """
    if isinstance(coder, Autoencoder) and coder.expectation is not None and (past := frame.past(pre)):
        raise SubgraphError(
            f"the dictionary of {latents} expects a part of each position from those before it, and this "
            f"pass holds none of the {past} that are in the cache: run without one, as in "
            "generate(..., use_cache=False)"
        )
    if apart and isinstance(coder, Autoencoder) and frame.is_given(latents) and not frame.wanted(pre):
        new = frame.tap(latents, _unread(coder.W_enc, (*x.shape[:-1], coder.n_latents)))
        return Code(new.detach(), new, changed=True, alone=True)
    if isinstance(coder, Autoencoder) and coder.has_pre and frame.wanted(pre.whole):
        before = coder.encode_pre(x)
        after = frame.tap(pre, before)
        unedited = coder.activate(before)
        found = unedited if after is before else coder.activate(after)
    else:
        found = unedited = coder.encode(x)
    new = frame.tap(latents, found)
    edited = frame.edited(pre.whole) or frame.edited(latents.whole)
    return Code(unedited.detach(), new, edited and not torch.equal(new.detach(), unedited.detach()))


def decode(coder: Autoencoder | Opaque, code: Code, x: Float[Tensor, "..."], *, needed: bool) -> Decoded:
    """What the decoder makes of a code; `needed` says whether a reconstruction itself is asked for.

    A change is computed from the latents that changed, where the decoder is known to be linear.
    """
    if code.alone:
        return Decoded(coder.decode(code.latents, x))
    if not code.changed:
        if not (needed or code.tracked):
            return Decoded()
        hat = coder.decode(code.latents, x)
        return Decoded(hat, hat.detach())
    with torch.no_grad():
        if isinstance(coder, Autoencoder):
            unedited = coder.decode(code.unedited, x) if needed else None
            change = coder.change(code.latents - code.unedited, x)
        else:
            unedited = coder.decode(code.unedited, x)
            change = coder.decode(code.latents, x) - unedited
    if code.tracked:
        return Decoded(coder.decode(code.latents, x), unedited, change)
    return Decoded(None if unedited is None else unedited + change, unedited, change)


def decode_sum(
    parts: Sequence[tuple[Code, Float[Tensor, "latent *out"]]],
    bias: Float[Tensor, "*out"] | None,
    *,
    needed: bool,
) -> Decoded:
    """Like `decode`, for a linear decoder that reads several codes: x̂ = Σ f W + b."""

    def total(codes: Sequence[Tensor]) -> Tensor:
        found = sum((f @ W for f, (_, W) in zip(codes, parts, strict=True)), start=torch.tensor(0.0))
        return found if bias is None else found + bias

    latents = [code.latents for code, _ in parts]
    moved = [(code.latents - code.unedited).detach() @ W for code, W in parts if code.changed]
    tracked = any(code.tracked for code, _ in parts)
    if not moved:
        if not (needed or tracked):
            return Decoded()
        hat = total(latents)
        return Decoded(hat, hat.detach())
    change = torch.stack(moved).sum(0)
    unedited = total([code.unedited for code, _ in parts]) if needed else None
    if tracked:
        return Decoded(total(latents), unedited, change)
    return Decoded(None if unedited is None else unedited + change, unedited, change)


Places: TypeAlias = tuple[Autoencoder | Opaque, Location, Location]
"""What encodes, and the locations of what goes into its activation function and what comes out."""


def part_asked(frame: Frame, places: Places, device: torch.device) -> Places:
    """The dictionary of those latents only of which anything is asked, where that is possible."""
    coder, pre, latents = places
    if not isinstance(coder, Autoencoder):
        return places
    found: set[int] = set()
    for location in (pre, latents):
        some = frame.asked(location, Dimension.LATENT)
        if some is None or any(i >= coder.n_latents for i in some):
            return places
        found.update(some)
    part = coder.part(torch.tensor(sorted(found), device=device)) if found else None
    return places if part is None else (part, pre.at(latent=sorted(found)), latents.at(latent=sorted(found)))


def _unread(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape that nobody reads: one number."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(*shape)


def through(value: Float[Tensor, "..."], *sources: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`value`, with the gradient of the sum of `sources`."""
    return _Through.apply(value, *sources)  # pyright: ignore[reportReturnType]


@final
class _Through(torch.autograd.Function):
    """The value of one tensor, the gradient of others."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *sources: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.dtypes = [source.dtype for source in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        wanted = zip(ctx.dtypes, ctx.needs_input_grad[1:], strict=True)
        return None, *(gradient.to(dtype) if needed else None for dtype, needed in wanted)


def _added(change: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """A change, and what a hook changed besides."""
    more = (new - old).detach()
    return more if change is None else change + more
