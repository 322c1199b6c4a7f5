"""A binding with a closed form, and a subgraph to inject into it.

The binding is a tiny residual network, every gradient of which is known by hand.
With x_0 = E[tokens], in each layer l and at each position on its own

    attn.out = x A_l
    mlp.out  = (x + attn.out) B_l squared, times C_l
    x        = x + attn.out + mlp.out

and logits = x U. With `quadratic=False` the second update is (x + attn.out) B_l C_l, so that the logits
are linear in x. Everything is double precision. Written against `AbstractBinding` alone: what works here
knows nothing of HuggingFace.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.errors import AlreadyAttachedError, InputError, nearest
from hookgraph.graph.abstract import (
    AbstractBinding,
    AbstractSubgraph,
    Frame,
    Inputs,
    Prepared,
    Start,
)
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.hooks.taps import Taps
from hookgraph.ontology.autoencoder import LATENTS
from hookgraph.ontology.locations import MAIN_STACK, Location
from hookgraph.ontology.transformer import ATTN_OUT, EMBED, LOGITS, MLP_OUT, RESID_POST, RESID_PRE
from hookgraph.ontology.weights import W_E, WeightType

_PER_LAYER = (RESID_PRE, ATTN_OUT, MLP_OUT, RESID_POST)


@final
class ToyBinding(AbstractBinding):
    """The network above, with random weights.

    Args:
        layers: how many layers.
        width: d_model.
        vocabulary: how many tokens.
        quadratic: whether the MLP squares.
        embeds: whether x_0 is a location, and E a weight by its name.
        seed: of the weights.
    """

    def __init__(
        self,
        layers: int = 3,
        width: int = 4,
        vocabulary: int = 7,
        *,
        quadratic: bool = True,
        embeds: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> Tensor:
            drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            return (drawn / rows**0.5).requires_grad_()

        self.layers = layers
        self.quadratic = quadratic
        self.embeds = embeds
        self.embedding = matrix(vocabulary, width)
        self.attention = [matrix(width, width) for _ in range(layers)]
        self.into = [matrix(width, 2 * width) for _ in range(layers)]
        self.out = [matrix(2 * width, width) for _ in range(layers)]
        self.unembedding = matrix(width, vocabulary)
        self.executed: list[int] = []
        """The layers executed so far, in order."""
        self._taps: Taps | None = None
        self._start: Start | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Every weight."""
        return (self.embedding, *self.attention, *self.into, *self.out, self.unembedding)

    @property
    def locations(self) -> tuple[Location, ...]:
        """resid.pre, attn.out, mlp.out and resid.post of every layer, and the logits."""
        embeddings = (EMBED,) if self.embeds else ()
        return (*embeddings, *(kind[i] for i in range(self.layers) for kind in _PER_LAYER), LOGITS)

    def why_absent(self, location: Location) -> str:
        """The nearest names."""
        if location.layer is not None and location.layer >= self.layers:
            return f"it has {self.layers} layers"
        return nearest(str(location), map(str, self.locations))

    def prepare(self, inputs: Inputs, *, copies: int = 1) -> Prepared:
        """Token ids of shape (batch, pos), or a mapping that holds them as `input_ids`."""
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise InputError("the toy network takes token ids of shape (batch, pos)")
        return {"input_ids": ids.repeat(copies, 1)}

    def forward(self, inputs: Prepared) -> Float[Tensor, "batch pos vocab"]:
        """One pass, taps included."""
        start, ids = self._start, inputs["input_ids"]
        if not isinstance(ids, Tensor):
            raise TypeError(type(ids))
        first = 0 if start is None else start.block
        x = self._tap(EMBED, self.embedding[ids]) if start is None else start.value
        if start is not None and first > 0:
            x = self._tap(RESID_POST[first - 1], x)
        for layer in range(first, self.layers):
            self.executed.append(layer)
            x = self._tap(RESID_PRE[layer], x)
            x = x + self._tap(ATTN_OUT[layer], x @ self.attention[layer])
            x = x + self._tap(MLP_OUT[layer], self._neurons(layer, x) @ self.out[layer])
            x = self._tap(RESID_POST[layer], x)
        return self._tap(LOGITS, x @ self.unembedding)

    def _neurons(self, layer: int, middle: Tensor) -> Tensor:
        before = middle @ self.into[layer]
        return before.square() if self.quadratic else before

    def _tap(self, location: Location, value: Tensor) -> Tensor:
        tap = None if self._taps is None else self._taps.get(location)
        return value if tap is None else tap(value)

    def weight(
        self, kind: WeightType, layer: int | None = None, stack: str = MAIN_STACK
    ) -> Float[Tensor, "..."]:
        """E, under its name."""
        return self.embedding if kind is W_E and self.embeds else super().weight(kind, layer, stack)

    @contextmanager
    def attached(self, taps: Taps, start: Start | None = None) -> Generator[None]:
        """Within this context `forward` calls the taps."""
        if self._taps is not None:
            raise AlreadyAttachedError("the toy network is attached already")
        self._taps, self._start = taps, start
        try:
            yield
        finally:
            self._taps = self._start = None

    @contextmanager
    def frozen(self) -> Generator[None]:
        """Within this context no weight asks for a gradient."""
        for weight in self.parameters:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in self.parameters:
                weight.requires_grad_(True)

    def closed_form(
        self, ids: Int[Tensor, "batch pos"], readout: Float[Tensor, " vocab"]
    ) -> Mapping[Location, Float[Tensor, "..."]]:
        """Every activation and every gradient of Σ_pos logits · readout, without taps or autograd.

        The gradients by the chain rule written out: g at a layer's output reaches mlp.out unchanged,
        g_mid = g + (2 (x_mid B) ∘ g Cᵀ) Bᵀ reaches attn.out, and g_mid + g_mid Aᵀ the layer's input.
        """
        with torch.no_grad():
            values: dict[Location, Tensor] = {}
            neurons: list[Tensor] = []
            x = self.embedding[ids]
            for layer in range(self.layers):
                values[RESID_PRE[layer]] = x
                values[ATTN_OUT[layer]] = x @ self.attention[layer]
                middle = x + values[ATTN_OUT[layer]]
                neurons.append(middle @ self.into[layer])
                values[MLP_OUT[layer]] = self._neurons(layer, middle) @ self.out[layer]
                x = values[RESID_POST[layer]] = middle + values[MLP_OUT[layer]]
            values[LOGITS] = x @ self.unembedding
            values[LOGITS.grad] = readout.expand_as(values[LOGITS])
            gradient = values[LOGITS.grad] @ self.unembedding.T
            for layer in reversed(range(self.layers)):
                values[RESID_POST[layer].grad] = values[MLP_OUT[layer].grad] = gradient
                inner = gradient @ self.out[layer].T
                inner = 2 * neurons[layer] * inner if self.quadratic else inner
                gradient = gradient + inner @ self.into[layer].T
                values[ATTN_OUT[layer].grad] = gradient
                gradient = gradient + gradient @ self.attention[layer].T
                values[RESID_PRE[layer].grad] = gradient
        return values


