"""Directions of a location by what the output loses without them, and what it takes to remove them."""
