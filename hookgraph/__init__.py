"""hookgraph: every activation and gradient of a HuggingFace model by name, and algorithms on them.

`__all__` has the names of every day. The errors, and what `hookgraph.algorithms` has, are reached here too.
"""

from hookgraph import checking as checking  # isort: split

from hookgraph import errors, locations, weights
from hookgraph.algorithms import AblationStatistics as AblationStatistics
from hookgraph.algorithms import ActivationSamples as ActivationSamples
from hookgraph.algorithms import Attribution as Attribution
from hookgraph.algorithms import CausalBasis as CausalBasis
from hookgraph.algorithms import CausalTrace as CausalTrace
from hookgraph.algorithms import Circuit as Circuit
from hookgraph.algorithms import Contributions as Contributions
from hookgraph.algorithms import Convention as Convention
from hookgraph.algorithms import Counterfactuals as Counterfactuals
from hookgraph.algorithms import Curve as Curve
from hookgraph.algorithms import EdgeRoc as EdgeRoc
from hookgraph.algorithms import Edges as Edges
from hookgraph.algorithms import EdgeScores as EdgeScores
from hookgraph.algorithms import Faithfulness as Faithfulness
from hookgraph.algorithms import LogitAttribution as LogitAttribution
from hookgraph.algorithms import LogitLens as LogitLens
from hookgraph.algorithms import Node as Node
from hookgraph.algorithms import (
    PatchingEffect,
    causal_basis,
    contributions,
    counterfactuals,
    direct_logit_attribution,
    discover_circuit,
    edge_attribution,
    edges,
    logit_lens,
    metrics,
    patching_effect,
    path_profile,
)
from hookgraph.algorithms import PathProfile as PathProfile
from hookgraph.algorithms import PredictionTrajectory as PredictionTrajectory
from hookgraph.algorithms import Ranking as Ranking
from hookgraph.algorithms import SizeCurve as SizeCurve
from hookgraph.algorithms import SteeringVector as SteeringVector
from hookgraph.algorithms import StimulusResponse as StimulusResponse
from hookgraph.algorithms import TunedLens as TunedLens
from hookgraph.algorithms import ablate as ablate
from hookgraph.algorithms import ablate_layer as ablate_layer
from hookgraph.algorithms import ablate_subspace as ablate_subspace
from hookgraph.algorithms import activation_patching as activation_patching
from hookgraph.algorithms import causal_tracing as causal_tracing
from hookgraph.algorithms import cmd as cmd
from hookgraph.algorithms import cpr as cpr
from hookgraph.algorithms import exact_effects as exact_effects
from hookgraph.algorithms import faithfulness as faithfulness
from hookgraph.algorithms import lens_logits as lens_logits
from hookgraph.algorithms import mean_activations as mean_activations
from hookgraph.algorithms import mean_patching_effect as mean_patching_effect
from hookgraph.algorithms import optimal_constants as optimal_constants
from hookgraph.algorithms import path_patching as path_patching
from hookgraph.algorithms import proximity as proximity
from hookgraph.algorithms import random_circuit as random_circuit
from hookgraph.algorithms import remove_subspace as remove_subspace
from hookgraph.algorithms import sample_activations as sample_activations
from hookgraph.algorithms import size_curve as size_curve
from hookgraph.algorithms import steering_vector as steering_vector
from hookgraph.algorithms import stimulus_response as stimulus_response
from hookgraph.binding import Family, bind, check
from hookgraph.errors import AlreadyAttachedError as AlreadyAttachedError
from hookgraph.errors import BindingError as BindingError
from hookgraph.errors import HookGraphError as HookGraphError
from hookgraph.errors import InputError as InputError
from hookgraph.errors import LoadError as LoadError
from hookgraph.errors import LocationError as LocationError
from hookgraph.errors import MetricError as MetricError
from hookgraph.errors import ShapeMismatchError as ShapeMismatchError
from hookgraph.errors import SubgraphError as SubgraphError
from hookgraph.errors import UnknownLocationError as UnknownLocationError
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
    "AutoencoderGraph",
    "CrosscoderGraph",
    "Dimension",
    "Family",
    "Frame",
    "HookGraph",
    "Location",
    "LocationType",
    "PatchingEffect",
    "Run",
    "Subgraph",
    "SubspaceGraph",
    "TranscoderGraph",
    "bind",
    "causal_basis",
    "check",
    "contributions",
    "counterfactuals",
    "direct_logit_attribution",
    "discover_circuit",
    "edge_attribution",
    "edges",
    "errors",
    "load_autoencoder",
    "locations",
    "logit_lens",
    "metrics",
    "patching_effect",
    "path_profile",
    "weights",
]
