"""What can be injected: dictionaries, subspaces, lenses, modules. Needs torch only, and knows no model."""

from hookgraph.subgraphs.activations import Activation, Gated, GroupMax, JumpReLU, ReLU, TopK
from hookgraph.subgraphs.autoencoder import AutoencoderGraph
from hookgraph.subgraphs.crosscoder import Crosscoder, CrosscoderGraph
from hookgraph.subgraphs.dictionary import Autoencoder, EncodesAndDecodes, Origin
from hookgraph.subgraphs.lens import LENS_LOGITS, LensGraph
from hookgraph.subgraphs.loading import load_autoencoder, load_cross_layer_transcoder, load_crosscoder
from hookgraph.subgraphs.module import MODULE_OUT, ModuleGraph
from hookgraph.subgraphs.splicing import ErrorTerm, SpliceGradient
from hookgraph.subgraphs.subspace import COORDINATES, SubspaceGraph, align
from hookgraph.subgraphs.transcoder import CrossLayerTranscoder, CrossLayerTranscoderGraph, TranscoderGraph

__all__ = [
    "COORDINATES",
    "LENS_LOGITS",
    "MODULE_OUT",
    "Activation",
    "Autoencoder",
    "AutoencoderGraph",
    "CrossLayerTranscoder",
    "CrossLayerTranscoderGraph",
    "Crosscoder",
    "CrosscoderGraph",
    "EncodesAndDecodes",
    "ErrorTerm",
    "Gated",
    "GroupMax",
    "JumpReLU",
    "LensGraph",
    "ModuleGraph",
    "Origin",
    "ReLU",
    "SpliceGradient",
    "SubspaceGraph",
    "TopK",
    "TranscoderGraph",
    "align",
    "load_autoencoder",
    "load_cross_layer_transcoder",
    "load_crosscoder",
]
