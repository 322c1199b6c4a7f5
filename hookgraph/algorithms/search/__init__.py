"""`counterfactuals`: texts a few tokens away from one, on which the model answers otherwise."""
