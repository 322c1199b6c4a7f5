"""hookgraph: every activation and gradient of a HuggingFace model by name, and algorithms on them."""

from hookgraph import checking as checking  # isort: split

from hookgraph import locations, weights
from hookgraph.algorithms import metrics
from hookgraph.algorithms.patching import patching_effect
from hookgraph.algorithms.results import PatchingEffect
from hookgraph.binding import Family, bind, check
from hookgraph.errors import (
    AlreadyAttachedError,
    BindingError,
    HookGraphError,
    InputError,
    LoadError,
    LocationError,
    MetricError,
    ShapeMismatchError,
    SubgraphError,
    UnknownLocationError,
)
from hookgraph.graph.abstract import AbstractSubgraph as Subgraph
from hookgraph.graph.abstract import Frame
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.subgraphs import (
    AutoencoderGraph,
    CrosscoderGraph,
    SubspaceGraph,
    TranscoderGraph,
    load_autoencoder,
)

__all__ = [
    "AlreadyAttachedError",
    "AutoencoderGraph",
    "BindingError",
    "CrosscoderGraph",
    "Dimension",
    "Family",
    "Frame",
    "HookGraph",
    "HookGraphError",
    "InputError",
    "LoadError",
    "Location",
    "LocationError",
    "LocationType",
    "MetricError",
    "PatchingEffect",
    "Run",
    "ShapeMismatchError",
    "Subgraph",
    "SubgraphError",
    "SubspaceGraph",
    "TranscoderGraph",
    "UnknownLocationError",
    "bind",
    "check",
    "load_autoencoder",
    "locations",
    "metrics",
    "patching_effect",
    "weights",
]
