"""The axes of activations: the one vocabulary of locations, index names and shape annotations."""

from enum import StrEnum


class Dimension(StrEnum):
    """An axis of an activation. The same words stand in every jaxtyping annotation."""

    BATCH = "batch"
    """Examples of a batch."""
    POS = "pos"
    """Token positions."""
    KEY_POS = "key_pos"
    """Token positions that attention reads from."""
    HEAD = "head"
    """Query heads of an attention layer."""
    KV_HEAD = "kv_head"
    """Key and value heads; fewer than `head` with grouped-query attention."""
    D_HEAD = "d_head"
    """Width of a head."""
    D_MODEL = "d_model"
    """Width of the residual stream."""
    D_MLP = "d_mlp"
    """Neurons of an MLP."""
    EXPERT = "expert"
    """Experts of a mixture-of-experts layer."""
    CHOICE = "choice"
    """The experts that a token is sent to, in the router's order: which ones, `moe.router_indices` tells."""
    LATENT = "latent"
    """Latents of a dictionary, or coordinates of a subspace."""
    VOCAB = "vocab"
    """Tokens of the vocabulary."""
    ONE = "one"
    """An axis of size one: a single number per position."""
