"""Published dictionaries from their files, each format in a module of its own, to one `Autoencoder`."""

from hookgraph.subgraphs.loading.autoencoders import load_autoencoder
from hookgraph.subgraphs.loading.circuit_tracer import load_cross_layer_transcoder
from hookgraph.subgraphs.loading.dictionary_learning import load_crosscoder

__all__ = ["load_autoencoder", "load_cross_layer_transcoder", "load_crosscoder"]
