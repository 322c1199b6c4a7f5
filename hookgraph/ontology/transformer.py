"""The standard vocabulary: the activations of a transformer, each defined by algebra.

A location is what its equation says on every architecture, whatever the modules are called. Write
x for the residual stream, l for a layer, and Σ over heads h, keys k and neurons i.

The constants of this module are those of the decoder; `ENCODER`, `VISION` and `STEM` hold the same words
for the other stacks: `ENCODER.RESID_POST[2]`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Final, final

from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import MAIN_STACK, Location, LocationType, reserve_declared

_BATCH, _POS, _KEY_POS = Dimension.BATCH, Dimension.POS, Dimension.KEY_POS
_HEAD, _KV_HEAD, _D_HEAD = Dimension.HEAD, Dimension.KV_HEAD, Dimension.D_HEAD
_STREAM = (_BATCH, _POS, Dimension.D_MODEL)
_STREAMS = (_BATCH, _POS, Dimension.STREAM, Dimension.D_MODEL)
_SCALE = (_BATCH, _POS, Dimension.ONE)
_NEURONS = (_BATCH, _POS, Dimension.D_MLP)
_INNER = (_BATCH, _POS, Dimension.D_MIXER)
_CHOICES = (_BATCH, _POS, Dimension.CHOICE)
_QUERY = (_BATCH, _POS, _HEAD, _D_HEAD)
_KEY = (_BATCH, _POS, _KV_HEAD, _D_HEAD)
_OTHER_KEY = (_BATCH, _KEY_POS, _KV_HEAD, _D_HEAD)
_ATTENTION = (_BATCH, _HEAD, _POS, _KEY_POS)


@final
@dataclass(frozen=True, slots=True)
class AttentionTypes:
    """The location types of one attention of a layer."""

    ln_scale: LocationType
    reads: LocationType
    q_pre: LocationType | None
    k_pre: LocationType | None
    q_in: LocationType | None
    k_in: LocationType | None
    v_in: LocationType | None
    q: LocationType
    k: LocationType
    v: LocationType
    scores: LocationType
    pattern: LocationType
    z: LocationType
    result: LocationType
    out: LocationType


@final
class TransformerStack:
    """The location types of one stack of layers. Their stages give the causal order."""

    def __init__(self, stack: str) -> None:
        def one(name: str, dims: tuple[Dimension, ...], stage: int) -> Location:
            return LocationType(name, dims, stage, layered=False, stack=stack)()

        self.EMBED = one("embed", _STREAM, -10)
        """The token embedding, before positions are added."""
        self.FINAL_LN_SCALE = one("final.ln_scale", _SCALE, 10)
        """s of the last norm."""
        self.FINAL_LN_OUT = one("final.ln_out", _STREAM, 20)
        """What the unembedding reads."""
        self.LOGITS = one("logits", (_BATCH, _POS, Dimension.VOCAB), 30)
        """Next-token logits, soft-cap and scale included."""
        self._declare_attention(stack)
        self._declare_cross_attention(stack)
        self._declare_experts(stack)
        self._declare_stream(stack)

    def _declare_stream(self, stack: str) -> None:
        per_layer = partial(LocationType, stack=stack)
        self.RESID_PRE = per_layer("resid.pre", _STREAM, 0)
        """x before layer l."""
        self.RESID_MID = per_layer("resid.mid", _STREAM, 100)
        """x + attn.out; absent in parallel blocks, where no such sum exists."""
        self.STREAMS_PRE = per_layer("streams.pre", _STREAMS, 0)
        """x[s] before layer l, of each of several streams; `resid.pre` is absent then."""
        self.STREAMS_MID = per_layer("streams.mid", _STREAMS, 100)
        """x[s] after attention: the streams mixed among themselves + c[s] · attn.out."""
        self.MIXER_LN_SCALE = per_layer("mixer.ln_scale", _SCALE, 10)
        """s of the norm before a mixer, as for attention."""
        self.MIXER_IN = per_layer("mixer.in", _STREAM, 20)
        """What a mixer reads: norm(x), gain and bias included."""
        self.MIXER_GATE = per_layer("mixer.gate", _INNER, 40)
        """g, where a projection gates what the mixer computed, s: z is made of s · g or s · activation(g)."""
        self.MIXER_Z = per_layer("mixer.z", _INNER, 70)
        """z, gated and normed: what the output projection reads. z W + b is what the projection returns."""
        self.MIXER_OUT = per_layer("mixer.out", _STREAM, 90)
        """Exactly what a mixer without attention adds: linear attention, state space, convolution."""
        self.MLP_LN_SCALE = per_layer("mlp.ln_scale", _SCALE, 110)
        """s of the norm before the MLP, as for attention."""
        self.MLP_IN = per_layer("mlp.in", _STREAM, 120)
        """What the MLP reads: norm(x), gain and bias included."""
        self.MLP_PRE = per_layer("mlp.pre", _NEURONS, 130)
        """The input of the nonlinearity."""
        self.MLP_POST = per_layer("mlp.post", _NEURONS, 140)
        """The neurons: the input of the down projection (in gated MLPs, after the product)."""
        self.MLP_OUT = per_layer("mlp.out", _STREAM, 150)
        """Exactly what the MLP adds to the stream, after any post-norm or multiplier; of several streams
        each one adds a share of it.
        """
        self.EXTRA_OUT = per_layer("extra.out", _STREAM, 160)
        """Exactly what a further branch adds, neither attention nor mixer nor the largest MLP."""
        self.RESID_POST = per_layer("resid.post", _STREAM, 200)
        """x after layer l: resid.pre + attn.out + mlp.out."""
        self.STREAMS_POST = per_layer("streams.post", _STREAMS, 200)
        """x[s] after layer l: the streams after attention, mixed among themselves, + c[s] · mlp.out."""

    def _declare_attention(self, stack: str) -> None:
        per_layer = partial(LocationType, stack=stack)
        self.ATTN_LN_SCALE = per_layer("attn.ln_scale", _SCALE, 10)
        """s in norm(x) = gain · (x - centre) · s + bias, before attention: s = 1 / sqrt(mean square + ε)."""
        self.ATTN_IN = per_layer("attn.in", _STREAM, 20)
        """What attention reads: norm(x), gain and bias included."""
        self.ATTN_Q_IN = per_layer("attn.q_in", (_BATCH, _POS, _HEAD, Dimension.D_MODEL), 25)
        """What each head reads for its queries: attn.in once per head. q[h] is made of q_in[h] W_Q[h] + b."""
        self.ATTN_K_IN = per_layer("attn.k_in", (_BATCH, _POS, _KV_HEAD, Dimension.D_MODEL), 25)
        """What each key-value head reads for its keys."""
        self.ATTN_V_IN = per_layer("attn.v_in", (_BATCH, _POS, _KV_HEAD, Dimension.D_MODEL), 25)
        """What each key-value head reads for its values."""
        self.ATTN_Q_PRE = per_layer("attn.q_pre", _QUERY, 30)
        """Queries before the rotary embedding; absent where there is none."""
        self.ATTN_K_PRE = per_layer("attn.k_pre", _KEY, 30)
        """Keys before the rotary embedding; absent where there is none."""
        self.ATTN_Q = per_layer("attn.q", _QUERY, 40)
        """Queries, as attention uses them."""
        self.ATTN_K = per_layer("attn.k", _KEY, 40)
        """Keys, as attention uses them; one per key-value head."""
        self.ATTN_V = per_layer("attn.v", _KEY, 40)
        """Values; one per key-value head."""
        self.ATTN_SCORES = per_layer("attn.scores", _ATTENTION, 50)
        """What the softmax reads: scaled q·k, soft-cap and mask included. Masked cells stay masked."""
        self.ATTN_PATTERN = per_layer("attn.pattern", _ATTENTION, 60)
        """softmax(scores): how much each position attends to each key."""
        self.ATTN_Z = per_layer("attn.z", _QUERY, 70)
        """z[h] = Σ_k pattern[h, k] · v[k], as the output projection reads it."""
        self.ATTN_RESULT = per_layer("attn.result", (_BATCH, _POS, _HEAD, Dimension.D_MODEL), 80)
        """z[h] W_O[h]: what each head writes. Σ_h result + bias = the projection's output."""
        self.ATTN_OUT = per_layer("attn.out", _STREAM, 90)
        """Exactly what attention adds to the stream, after any post-norm or multiplier; of several streams
        each one adds a share of it.
        """

    def _declare_cross_attention(self, stack: str) -> None:
        per_layer = partial(LocationType, stack=stack)
        self.XATTN_LN_SCALE = per_layer("xattn.ln_scale", _SCALE, 101)
        """s of the norm before cross-attention."""
        self.XATTN_IN = per_layer("xattn.in", _STREAM, 102)
        """What cross-attention reads from its own stream."""
        self.XATTN_Q = per_layer("xattn.q", _QUERY, 103)
        """Queries of cross-attention."""
        self.XATTN_K = per_layer("xattn.k", _OTHER_KEY, 103)
        """Keys of cross-attention, one per position of the other stack."""
        self.XATTN_V = per_layer("xattn.v", _OTHER_KEY, 103)
        """Values of cross-attention, one per position of the other stack."""
        self.XATTN_SCORES = per_layer("xattn.scores", _ATTENTION, 104)
        """What the softmax of cross-attention reads."""
        self.XATTN_PATTERN = per_layer("xattn.pattern", _ATTENTION, 105)
        """How much each position attends to each position of the other stack."""
        self.XATTN_Z = per_layer("xattn.z", _QUERY, 106)
        """z of cross-attention, as its output projection reads it."""
        self.XATTN_RESULT = per_layer("xattn.result", (_BATCH, _POS, _HEAD, Dimension.D_MODEL), 107)
        """What each head of cross-attention writes."""
        self.XATTN_OUT = per_layer("xattn.out", _STREAM, 108)
        """Exactly what cross-attention adds to the stream."""
        self.RESID_XMID = per_layer("resid.xmid", _STREAM, 109)
        """x after attention and cross-attention."""

    def _declare_experts(self, stack: str) -> None:
        per_layer = partial(LocationType, stack=stack)
        self.ROUTER_LOGITS = per_layer("moe.router_logits", (_BATCH, _POS, Dimension.EXPERT), 122)
        """r = x W_router + b: one number per token and expert, from which choice and weights are made."""
        self.ROUTER_INDICES = per_layer("moe.router_indices", _CHOICES, 124)
        """e[k]: the experts a token is sent to, integers. An edit sends it elsewhere; weights stay."""
        self.ROUTER_WEIGHTS = per_layer("moe.router_weights", _CHOICES, 124)
        """w[k]: with what weight each chosen expert's output is added."""
        self.EXPERT_POST = per_layer("moe.expert_post", (*_CHOICES, Dimension.D_MLP), 135)
        """n[k]: the neurons of expert e[k], one row per token and choice: what its down projection reads."""
        self.EXPERT_OUT = per_layer("moe.expert_out", (*_CHOICES, Dimension.D_MODEL), 137)
        """y[k] = n[k] W_out[e[k]] + b: what each chosen expert returns, before it is weighted."""
        self.ROUTED_OUT = per_layer("moe.routed_out", _STREAM, 139)
        """Σ_k w[k] · y[k]: what the routed experts give together."""
        self.SHARED_GATE = per_layer("moe.shared_gate", _SCALE, 122)
        """g, where the shared experts are gated: sigmoid(g) multiplies `moe.shared_out`."""
        self.SHARED_POST = per_layer("moe.shared_post", _NEURONS, 135)
        """The neurons of the shared experts, which see every token."""
        self.SHARED_OUT = per_layer("moe.shared_out", _STREAM, 139)
        """What the shared experts return. The mixture returns routed_out + [sigmoid(g)] shared_out."""

    @property
    def attention(self) -> AttentionTypes:
        """The types of a layer's own attention."""
        return AttentionTypes(
            self.ATTN_LN_SCALE,
            self.ATTN_IN,
            self.ATTN_Q_PRE,
            self.ATTN_K_PRE,
            self.ATTN_Q_IN,
            self.ATTN_K_IN,
            self.ATTN_V_IN,
            self.ATTN_Q,
            self.ATTN_K,
            self.ATTN_V,
            self.ATTN_SCORES,
            self.ATTN_PATTERN,
            self.ATTN_Z,
            self.ATTN_RESULT,
            self.ATTN_OUT,
        )

    @property
    def cross_attention(self) -> AttentionTypes:
        """The types of a layer's attention to another stack."""
        return AttentionTypes(
            self.XATTN_LN_SCALE,
            self.XATTN_IN,
            None,
            None,
            None,
            None,
            None,
            self.XATTN_Q,
            self.XATTN_K,
            self.XATTN_V,
            self.XATTN_SCORES,
            self.XATTN_PATTERN,
            self.XATTN_Z,
            self.XATTN_RESULT,
            self.XATTN_OUT,
        )


