"""`path_profile`: how the metric moves while a node moves from clean to corrupt."""
