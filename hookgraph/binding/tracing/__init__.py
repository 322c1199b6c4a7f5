"""One forward pass, seen as a graph of values, calls and operations."""
