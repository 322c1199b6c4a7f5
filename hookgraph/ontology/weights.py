"""The weights of a transformer, by name, each in one normal form whatever the model stores."""

from enum import StrEnum
from typing import Final


class WeightType(StrEnum):
    """A weight. The comment of each gives its normal form; x is a row vector, so that y = x W + b."""

    W_E = "W_E"
    """(vocab, d_model): token embeddings, as the model adds them to the stream."""
    W_Q = "W_Q"
    """(head, d_model, d_head)."""
    W_K = "W_K"
    """(kv_head, d_model, d_head)."""
    W_V = "W_V"
    """(kv_head, d_model, d_head)."""
    W_O = "W_O"
    """(head, d_head, d_model)."""
    W_GATE = "W_gate"
    """(d_model, d_mlp): what the nonlinearity reads, in gated MLPs."""
    W_IN = "W_in"
    """(d_model, d_mlp): into the MLP; in gated MLPs, what the gate multiplies."""
    W_OUT = "W_out"
    """(d_mlp, d_model): out of the MLP."""
    W_U = "W_U"
    """(d_model, vocab): unembedding."""
    B_Q = "b_Q"
    """(head, d_head)."""
    B_K = "b_K"
    """(kv_head, d_head)."""
    B_V = "b_V"
    """(kv_head, d_head)."""
    B_O = "b_O"
    """(d_model)."""
    B_GATE = "b_gate"
    """(d_mlp)."""
    B_IN = "b_in"
    """(d_mlp)."""
    B_OUT = "b_out"
    """(d_model)."""
    B_U = "b_U"
    """(vocab)."""


W_E: Final = WeightType.W_E
W_Q: Final = WeightType.W_Q
W_K: Final = WeightType.W_K
W_V: Final = WeightType.W_V
W_O: Final = WeightType.W_O
W_gate: Final = WeightType.W_GATE
W_in: Final = WeightType.W_IN
W_out: Final = WeightType.W_OUT
W_U: Final = WeightType.W_U
b_Q: Final = WeightType.B_Q
b_K: Final = WeightType.B_K
b_V: Final = WeightType.B_V
b_O: Final = WeightType.B_O
b_gate: Final = WeightType.B_GATE
b_in: Final = WeightType.B_IN
b_out: Final = WeightType.B_OUT
b_U: Final = WeightType.B_U
