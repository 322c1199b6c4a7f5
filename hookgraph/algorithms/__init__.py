"""Algorithms over hook graphs and locations. None knows a model class or a kind of subgraph."""

from hookgraph.algorithms import metrics
from hookgraph.algorithms.ablation import ablate, optimal_constants
from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.direct import direct_logit_attribution
from hookgraph.algorithms.exact import exact_effects
from hookgraph.algorithms.lens import LogitLens, logit_lens
from hookgraph.algorithms.logit_attribution import LogitAttribution
from hookgraph.algorithms.patching import patching_effect
from hookgraph.algorithms.paths import path_patching
from hookgraph.algorithms.ranking import Node, Ranking
from hookgraph.algorithms.results import Convention, PatchingEffect
from hookgraph.algorithms.statistics import AblationStatistics, mean_activations
from hookgraph.algorithms.steering import SteeringVector, steering_vector
from hookgraph.algorithms.sweeps import activation_patching

__all__ = [
    "AblationStatistics",
    "Attribution",
    "Convention",
    "LogitAttribution",
    "LogitLens",
    "Node",
    "PatchingEffect",
    "Ranking",
    "SteeringVector",
    "ablate",
    "activation_patching",
    "direct_logit_attribution",
    "exact_effects",
    "logit_lens",
    "mean_activations",
    "metrics",
    "optimal_constants",
    "patching_effect",
    "path_patching",
    "steering_vector",
]