def toy_graph(layers: int = 3, *, quadratic: bool = True, embeds: bool = False, seed: int = 0) -> HookGraph:
    """A graph of a new toy network."""
    return HookGraph(ToyBinding(layers, quadratic=quadratic, embeds=embeds, seed=seed))


def toy_of(graph: HookGraph) -> ToyBinding:
    """The toy network of a graph, for what only it knows."""
    binding = graph.binding
    if not isinstance(binding, ToyBinding):
        raise TypeError(type(binding))
    return binding


def toy_tokens(rows: Sequence[Sequence[int]] = ((1, 2, 3), (4, 5, 6))) -> Int[Tensor, "batch pos"]:
    """Token ids that the toy network knows."""
    return torch.tensor(rows)


@final
class Coordinates(AbstractSubgraph):
    """A subgraph whose latents are some coordinates of its site: z = x Q with orthonormal columns Q.

    What goes on is x + (z' - z) Qᵀ, so that an edited coordinate is the only change.

    Args:
        site: where it is injected.
        name: its name.
        columns: Q.
        log: is told the name at each visit.
    """

    def __init__(
        self,
        site: Location,
        name: str,
        columns: Float[Tensor, "d_model latent"],
        log: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._site, self._name, self._columns, self._log = site, name, columns, log
        self.latents = LATENTS().within(site, name)

    @property
    def name(self) -> str:
        """As given."""
        return self._name

    @property
    def sites(self) -> tuple[Location, ...]:
        """The one site."""
        return (self._site,)

    @property
    def acts(self) -> bool:
        """Only if someone asks."""
        return False

    @property
    def locations(self) -> tuple[Location, ...]:
        """The coordinates."""
        return (self.latents,)

    def visit(self, site: Location, value: Tensor, frame: Frame) -> Tensor:
        """Replace what is asked for."""
        self._log(self._name)
        latents = value @ self._columns
        edited = frame.tap(self.latents, latents.view_as(latents))
        return value + (edited - latents) @ self._columns.T


def orthonormal(rows: int, columns: int, seed: int = 0) -> Float[Tensor, "d_model latent"]:
    """A random matrix with orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q
