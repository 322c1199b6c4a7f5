"""Names that users of other tools know, to and from locations.

TransformerLens hook names (`blocks.3.attn.hook_z`) carry the layer; transformer-debugger strings
(`attn.v_out`) take it beside them. Only names that mean the same tensor are translated, with one
difference to know: `ln1.hook_scale` is the divisor sqrt(mean square + ε), `attn.ln_scale` its reciprocal.
"""

import re
from typing import Final

from hookgraph.errors import LocationError, nearest
from hookgraph.ontology import transformer as t
from hookgraph.ontology.locations import Location, LocationType

_TRANSFORMER_LENS: Final[dict[str, Location | LocationType]] = {
    "hook_embed": t.EMBED,
    "blocks.{}.hook_resid_pre": t.RESID_PRE,
    "blocks.{}.ln1.hook_scale": t.ATTN_LN_SCALE,
    "blocks.{}.ln1.hook_normalized": t.ATTN_IN,
    "blocks.{}.attn.hook_q": t.ATTN_Q_PRE,
    "blocks.{}.attn.hook_k": t.ATTN_K_PRE,
    "blocks.{}.attn.hook_rot_q": t.ATTN_Q,
    "blocks.{}.attn.hook_rot_k": t.ATTN_K,
    "blocks.{}.attn.hook_v": t.ATTN_V,
    "blocks.{}.attn.hook_attn_scores": t.ATTN_SCORES,
    "blocks.{}.attn.hook_pattern": t.ATTN_PATTERN,
    "blocks.{}.attn.hook_z": t.ATTN_Z,
    "blocks.{}.attn.hook_result": t.ATTN_RESULT,
    "blocks.{}.hook_attn_out": t.ATTN_OUT,
    "blocks.{}.hook_resid_mid": t.RESID_MID,
    "blocks.{}.ln2.hook_scale": t.MLP_LN_SCALE,
    "blocks.{}.ln2.hook_normalized": t.MLP_IN,
    "blocks.{}.mlp.hook_pre": t.MLP_PRE,
    "blocks.{}.mlp.hook_post": t.MLP_POST,
    "blocks.{}.mlp.hook_expert_indices": t.ROUTER_INDICES,
    "blocks.{}.hook_mlp_out": t.MLP_OUT,
    "blocks.{}.hook_resid_post": t.RESID_POST,
    "ln_final.hook_scale": t.FINAL_LN_SCALE,
    "ln_final.hook_normalized": t.FINAL_LN_OUT,
}

_TRANSFORMER_DEBUGGER: Final[dict[str, Location | LocationType]] = {
    "attn_ln.scale": t.ATTN_LN_SCALE,
    "resid.post_ln_attn": t.ATTN_IN,
    "attn.q": t.ATTN_Q,
    "attn.k": t.ATTN_K,
    "attn.v": t.ATTN_V,
    "attn.qk_logits": t.ATTN_SCORES,
    "attn.qk_probs": t.ATTN_PATTERN,
    "attn.v_out": t.ATTN_Z,
    "resid.delta_attn": t.ATTN_OUT,
    "resid.post_attn": t.RESID_MID,
    "mlp_ln.scale": t.MLP_LN_SCALE,
    "resid.post_ln_mlp": t.MLP_IN,
    "mlp.pre_act": t.MLP_PRE,
    "mlp.post_act": t.MLP_POST,
    "resid.delta_mlp": t.MLP_OUT,
    "resid.post_mlp": t.RESID_POST,
    "resid.ln_f.scale": t.FINAL_LN_SCALE,
    "resid.post_ln_f": t.FINAL_LN_OUT,
    "logits": t.LOGITS,
}
_POST_EMBEDDING: Final = "resid.post_emb"


def from_transformer_lens(name: str) -> Location:
    """The location that TransformerLens calls `name`; on models without rotary embedding its
    `hook_q` and `hook_k` are `attn.q` and `attn.k`.

    Raises:
        LocationError: no location has that name; near names are given.
    """
    layer = re.search(r"(?<=blocks\.)[0-9]+", name)
    number = int(layer.group()) if layer else 0
    found = _TRANSFORMER_LENS.get(re.sub(r"(?<=blocks\.)[0-9]+", "{}", name))
    if found is None:
        known = [pattern.format(number) for pattern in _TRANSFORMER_LENS]
        raise LocationError(f"no location is the TransformerLens hook {name!r}: {nearest(name, known)}")
    return found if isinstance(found, Location) else found[number]


def to_transformer_lens(location: Location) -> str:
    """The TransformerLens hook name of a location; parts and gradients are dropped.

    Raises:
        LocationError: TransformerLens has no such hook.
    """
    kind = _key(location)
    for name, found in _TRANSFORMER_LENS.items():
        if found == kind:
            return name.format(location.layer)
    raise LocationError(f"TransformerLens has no hook at {location.whole}")


def _key(location: Location) -> Location | LocationType:
    """What the tables hold for a location: the type where it has layers. Inside a subgraph, nothing."""
    layered = location.type.layered and location.site is None
    return location.type if layered else location.whole


def from_transformer_debugger(name: str, layer: int | None = None) -> Location:
    """The location that transformer-debugger calls `name`, at `layer` where the name has layers.

    Raises:
        LocationError: no location has that name, or a layer is missing; near names are given.
    """
    if name == _POST_EMBEDDING:
        return t.RESID_PRE[0]
    found = _TRANSFORMER_DEBUGGER.get(name)
    if found is None:
        known = [*_TRANSFORMER_DEBUGGER, _POST_EMBEDDING]
        raise LocationError(
            f"no location is the transformer-debugger string {name!r}: {nearest(name, known)}"
        )
    if isinstance(found, Location):
        return found
    if layer is None:
        raise LocationError(f"the transformer-debugger string {name!r} needs a layer")
    return found[layer]


def to_transformer_debugger(location: Location) -> tuple[str, int | None]:
    """The transformer-debugger string of a location, and its layer; parts and gradients are dropped.

    `resid.pre[l]` is there `resid.post_emb` for l = 0, otherwise `resid.post_mlp` of layer l - 1.

    Raises:
        LocationError: transformer-debugger has no such string.
    """
    layer = location.layer
    if layer is not None and _key(location) == t.RESID_PRE:
        return (_POST_EMBEDDING, None) if layer == 0 else ("resid.post_mlp", layer - 1)
    kind = _key(location)
    for name, found in _TRANSFORMER_DEBUGGER.items():
        if found == kind:
            return name, layer
    raise LocationError(f"transformer-debugger has no string for {location.whole}")
