"""Algorithms over hook graphs and locations. None knows a model class or a kind of subgraph."""

from hookgraph.algorithms import metrics
from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.exact import exact_effects
from hookgraph.algorithms.patching import patching_effect
from hookgraph.algorithms.ranking import Node, Ranking
from hookgraph.algorithms.results import Convention, PatchingEffect

__all__ = [
    "Attribution",
    "Convention",
    "Node",
    "PatchingEffect",
    "Ranking",
    "exact_effects",
    "metrics",
    "patching_effect",
]
