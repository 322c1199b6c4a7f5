"""Hook graphs as values: what to hook, save and inject, on any binding. Knows no model class."""

from hookgraph.graph.abstract import AbstractBinding, AbstractSubgraph, Frame
from hookgraph.graph.generating import Generation
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run

__all__ = ["AbstractBinding", "AbstractSubgraph", "Frame", "Generation", "HookGraph", "Run"]
