"""What a residual stream says to the unembedding: direct logit attribution, the logit lens."""
