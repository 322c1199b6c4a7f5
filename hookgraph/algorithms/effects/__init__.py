"""`patching_effect` and what it is made of: how much each node matters for a metric."""
