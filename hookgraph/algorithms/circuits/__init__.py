"""Edges between nodes, circuits, and how well a circuit does what the model does."""