DECODER: Final = TransformerStack(MAIN_STACK)
ENCODER: Final = TransformerStack("encoder")
VISION: Final = TransformerStack("vision")
STEM: Final = TransformerStack("stem")
TRANSFORMER_STACKS: Final = (DECODER, ENCODER, VISION, STEM)
reserve_declared()

EMBED: Final = DECODER.EMBED
RESID_PRE: Final = DECODER.RESID_PRE
ATTN_LN_SCALE: Final = DECODER.ATTN_LN_SCALE
ATTN_IN: Final = DECODER.ATTN_IN
ATTN_Q_IN: Final = DECODER.ATTN_Q_IN
ATTN_K_IN: Final = DECODER.ATTN_K_IN
ATTN_V_IN: Final = DECODER.ATTN_V_IN
ATTN_Q_PRE: Final = DECODER.ATTN_Q_PRE
ATTN_K_PRE: Final = DECODER.ATTN_K_PRE
ATTN_Q: Final = DECODER.ATTN_Q
ATTN_K: Final = DECODER.ATTN_K
ATTN_V: Final = DECODER.ATTN_V
ATTN_SCORES: Final = DECODER.ATTN_SCORES
ATTN_PATTERN: Final = DECODER.ATTN_PATTERN
ATTN_Z: Final = DECODER.ATTN_Z
ATTN_RESULT: Final = DECODER.ATTN_RESULT
ATTN_OUT: Final = DECODER.ATTN_OUT
RESID_MID: Final = DECODER.RESID_MID
STREAMS_PRE: Final = DECODER.STREAMS_PRE
STREAMS_MID: Final = DECODER.STREAMS_MID
STREAMS_POST: Final = DECODER.STREAMS_POST
MIXER_LN_SCALE: Final = DECODER.MIXER_LN_SCALE
MIXER_IN: Final = DECODER.MIXER_IN
MIXER_GATE: Final = DECODER.MIXER_GATE
MIXER_Z: Final = DECODER.MIXER_Z
MIXER_OUT: Final = DECODER.MIXER_OUT
XATTN_LN_SCALE: Final = DECODER.XATTN_LN_SCALE
XATTN_IN: Final = DECODER.XATTN_IN
XATTN_Q: Final = DECODER.XATTN_Q
XATTN_K: Final = DECODER.XATTN_K
XATTN_V: Final = DECODER.XATTN_V
XATTN_SCORES: Final = DECODER.XATTN_SCORES
XATTN_PATTERN: Final = DECODER.XATTN_PATTERN
XATTN_Z: Final = DECODER.XATTN_Z
XATTN_RESULT: Final = DECODER.XATTN_RESULT
XATTN_OUT: Final = DECODER.XATTN_OUT
RESID_XMID: Final = DECODER.RESID_XMID
MLP_LN_SCALE: Final = DECODER.MLP_LN_SCALE
MLP_IN: Final = DECODER.MLP_IN
MLP_PRE: Final = DECODER.MLP_PRE
MLP_POST: Final = DECODER.MLP_POST
ROUTER_LOGITS: Final = DECODER.ROUTER_LOGITS
ROUTER_INDICES: Final = DECODER.ROUTER_INDICES
ROUTER_WEIGHTS: Final = DECODER.ROUTER_WEIGHTS
EXPERT_POST: Final = DECODER.EXPERT_POST
EXPERT_OUT: Final = DECODER.EXPERT_OUT
ROUTED_OUT: Final = DECODER.ROUTED_OUT
SHARED_GATE: Final = DECODER.SHARED_GATE
SHARED_POST: Final = DECODER.SHARED_POST
SHARED_OUT: Final = DECODER.SHARED_OUT
MLP_OUT: Final = DECODER.MLP_OUT
EXTRA_OUT: Final = DECODER.EXTRA_OUT
RESID_POST: Final = DECODER.RESID_POST
FINAL_LN_SCALE: Final = DECODER.FINAL_LN_SCALE
FINAL_LN_OUT: Final = DECODER.FINAL_LN_OUT
LOGITS: Final = DECODER.LOGITS
