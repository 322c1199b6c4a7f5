"""OpenAI's sparse autoencoders of GPT-2: a state dict with the name of the activation function."""

import re
from pathlib import Path
from typing import Any

from hookgraph.errors import LoadError
from hookgraph.graph.foreign import Weights, read_weights
from hookgraph.ontology.aliases import from_transformer_debugger
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs.activations import Activation, ReLU, TopK
from hookgraph.subgraphs.dictionary import Autoencoder, Origin
from hookgraph.subgraphs.loading.files import Format, assembled, choose

_PLACE = re.compile(r"(mlp|resid)_(post_act|delta_attn|post_attn|delta_mlp|post_mlp)")


def read(path: Path) -> Autoencoder:
    """f = act((norm(x) - pre_bias) W + latent_bias); the input is normalised where the activation is TopK."""
    weights = read_weights(path)
    name = weights.others.get("activation", "ReLU")
    activation = choose(path, "the activation", name, {"ReLU": _relu, "TopK": _top_k})(weights)
    encoder = weights["encoder.weight"]
    decoder = weights.first("decoder.weight", "decoder.linear.weight")
    place = site(path)
    return assembled(
        path,
        lambda: Autoencoder(
            encoder.T,
            # A tied decoder is stored as the encoder.
            decoder.T if "decoder.weight" in weights else decoder,
            weights["latent_bias"],
            weights["pre_bias"],
            b_in=weights["pre_bias"],
            activation=activation,
            normalisation="layer norm" if name == "TopK" else "none",
            origin=Origin("OpenAI", place, place, config={"activation": name}),
        ),
    )


def site(path: Path) -> Location | None:
    """Where the name of the file says that it belongs: `.../resid_delta_mlp_v5_32k/autoencoders/6.pt`."""
    found = _PLACE.search(path.as_posix())
    if found is None or not path.stem.isdigit():
        return None
    return from_transformer_debugger(f"{found[1]}.{found[2]}", int(path.stem))


def _relu(weights: Weights) -> Activation:
    return ReLU()


def _top_k(weights: Weights) -> Activation:
    state: dict[str, Any] = weights.others.get("activation_state_dict", {})
    if "k" not in state:
        raise LoadError(f"{weights.path}: expected k in activation_state_dict, found {sorted(state)}")
    after = state.get("postact_fn", "ReLU")
    rectified = choose(weights.path, "postact_fn", after, {"ReLU": True, "Identity": False})
    return TopK(int(state["k"]), rectified=rectified)


def _recognises(path: Path) -> bool:
    return path.suffix in (".pt", ".pth") and {"pre_bias", "latent_bias"} <= set(read_weights(path))


FORMAT = Format("OpenAI", "a .pt state dict with pre_bias and latent_bias", _recognises, read)
