"""What happens to a tensor at a location: slicing, hooks, gradients, handles. Knows no model."""
