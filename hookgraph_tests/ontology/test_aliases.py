import pytest

from hookgraph.errors import LocationError
from hookgraph.ontology.aliases import (
    from_transformer_debugger,
    from_transformer_lens,
    to_transformer_debugger,
    to_transformer_lens,
)
from hookgraph.ontology.autoencoder import LATENTS
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import (
    ATTN_IN,
    ATTN_K,
    ATTN_K_PRE,
    ATTN_LN_SCALE,
    ATTN_OUT,
    ATTN_PATTERN,
    ATTN_Q,
    ATTN_Q_PRE,
    ATTN_RESULT,
    ATTN_SCORES,
    ATTN_V,
    ATTN_Z,
    EMBED,
    ENCODER,
    FINAL_LN_OUT,
    FINAL_LN_SCALE,
    LOGITS,
    MLP_IN,
    MLP_LN_SCALE,
    MLP_OUT,
    MLP_POST,
    MLP_PRE,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
)

TRANSFORMER_LENS = {
    "hook_embed": EMBED,
    "blocks.0.hook_resid_pre": RESID_PRE[0],
    "blocks.3.hook_resid_pre": RESID_PRE[3],
    "blocks.3.ln1.hook_scale": ATTN_LN_SCALE[3],
    "blocks.3.ln1.hook_normalized": ATTN_IN[3],
    "blocks.3.attn.hook_q": ATTN_Q_PRE[3],
    "blocks.3.attn.hook_k": ATTN_K_PRE[3],
    "blocks.3.attn.hook_rot_q": ATTN_Q[3],
    "blocks.3.attn.hook_rot_k": ATTN_K[3],
    "blocks.3.attn.hook_v": ATTN_V[3],
    "blocks.3.attn.hook_attn_scores": ATTN_SCORES[3],
    "blocks.3.attn.hook_pattern": ATTN_PATTERN[3],
    "blocks.11.attn.hook_z": ATTN_Z[11],
    "blocks.3.attn.hook_result": ATTN_RESULT[3],
    "blocks.3.hook_attn_out": ATTN_OUT[3],
    "blocks.3.hook_resid_mid": RESID_MID[3],
    "blocks.3.ln2.hook_scale": MLP_LN_SCALE[3],
    "blocks.3.ln2.hook_normalized": MLP_IN[3],
    "blocks.3.mlp.hook_pre": MLP_PRE[3],
    "blocks.3.mlp.hook_post": MLP_POST[3],
    "blocks.3.hook_mlp_out": MLP_OUT[3],
    "blocks.3.hook_resid_post": RESID_POST[3],
    "ln_final.hook_scale": FINAL_LN_SCALE,
    "ln_final.hook_normalized": FINAL_LN_OUT,
}

TRANSFORMER_DEBUGGER = {
    ("resid.post_emb", None): RESID_PRE[0],
    ("attn_ln.scale", 3): ATTN_LN_SCALE[3],
    ("resid.post_ln_attn", 3): ATTN_IN[3],
    ("attn.q", 3): ATTN_Q[3],
    ("attn.k", 3): ATTN_K[3],
    ("attn.v", 3): ATTN_V[3],
    ("attn.qk_logits", 3): ATTN_SCORES[3],
    ("attn.qk_probs", 3): ATTN_PATTERN[3],
    ("attn.v_out", 0): ATTN_Z[0],
    ("resid.delta_attn", 3): ATTN_OUT[3],
    ("resid.post_attn", 3): RESID_MID[3],
    ("mlp_ln.scale", 3): MLP_LN_SCALE[3],
    ("resid.post_ln_mlp", 3): MLP_IN[3],
    ("mlp.pre_act", 3): MLP_PRE[3],
    ("mlp.post_act", 3): MLP_POST[3],
    ("resid.delta_mlp", 3): MLP_OUT[3],
    ("resid.post_mlp", 3): RESID_POST[3],
    ("resid.ln_f.scale", None): FINAL_LN_SCALE,
    ("resid.post_ln_f", None): FINAL_LN_OUT,
    ("logits", None): LOGITS,
}


@pytest.mark.parametrize(("name", "location"), TRANSFORMER_LENS.items())
def test_transformer_lens_names_translate_both_ways(name: str, location: Location):
    assert from_transformer_lens(name) == location
    assert to_transformer_lens(location) == name


@pytest.mark.parametrize(("name", "location"), TRANSFORMER_DEBUGGER.items(), ids=str)
def test_transformer_debugger_names_translate_both_ways(name: tuple[str, int | None], location: Location):
    assert from_transformer_debugger(*name) == location
    assert to_transformer_debugger(location) == name


def test_parts_and_gradients_are_dropped():
    part = ATTN_Z[9].at(head=6).grad
    assert to_transformer_lens(part) == "blocks.9.attn.hook_z"
    assert to_transformer_debugger(part) == ("attn.v_out", 9)
    assert to_transformer_debugger(LOGITS.at(pos=-1)) == ("logits", None)


def test_the_stream_before_a_layer_is_the_one_after_the_layer_before():
    assert to_transformer_debugger(RESID_PRE[4]) == ("resid.post_mlp", 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.3.attn.hook_zz", r"the TransformerLens hook 'blocks.3.attn.hook_zz': did you mean"),
        ("blocks.x.attn.hook_z", "no location is the TransformerLens hook"),
        ("hook_pos_embed", "did you mean hook_embed"),
    ],
)
def test_an_unknown_transformer_lens_name_is_an_error(name: str, message: str):
    with pytest.raises(LocationError, match=message):
        from_transformer_lens(name)


def test_the_names_that_are_suggested_are_names_of_the_layer_that_was_meant():
    with pytest.raises(LocationError, match=r"did you mean .*blocks\.3\.attn\.hook_z") as caught:
        from_transformer_lens("blocks.3.attn.hook_zz")
    assert "{}" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("attn.v_outs", 1, r"transformer-debugger string 'attn.v_outs': did you mean attn\.v_out"),
        ("attn.v_out", None, "'attn.v_out' needs a layer"),
    ],
)
def test_an_unknown_transformer_debugger_string_is_an_error(name: str, layer: int | None, message: str):
    with pytest.raises(LocationError, match=message):
        from_transformer_debugger(name, layer)


ABSENT = (
    LATENTS().within(MLP_OUT[3], "sae"),
    RESID_POST[3].within(MLP_OUT[3], "sub"),
    RESID_PRE[3].within(MLP_OUT[3], "sub"),
    ENCODER.ATTN_Z[1],
)


@pytest.mark.parametrize("location", [LOGITS, *ABSENT], ids=str)
def test_what_transformer_lens_does_not_name_is_an_error(location: Location):
    with pytest.raises(LocationError, match="TransformerLens has no hook at"):
        to_transformer_lens(location)


@pytest.mark.parametrize("location", [EMBED, ATTN_RESULT[0], *ABSENT], ids=str)
def test_what_transformer_debugger_does_not_name_is_an_error(location: Location):
    with pytest.raises(LocationError, match="transformer-debugger has no string for"):
        to_transformer_debugger(location)
