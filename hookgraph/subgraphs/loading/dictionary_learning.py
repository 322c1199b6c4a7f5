"""dictionary_learning: a folder with `ae.pt`, a state dict, and `config.json`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from hookgraph.graph.foreign import Weights, read_settings, read_weights
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import ATTN_OUT, MLP_OUT, RESID_POST
from hookgraph.subgraphs.activations import Activation, Gated, JumpReLU, ReLU, TopK
from hookgraph.subgraphs.crosscoder import Crosscoder
from hookgraph.subgraphs.dictionary import Autoencoder, Origin
from hookgraph.subgraphs.loading.files import Format, assembled, choose

WEIGHTS, CONFIG = "ae.pt", "config.json"
Make = Callable[[Weights, Origin], Autoencoder]

_SITES: Final = {
    "resid_post": RESID_POST,
    "mlp_out": MLP_OUT,
    "attention_out": ATTN_OUT,
    "attn_out": ATTN_OUT,
}


def _linear(
    weights: Weights, origin: Origin, activation: Activation, bias: str, *, subtract: bool
) -> Autoencoder:
    """Encoder and decoder are linear layers; the decoder's bias is taken from the input, or not."""
    b_dec = weights[bias]
    return Autoencoder(
        weights["encoder.weight"].T,
        weights["decoder.weight"].T,
        weights.optional("encoder.bias"),
        b_dec,
        b_in=b_dec if subtract else None,
        activation=activation,
        origin=origin,
    )


def _matrices(weights: Weights, origin: Origin, activation: Activation, *, subtract: bool) -> Autoencoder:
    """Encoder and decoder are matrices from the right."""
    b_dec = weights["b_dec"]
    return Autoencoder(
        weights["W_enc"],
        weights["W_dec"],
        weights["b_enc"],
        b_dec,
        b_in=b_dec if subtract else None,
        activation=activation,
        origin=origin,
    )


def _standard(weights: Weights, origin: Origin) -> Autoencoder:
    return _linear(weights, origin, ReLU(), "bias", subtract=True)


def _new(weights: Weights, origin: Origin) -> Autoencoder:
    return _linear(weights, origin, ReLU(), "decoder.bias", subtract=False)


def _gated(weights: Weights, origin: Origin) -> Autoencoder:
    gated = Gated(weights["gate_bias"], weights["r_mag"], weights["mag_bias"])
    return _linear(weights, origin, gated, "decoder_bias", subtract=True)


def _top_k(weights: Weights, origin: Origin) -> Autoencoder:
    k = weights["k"] if "k" in weights else torch.tensor(_trainer(origin).get("k", 0))
    return _linear(weights, origin, TopK(int(k)), "b_dec", subtract=True)


def _batch_top_k(weights: Weights, origin: Origin) -> Autoencoder:
    return _linear(weights, origin, JumpReLU(weights["threshold"]), "b_dec", subtract=True)


def _matryoshka(weights: Weights, origin: Origin) -> Autoencoder:
    return _matrices(weights, origin, JumpReLU(weights["threshold"]), subtract=True)


def _jump_relu(weights: Weights, origin: Origin) -> Autoencoder:
    return _matrices(weights, origin, JumpReLU(weights["threshold"]), subtract=False)


CLASSES: Final[Mapping[str, Make]] = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _new,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jump_relu,
}


def read(path: Path) -> Autoencoder:
    """A folder with its configuration; or `ae.pt` alone, whose class is told by the names of its weights.

    The weights are taken as they are: dictionary_learning's own loader can rescale a standard dictionary to
    a decoder of norm one, which multiplies its latents by the former norms.
    """
    folder = path if path.is_dir() else path.parent
    weights = read_weights(folder / WEIGHTS if path.is_dir() else path)
    config = read_settings(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    origin = _origin(config)
    named = _trainer(origin).get("dict_class") or _class_of(weights)
    make = choose(path, "dict_class", named, CLASSES)
    return assembled(path, lambda: make(weights, origin))


def load_crosscoder(path: str | Path) -> Crosscoder:
    """A crosscoder that dictionary_learning wrote.

    Raises:
        LoadError: the file is missing, damaged, or no crosscoder.
    """
    place = Path(path)
    weights = read_weights(place / WEIGHTS if place.is_dir() else place)
    plain = Weights(weights.path, {k.removeprefix("_orig_mod."): v for k, v in weights.items()})
    return Crosscoder(
        plain["encoder.weight"],
        plain["decoder.weight"].transpose(0, 1),
        plain["encoder.bias"],
        plain["decoder.bias"],
    )


def _class_of(weights: Weights) -> str:
    """The class of a state dict without a configuration."""
    marks = {
        "AutoEncoder": {"bias", "encoder.weight"},
        "GatedAutoEncoder": {"gate_bias"},
        "MatryoshkaBatchTopKSAE": {"W_enc", "k", "threshold"},
        "JumpReluAutoEncoder": {"W_enc", "threshold"},
        "AutoEncoderNew": {"encoder.weight", "decoder.bias"},
    }
    return next((name for name, names in marks.items() if names <= set(weights)), "unknown")


def _trainer(origin: Origin) -> Mapping[str, Any]:
    return origin.config.get("trainer", {})


def _origin(config: Mapping[str, Any]) -> Origin:
    trainer = config.get("trainer", {})
    site = _site(str(trainer.get("submodule_name") or ""), trainer.get("layer"))
    return Origin("dictionary_learning", site, site, str(trainer.get("lm_name") or ""), dict(config))


def _site(submodule: str, layer: object) -> Location | None:
    """The site of names such as `resid_post_layer_8`."""
    kind = next((kind for name, kind in _SITES.items() if submodule.startswith(name)), None)
    return kind[layer] if kind is not None and isinstance(layer, int) else None


def _recognises(path: Path) -> bool:
    if path.is_dir():
        return (path / WEIGHTS).is_file()
    return path.suffix in (".pt", ".pth") and _class_of(read_weights(path)) != "unknown"


FORMAT = Format("dictionary_learning", f"a folder with {WEIGHTS} and {CONFIG}", _recognises, read)
