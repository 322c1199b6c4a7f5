"""What can be injected: dictionaries, subspaces, lenses, modules. Needs torch only, and knows no model."""

from hookgraph.subgraphs.activations import Activation, Gated, JumpReLU, ReLU, TopK
from hookgraph.subgraphs.autoencoder import AutoencoderGraph
from hookgraph.subgraphs.dictionary import Autoencoder, EncodesAndDecodes, Origin
from hookgraph.subgraphs.splicing import ErrorTerm, SpliceGradient

__all__ = [
    "Activation",
    "Autoencoder",
    "AutoencoderGraph",
    "EncodesAndDecodes",
    "ErrorTerm",
    "Gated",
    "JumpReLU",
    "Origin",
    "ReLU",
    "SpliceGradient",
    "TopK",
]
