"""A planted dictionary: activations are made of its directions, and what it does is known by hand."""

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.subgraphs.activations import Activation
from hookgraph.subgraphs.dictionary import Autoencoder


def planted(
    width: int = 4, latents: int = 9, *, activation: Activation | None = None, seed: int = 0
) -> Autoencoder:
    """A dictionary of unit directions, with an encoder that is near their transpose, and biases."""
    drawn = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn, dtype=torch.float64)

    directions = torch.nn.functional.normalize(normal(latents, width), dim=1)
    return Autoencoder(
        directions.T + 0.1 * normal(width, latents),
        directions,
        0.1 * normal(latents),
        0.1 * normal(width),
        activation=activation,
    )


def activations(
    dictionary: Autoencoder, batch: int = 2, pos: int = 3, *, noise: float = 0.1, seed: int = 0
) -> Float[Tensor, "batch pos d_model"]:
    """x = Σ_i f_i d_i + noise, with a few latents active at each position."""
    drawn = torch.Generator().manual_seed(seed)
    shape = (batch, pos, dictionary.n_latents)
    active = torch.rand(shape, generator=drawn) < 0.3
    sizes = active * (1 + torch.rand(shape, generator=drawn, dtype=torch.float64))
    exact = sizes @ dictionary.W_dec
    return exact + noise * torch.randn(exact.shape, generator=drawn, dtype=torch.float64)
