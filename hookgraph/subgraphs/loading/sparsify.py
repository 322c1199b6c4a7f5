"""EleutherAI's sparsify: a folder with `cfg.json` and `sae.safetensors`."""

import re
from pathlib import Path

from hookgraph.graph.foreign import read_settings, read_weights
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import MLP_IN, MLP_OUT, RESID_POST
from hookgraph.subgraphs.activations import Activation, GroupMax, TopK
from hookgraph.subgraphs.dictionary import Autoencoder, Origin
from hookgraph.subgraphs.loading.files import Format, assembled, choose

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_HOOKPOINT = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(\.mlp)?$")


def read(path: Path) -> Autoencoder:
    """The k largest of each position; a transcoder reads x itself, an autoencoder x - b_dec."""
    config = read_settings(path / CONFIG)
    weights = read_weights(path / WEIGHTS)
    k = int(config.get("k", 32))
    kinds: dict[str, Activation] = {"topk": TopK(k), "groupmax": GroupMax(k)}
    activation = choose(path / CONFIG, "activation", config.get("activation", "topk"), kinds)
    transcodes = bool(config.get("transcode"))
    b_dec, skip = weights["b_dec"], weights.optional("W_skip")
    reads, writes = sites(path.name, transcodes=transcodes)
    return assembled(
        path,
        lambda: Autoencoder(
            weights["encoder.weight"].T,
            weights["W_dec"],
            weights["encoder.bias"],
            b_dec,
            b_in=None if transcodes else b_dec,
            W_skip=None if skip is None else skip.T,
            activation=activation,
            origin=Origin("sparsify", reads, writes, config=config),
        ),
    )


def sites(hookpoint: str, *, transcodes: bool) -> tuple[Location | None, Location | None]:
    """What it reads and writes, by the name of its folder: `layers.5` or `layers.5.mlp`."""
    found = _HOOKPOINT.search(hookpoint)
    if found is None:
        return None, None
    layer = int(found[1])
    writes = MLP_OUT[layer] if found[2] else RESID_POST[layer]
    return (MLP_IN[layer] if transcodes and found[2] else writes), writes


def _recognises(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


FORMAT = Format("sparsify", f"a folder with {CONFIG} and {WEIGHTS}", _recognises, read)
