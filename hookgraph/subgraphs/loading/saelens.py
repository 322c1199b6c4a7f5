"""SAELens: a folder with `cfg.json` and `sae_weights.safetensors`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from hookgraph.errors import LoadError
from hookgraph.subgraphs.activations import Activation, Gated, JumpReLU, ReLU, TopK
from hookgraph.subgraphs.dictionary import Autoencoder, Normalisation, Origin
from hookgraph.subgraphs.loading.files import (
    Format,
    Weights,
    assembled,
    choose,
    located,
    read_settings,
    read_weights,
)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
Config = Mapping[str, Any]

_NORMALISATIONS: Final[Mapping[str, Normalisation]] = {
    "none": "none",
    "None": "none",
    "False": "none",
    # Both were folded into the weights when the file was written.
    "True": "none",
    "expected_average_only_in": "none",
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
            origin=_origin(config),
        ),
    )


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
