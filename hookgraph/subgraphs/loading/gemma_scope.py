"""Gemma Scope: `params.npz`, a JumpReLU dictionary or transcoder."""

import re
from pathlib import Path
from typing import Final

from hookgraph.graph.foreign import Weights, read_weights
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import ATTN_Z, EMBED, MLP_IN, MLP_OUT, RESID_POST
from hookgraph.subgraphs.activations import JumpReLU
from hookgraph.subgraphs.dictionary import Autoencoder, Origin
from hookgraph.subgraphs.loading.files import Format, assembled

FILE = "params.npz"
_PLACES: Final[tuple[tuple[str, LocationType, LocationType], ...]] = (
    ("-transcoders", MLP_IN, MLP_OUT),
    ("-res", RESID_POST, RESID_POST),
    ("-mlp", MLP_OUT, MLP_OUT),
    ("-att", ATTN_Z, ATTN_Z),
)


def read(path: Path) -> Autoencoder:
    """f = JumpReLU(x W_enc + b_enc), x̂ = f W_dec + b_dec; nothing is taken from the input."""
    file = path / FILE if path.is_dir() else path
    stored = read_weights(file)
    weights = Weights(file, {re.sub("^w_", "W_", k.lower()): v for k, v in stored.items()})
    reads, writes = sites(file)
    return assembled(
        file,
        lambda: Autoencoder(
            weights["W_enc"],
            weights["W_dec"],
            weights["b_enc"],
            weights["b_dec"],
            activation=JumpReLU(weights["threshold"]),
            origin=Origin("Gemma Scope", reads, writes, _model(file)),
        ),
    )


def sites(path: Path) -> tuple[Location | None, Location | None]:
    """What it reads and writes, by names such as `gemma-scope-2b-pt-res/layer_20/width_16k/...`."""
    text = path.resolve().as_posix()
    if "/embedding/" in text:
        return EMBED, EMBED
    layer = re.search(r"layer_(\d+)", text)
    scope = re.search(r"gemma-scope[^/]*", text)
    for name, reads, writes in _PLACES:
        if layer is not None and scope is not None and name in scope[0]:
            return reads[int(layer[1])], writes[int(layer[1])]
    return None, None


def _model(path: Path) -> str:
    found = re.search(r"gemma-scope-(\d+b)-(pt|it)", path.resolve().as_posix())
    return "" if found is None else f"google/gemma-2-{found[1]}" + ("-it" if found[2] == "it" else "")


def _recognises(path: Path) -> bool:
    return (path / FILE).is_file() or path.suffix == ".npz"


FORMAT = Format("Gemma Scope", f"{FILE}", _recognises, read)
