"""What an activation is: names, dimensions and causal order of locations. Standard library only."""

from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.passes import PassType

__all__ = ["Dimension", "Location", "LocationType", "PassType"]
