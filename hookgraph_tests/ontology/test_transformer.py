from itertools import pairwise

import pytest

import hookgraph.locations as everything
from hookgraph.ontology import autoencoder, transformer
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import DECODER, ENCODER, STEM, VISION, TransformerStack

# The table of the vocabulary, as the documentation states it.
VOCABULARY = """
EMBED           embed           batch pos d_model
RESID_PRE       resid.pre       batch pos d_model
STREAMS_PRE     streams.pre     batch pos stream d_model
ATTN_LN_SCALE   attn.ln_scale   batch pos one
ATTN_IN         attn.in         batch pos d_model
ATTN_Q_IN       attn.q_in       batch pos head d_model
ATTN_K_IN       attn.k_in       batch pos kv_head d_model
ATTN_V_IN       attn.v_in       batch pos kv_head d_model
ATTN_Q_PRE      attn.q_pre      batch pos head d_head
ATTN_K_PRE      attn.k_pre      batch pos kv_head d_head
ATTN_Q          attn.q          batch pos head d_head
ATTN_K          attn.k          batch pos kv_head d_head
ATTN_V          attn.v          batch pos kv_head d_head
ATTN_SCORES     attn.scores     batch head pos key_pos
ATTN_PATTERN    attn.pattern    batch head pos key_pos
ATTN_Z          attn.z          batch pos head d_head
ATTN_RESULT     attn.result     batch pos head d_model
ATTN_OUT        attn.out        batch pos d_model
RESID_MID       resid.mid       batch pos d_model
STREAMS_MID     streams.mid     batch pos stream d_model
MIXER_LN_SCALE  mixer.ln_scale  batch pos one
MIXER_IN        mixer.in        batch pos d_model
MIXER_GATE      mixer.gate      batch pos d_mixer
MIXER_Z         mixer.z         batch pos d_mixer
MIXER_OUT       mixer.out       batch pos d_model
XATTN_LN_SCALE  xattn.ln_scale  batch pos one
XATTN_IN        xattn.in        batch pos d_model
XATTN_Q         xattn.q         batch pos head d_head
XATTN_K         xattn.k         batch key_pos kv_head d_head
XATTN_V         xattn.v         batch key_pos kv_head d_head
XATTN_SCORES    xattn.scores    batch head pos key_pos
XATTN_PATTERN   xattn.pattern   batch head pos key_pos
XATTN_Z         xattn.z         batch pos head d_head
XATTN_RESULT    xattn.result    batch pos head d_model
XATTN_OUT       xattn.out       batch pos d_model
RESID_XMID      resid.xmid      batch pos d_model
MLP_LN_SCALE    mlp.ln_scale    batch pos one
MLP_IN          mlp.in          batch pos d_model
ROUTER_LOGITS   moe.router_logits   batch pos expert
SHARED_GATE     moe.shared_gate     batch pos one
ROUTER_INDICES  moe.router_indices  batch pos choice
ROUTER_WEIGHTS  moe.router_weights  batch pos choice
MLP_PRE         mlp.pre         batch pos d_mlp
EXPERT_POST     moe.expert_post     batch pos choice d_mlp
SHARED_POST     moe.shared_post     batch pos d_mlp
EXPERT_OUT      moe.expert_out      batch pos choice d_model
ROUTED_OUT      moe.routed_out      batch pos d_model
SHARED_OUT      moe.shared_out      batch pos d_model
MLP_POST        mlp.post        batch pos d_mlp
MLP_OUT         mlp.out         batch pos d_model
EXTRA_OUT       extra.out       batch pos d_model
RESID_POST      resid.post      batch pos d_model
STREAMS_POST    streams.post    batch pos stream d_model
FINAL_LN_SCALE  final.ln_scale  batch pos one
FINAL_LN_OUT    final.ln_out    batch pos d_model
LOGITS          logits          batch pos vocab
"""
ROWS = [line.split(maxsplit=2) for line in VOCABULARY.strip().splitlines()]
SAME_STAGE = (
    {"attn.q_in", "attn.k_in", "attn.v_in"},
    {"attn.q_pre", "attn.k_pre"},
    {"attn.q", "attn.k", "attn.v"},
    {"attn.out", "mixer.out"},
    {"resid.pre", "streams.pre"},
    {"resid.mid", "streams.mid"},
    {"resid.post", "streams.post"},
    {"xattn.q", "xattn.k", "xattn.v"},
    {"moe.router_logits", "moe.shared_gate"},
    {"moe.router_indices", "moe.router_weights"},
    {"moe.expert_post", "moe.shared_post"},
    {"moe.routed_out", "moe.shared_out"},
)
"""What does not depend on each other."""


def first_of(stack: TransformerStack, constant: str) -> Location:
    found = getattr(stack, constant)
    return found[0] if isinstance(found, LocationType) else found


@pytest.mark.parametrize(("constant", "name", "dims"), ROWS, ids=[row[1] for row in ROWS])
def test_a_constant_has_the_documented_name_and_axes(constant: str, name: str, dims: str):
    location = first_of(DECODER, constant)
    assert (location.type.name, " ".join(location.type.dims)) == (name, dims)
    assert getattr(transformer, constant) == getattr(DECODER, constant)


def test_the_vocabulary_is_complete():
    assert {row[0] for row in ROWS} == set(vars(DECODER))


@pytest.mark.parametrize("stack", [DECODER, ENCODER, VISION, STEM])
def test_the_vocabulary_stands_in_causal_order(stack: TransformerStack):
    mixer = [row[0] for row in ROWS if row[0].startswith("MIXER_")]
    order = [first_of(stack, row[0]) for row in ROWS if row[0] not in mixer]
    order.insert(order.index(first_of(stack, "RESID_MID")), first_of(stack, "MIXER_OUT"))
    inside = [first_of(stack, name) for name in ("RESID_PRE", *mixer, "RESID_MID")]
    assert all(before.precedes(after) for before, after in pairwise(inside))
    for before, after in pairwise(order):
        together = any({before.type.name, after.type.name} <= names for names in SAME_STAGE)
        assert before.precedes(after) != together, (before, after)
        assert not after.precedes(before)


@pytest.mark.parametrize(("stack", "prefix"), [(ENCODER, "encoder."), (VISION, "vision."), (STEM, "stem.")])
def test_other_stacks_have_the_same_words_under_their_name(stack: TransformerStack, prefix: str):
    for constant, name, _ in ROWS:
        location = first_of(stack, constant)
        assert str(location.type) == prefix + name
        assert location.type != first_of(DECODER, constant).type


def test_all_locations_can_be_imported_from_one_place():
    def of(module: object) -> dict[str, object]:
        return {
            name: value
            for name, value in vars(module).items()
            if name.isupper() and isinstance(value, (LocationType, Location)) and name[0] != "_"
        }

    expected = {**of(transformer), **of(autoencoder), "ENCODER": ENCODER, "VISION": VISION, "STEM": STEM}
    assert {name: getattr(everything, name) for name in everything.__all__} == expected
