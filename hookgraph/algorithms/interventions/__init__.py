"""What changes a model on purpose: sweeps of patches, paths, ablations, steering."""
