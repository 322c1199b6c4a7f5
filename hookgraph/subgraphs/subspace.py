"""`SubspaceGraph`: coordinates along orthonormal directions as a location; directions that are learned."""

from collections.abc import Callable
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from tqdm.auto import trange

from hookgraph.errors import ShapeMismatchError, SubgraphError
from hookgraph.graph.abstract import AbstractSubgraph, Frame, Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.subgraphs.autoencoder import site_of

COORDINATES: Final = LocationType(
    "coordinates", (Dimension.BATCH, Dimension.POS, Dimension.LATENT), 10, layered=False
)
"""c = x B, the coordinates of a location along orthonormal directions."""


@final
class SubspaceGraph(AbstractSubgraph):
    """Coordinates c = x B of a location; an edit moves it within the span of B: x' = x + (c' - c) Bᵀ.

    With nothing edited x itself goes on, bit for bit. The gradient is the true one: d out / d x = I unless
    a hook makes c' another function of c.

    Args:
        basis: (d_model, latent) with orthonormal columns, or a module whose `weight` is that.
        at: the site.
        name: its name, a part of its location's name.

    Raises:
        SubgraphError: the columns are not orthonormal, or the site is a part or a gradient.
    """

    def __init__(
        self, basis: Float[Tensor, "d_model latent"] | nn.Module, at: Location, name: str = "subspace"
    ) -> None:
        self.name = name
        self.site = site_of(basis, at)
        self._basis = basis
        self.coordinates = COORDINATES().within(self.site, name)
        B = self.basis.detach().double()
        excess = (B.mT @ B - torch.eye(B.shape[1], dtype=B.dtype, device=B.device)).abs().max()
        if excess > 1e-3:
            raise SubgraphError(
                f"the columns of a basis are orthonormal, these are off by {float(excess):.2g}: take "
                "torch.linalg.qr(basis).Q"
            )

    @property
    def basis(self) -> Float[Tensor, "d_model latent"]:
        """B, as it is now."""
        found = self._basis.weight if isinstance(self._basis, nn.Module) else self._basis
        if not isinstance(found, Tensor):
            raise SubgraphError("a learned basis is a module whose `weight` is a matrix")
        return found

    @property
    def pointwise(self) -> bool:
        """Coordinates are those of one position."""
        return True

    @property
    def acts(self) -> bool:
        """Only if someone asks."""
        return False

    @property
    def locations(self) -> tuple[Location, ...]:
        """The coordinates."""
        return (self.coordinates,)

    def visit(self, site: Location, value: Float[Tensor, "..."], frame: Frame) -> Float[Tensor, "..."]:
        """Compute the coordinates, and move the value by what they were moved by."""
        x = value if value.ndim == 3 else value.flatten(2)
        basis = self.basis.to(x.dtype)
        if basis.shape[0] != x.shape[-1]:
            raise ShapeMismatchError(
                f"the basis has directions of {basis.shape[0]}, and {site} has width {x.shape[-1]}"
            )
        before = x @ basis
        after = frame.tap(self.coordinates, before)
        if after is before:
            return value
        return value + ((after - before) @ basis.mT).view_as(value)


def align(
    graph: HookGraph,
    base: Inputs,
    source: Inputs,
    objective: Metric,
    at: Location,
    k: int = 1,
    *,
    part: Callable[[Location], Location] = lambda coordinates: coordinates,
    steps: int = 100,
    learning_rate: float = 1e-2,
    seed: int = 0,
    progress: bool = True,
    name: str = "subspace",
) -> SubspaceGraph:
    """Distributed alignment search: the k directions whose exchange between two runs does most for a metric.

    B is learned to maximise mean m(base with c(base) := c(source)), c = x B, B orthonormal by
    `torch.nn.utils.parametrizations.orthogonal`.

    Args:
        graph: the hooked model.
        base: what is run.
        source: where the coordinates come from, of the same shape.
        objective: the metric to maximise: what the output should be after the exchange.
        at: the site.
        k: how many directions.
        part: which part of the coordinates is exchanged: `lambda c: c.at(pos=-1)`.
        steps: of Adam.
        learning_rate: of Adam.
        seed: of the first directions.
        progress: whether to show a progress bar.
        name: of the subgraph.

    Returns:
        The subgraph, with a basis that is no longer learned.

    Source: Geiger et al., arXiv:2303.02536.
    """
    coordinates = COORDINATES().within(at, name)
    width = graph.run(source, save=[at])[at]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rotation = nn.Linear(
            k, width.flatten(2).shape[-1], bias=False, dtype=width.dtype, device=width.device
        )
        rotation = orthogonal(rotation, orthogonal_map="householder")
    learned = SubspaceGraph(rotation, at, name)
    injected = graph.inject(learned)
    here = part(coordinates)
    optimizer = torch.optim.Adam(rotation.parameters(), lr=learning_rate)
    for _ in trange(steps, desc="alignment search", disable=not progress):
        swapped = injected.run(source, save=[here], grad=True)[here]
        found = injected.hook(here, SetTo(swapped)).run(base, metric=objective, grad=True).metric
        if found is None:
            raise ValueError("a metric was given")
        weights = list(rotation.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(-found.mean(), weights), strict=True):
            weight.grad = gradient
        optimizer.step()
    return SubspaceGraph(learned.basis.detach().clone(), at, name)
