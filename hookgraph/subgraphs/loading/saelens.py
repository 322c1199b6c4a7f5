"""SAELens: a folder with `cfg.json` and `sae_weights.safetensors`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from hookgraph.errors import LoadError
from hookgraph.graph.foreign import Weights, read_settings, read_weights
from hookgraph.subgraphs.activations import Activation, Gated, JumpReLU, ReLU, TopK
from hookgraph.subgraphs.dictionary import Autoencoder, Normalisation, Origin
from hookgraph.subgraphs.encoders import CausalAttention, MatchingPursuit, Projection, TemporalExpectation
from hookgraph.subgraphs.loading.files import Format, assembled, choose, located

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
Config = Mapping[str, Any]

_NORMALISATIONS: Final[Mapping[str, Normalisation]] = {
    "none": "none",
    "None": "none",
    "False": "none",
    # These were folded into the weights when the file was written.
    "True": "none",
    "expected_average_only_in": "none",
    "covariance_whitening": "none",
    # A number, which a temporal dictionary's weights are scaled by here.
    "constant_scalar_rescale": "none",
    "layer_norm": "layer norm",
    "constant_norm_rescale": "unit norm",
}


def _relu(config: Config, weights: Weights) -> Activation:
    return ReLU()


def _jump_relu(config: Config, weights: Weights) -> Activation:
    return JumpReLU(weights["threshold"])


def _gated(config: Config, weights: Weights) -> Activation:
    return Gated(weights["b_gate"], weights["r_mag"], weights["b_mag"])


def _top_k(config: Config, weights: Weights) -> Activation:
    return TopK(_k(config, weights))


def _absolute_top_k(config: Config, weights: Weights) -> Activation:
    return TopK(_k(config, weights), by="size", rectified=False)


def _temporal(config: Config, weights: Weights) -> Activation:
    kinds = {"topk": TopK(k) if (k := config.get("kval_topk")) is not None else ReLU(), "relu": ReLU()}
    return choose(weights.path.parent / CONFIG, "sae_diff_type", config.get("sae_diff_type", "topk"), kinds)


def _k(config: Config, weights: Weights) -> int:
    k = config.get("k", config.get("activation_fn_kwargs", {}).get("k"))
    if k is None:
        raise LoadError(f"{weights.path.parent / CONFIG}: expected k, found {', '.join(sorted(config))}")
    return int(k)


ARCHITECTURES: Final[Mapping[str, Callable[[Config, Weights], Activation]]] = {
    "standard": _relu,
    "gated": _gated,
    "jumprelu": _jump_relu,
    "topk": _top_k,
    "abstopk": _absolute_top_k,
    # Trained with a batch-wide k, written with the threshold that it came to.
    "batchtopk": _jump_relu,
    "matryoshka_batchtopk": _jump_relu,
    "transcoder": _relu,
    "skip_transcoder": _relu,
    "jumprelu_transcoder": _jump_relu,
    "jumprelu_skip_transcoder": _jump_relu,
    "matching_pursuit": _relu,
    "temporal": _temporal,
}


def read(path: Path) -> Autoencoder:
    """A folder that SAELens wrote, of version 6 or before."""
    config = read_settings(path / CONFIG)
    weights = read_weights(path / WEIGHTS)
    architecture = config.get("architecture") or "standard"
    if config.get("activation_fn", config.get("activation_fn_str")) == "topk":
        architecture = "topk"
    activation = choose(path / CONFIG, "architecture", architecture, ARCHITECTURES)(config, weights)
    normalisation = choose(
        path / CONFIG, "normalize_activations", config.get("normalize_activations", "none"), _NORMALISATIONS
    )
    origin = _origin(config)
    if architecture == "matching_pursuit":
        return assembled(path, lambda: _matching_pursuit(config, weights, normalisation, origin))
    if architecture == "temporal":
        return assembled(
            path, lambda: _temporal_dictionary(config, weights, activation, normalisation, origin)
        )
    b_dec = weights["b_dec"]
    transcodes = "transcoder" in architecture
    subtracts = not transcodes and bool(config.get("apply_b_dec_to_input", True))
    W_enc, W_dec, b_enc = _rescaled(config, weights)
    skip = weights.optional("W_skip")
    return assembled(
        path,
        lambda: Autoencoder(
            W_enc,
            W_dec,
            b_enc,
            b_dec,
            b_in=b_dec if subtracts else None,
            W_skip=None if skip is None else skip.T,
            activation=activation,
            normalisation=normalisation,
            origin=origin,
        ),
    )


def _matching_pursuit(
    config: Config, weights: Weights, normalisation: Normalisation, origin: Origin
) -> Autoencoder:
    """One matrix encodes and decodes; the bias is taken from the input and added again, or neither."""
    W_dec = weights["W_dec"]
    b_dec = weights["b_dec"] if config.get("apply_b_dec_to_input", True) else None
    pursuit = MatchingPursuit(
        float(config.get("residual_threshold", 1e-2)),
        config.get("max_iterations"),
        stops_on_repeat=bool(config.get("stop_on_duplicate_support", True)),
    )
    return Autoencoder(
        W_dec.T, W_dec, b_dec=b_dec, b_in=b_dec, normalisation=normalisation, pursuit=pursuit, origin=origin
    )


def _temporal_dictionary(
    config: Config, weights: Weights, activation: Activation, normalisation: Normalisation, origin: Origin
) -> Autoencoder:
    """The encoder reads x / 4 d_model; attention over earlier latents tells what is expected."""
    W_dec, b_dec = weights["W_dec"], weights["b_dec"]
    tied, subtracts = config.get("tied_weights", True), bool(config.get("apply_b_dec_to_input", True))
    scale = 1.0
    if config.get("normalize_activations") == "constant_scalar_rescale":
        scale = float(config.get("activation_normalization_factor", 1.0))
    W_enc = (W_dec.T if tied else weights["W_enc"]) * (scale / (4 * W_dec.shape[1]))
    heads = int(config.get("n_heads", 8))
    layers = [
        _attention(weights, f"attn_layers.{i}.", heads) for i in range(int(config.get("n_attn_layers", 1)))
    ]
    return Autoencoder(
        W_enc,
        W_dec / scale,
        b_dec=None if tied and not subtracts else b_dec / scale,
        b_in=b_dec / scale if subtracts else None,
        activation=activation,
        normalisation=normalisation,
        expectation=TemporalExpectation(layers, 1e-6 / scale),
        origin=origin,
    )


def _attention(weights: Weights, prefix: str, heads: int) -> CausalAttention:
    """Three projections are told by their names; the fourth one makes the output."""
    names = [f"{prefix}{name}.weight" for name in ("q_target", "k_ctx", "v_ctx")]
    query, key, value = (_projection(weights, name) for name in names)
    others = [n for n in weights if n.startswith(prefix) and n.endswith(".weight") and n not in names]
    if len(others) != 1:
        found = ", ".join(others) or "none"
        raise LoadError(f"{weights.path}: expected one output projection in {prefix}*, found {found}")
    return CausalAttention(query, key, value, _projection(weights, others[0]), heads)


def _projection(weights: Weights, name: str) -> Projection:
    return Projection(weights[name], weights[name.removesuffix("weight") + "bias"])


def _rescaled(config: Config, weights: Weights) -> tuple[Tensor, Tensor, Tensor | None]:
    """Encoder, decoder and encoder's bias with every scale written into them."""
    W_enc, W_dec, b_enc = weights["W_enc"], weights["W_dec"], weights.optional("b_enc")
    if config.get("rescale_acts_by_decoder_norm"):
        norm = W_dec.norm(dim=-1)
        W_enc, W_dec = W_enc * norm, W_dec / norm[:, None]
        b_enc = None if b_enc is None else b_enc * norm
    scale = weights.optional("scaling_factor")
    if scale is not None and not torch.equal(scale, torch.ones_like(scale)):
        W_dec = W_dec * scale[:, None]
    return W_enc, W_dec, b_enc


def _origin(config: Config) -> Origin:
    about = {**config, **(config.get("metadata") or {})}
    reads = located(about.get("hook_name", about.get("hook_point")))
    writes = located(about["hook_name_out"]) if about.get("hook_name_out") else reads
    return Origin("SAELens", reads, writes, str(about.get("model_name") or ""), dict(about))


def _recognises(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


FORMAT = Format("SAELens", f"a folder with {CONFIG} and {WEIGHTS}", _recognises, read)
