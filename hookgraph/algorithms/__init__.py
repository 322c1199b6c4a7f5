"""Algorithms over hook graphs and locations. None knows a model class or a kind of subgraph."""

from hookgraph.algorithms import metrics, proximity
from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.bases.alignment import stimulus_response
from hookgraph.algorithms.bases.basis import causal_basis
from hookgraph.algorithms.bases.responses import StimulusResponse
from hookgraph.algorithms.bases.results import CausalBasis
from hookgraph.algorithms.bases.subspaces import ablate_layer, ablate_subspace, remove_subspace
from hookgraph.algorithms.circuits.circuit import Circuit
from hookgraph.algorithms.circuits.curves import Curve, cmd, cpr
from hookgraph.algorithms.circuits.direct import edges
from hookgraph.algorithms.circuits.discovery import discover_circuit
from hookgraph.algorithms.circuits.eap import edge_attribution
from hookgraph.algorithms.circuits.evaluation import Faithfulness, faithfulness, random_circuit
from hookgraph.algorithms.circuits.results import Edges
from hookgraph.algorithms.circuits.roc import EdgeRoc
from hookgraph.algorithms.circuits.scores import EdgeScores
from hookgraph.algorithms.circuits.sizes import SizeCurve, size_curve
from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.means import mean_patching_effect
from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.effects.results import Convention, PatchingEffect
from hookgraph.algorithms.flow.results import Contributions
from hookgraph.algorithms.flow.tracing import contributions
from hookgraph.algorithms.interventions.ablation import ablate
from hookgraph.algorithms.interventions.fitting import optimal_constants
from hookgraph.algorithms.interventions.paths import path_patching
from hookgraph.algorithms.interventions.samples import ActivationSamples, sample_activations
from hookgraph.algorithms.interventions.statistics import AblationStatistics, mean_activations
from hookgraph.algorithms.interventions.steering import SteeringVector, steering_vector
from hookgraph.algorithms.interventions.sweeps import activation_patching
from hookgraph.algorithms.interventions.traces import CausalTrace
from hookgraph.algorithms.interventions.tracing import causal_tracing
from hookgraph.algorithms.profiles.profiling import path_profile
from hookgraph.algorithms.profiles.results import PathProfile
from hookgraph.algorithms.ranking import Node, Ranking
from hookgraph.algorithms.readouts.direct import direct_logit_attribution
from hookgraph.algorithms.readouts.lens import lens_logits, logit_lens
from hookgraph.algorithms.readouts.lenses import LogitLens, TunedLens
from hookgraph.algorithms.readouts.logit_attribution import LogitAttribution
from hookgraph.algorithms.readouts.trajectory import PredictionTrajectory
from hookgraph.algorithms.search.results import Counterfactuals
from hookgraph.algorithms.search.searching import counterfactuals

__all__ = [
    "AblationStatistics",
    "ActivationSamples",
    "Attribution",
    "CausalBasis",
    "CausalTrace",
    "Circuit",
    "Contributions",
    "Convention",
    "Counterfactuals",
    "Curve",
    "EdgeRoc",
    "EdgeScores",
    "Edges",
    "Faithfulness",
    "LogitAttribution",
    "LogitLens",
    "Node",
    "PatchingEffect",
    "PathProfile",
    "PredictionTrajectory",
    "Ranking",
    "SizeCurve",
    "SteeringVector",
    "StimulusResponse",
    "TunedLens",
    "ablate",
    "ablate_layer",
    "ablate_subspace",
    "activation_patching",
    "causal_basis",
    "causal_tracing",
    "cmd",
    "contributions",
    "counterfactuals",
    "cpr",
    "direct_logit_attribution",
    "discover_circuit",
    "edge_attribution",
    "edges",
    "exact_effects",
    "faithfulness",
    "lens_logits",
    "logit_lens",
    "mean_activations",
    "mean_patching_effect",
    "metrics",
    "optimal_constants",
    "patching_effect",
    "path_patching",
    "path_profile",
    "proximity",
    "random_circuit",
    "remove_subspace",
    "sample_activations",
    "size_curve",
    "steering_vector",
    "stimulus_response",
]
