"""circuit-tracer: a transcoder in one `.safetensors` file, or a cross-layer transcoder in a folder."""

import re
from pathlib import Path
from typing import Any

from hookgraph.errors import LoadError
from hookgraph.graph.foreign import read_settings, read_weights
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs.activations import Activation, JumpReLU, ReLU
from hookgraph.subgraphs.dictionary import Autoencoder, Origin
from hookgraph.subgraphs.loading.files import Format, assembled, located
from hookgraph.subgraphs.transcoder import CrossLayerTranscoder

CONFIG = "config.yaml"
_THRESHOLD = "activation_function.threshold"


def read(path: Path) -> Autoencoder:
    """f = act(x W_enc + b_enc), ŷ = f W_dec + b_dec + x W_skip; matrices are stored in either orientation."""
    weights = read_weights(path)
    latents, width = len(weights["b_enc"]), len(weights["b_dec"])
    threshold, skip = weights.optional(_THRESHOLD), weights.optional("W_skip")
    activation: Activation = ReLU() if threshold is None else JumpReLU(threshold)
    reads, writes, config = sites(path)
    return assembled(
        path,
        lambda: Autoencoder(
            # Square ones are stored (latent, d_model), as the tool writes them today.
            weights.oriented("W_enc", latents, width).T,
            weights.oriented("W_dec", latents, width),
            weights["b_enc"],
            weights["b_dec"],
            W_skip=None if skip is None else skip.T,
            activation=activation,
            origin=Origin("circuit-tracer", reads, writes, str(config.get("model_name", "")), config),
        ),
    )


def sites(path: Path) -> tuple[Location | None, Location | None, dict[str, Any]]:
    """What it reads and writes, by the number in its name and the configuration beside it."""
    config = read_settings(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else {}
    number = re.search(r"\d+", path.stem)
    if number is None:
        return None, None, config
    layer = int(number[0])
    return _hook(config, "input", layer), _hook(config, "output", layer), config


def load_cross_layer_transcoder(path: str | Path) -> CrossLayerTranscoder:
    """A folder with `W_enc_0.safetensors`, `W_dec_0.safetensors` and so on, one pair for each layer.

    Raises:
        LoadError: there are none, or they are damaged.
    """
    folder = Path(path)
    count = len(list(folder.glob("W_enc_*.safetensors"))) if folder.is_dir() else 0
    if not count:
        raise LoadError(f"{folder}: expected W_enc_0.safetensors, W_dec_0.safetensors, ..., found none")
    encoders = [read_weights(folder / f"W_enc_{i}.safetensors") for i in range(count)]
    decoders = [read_weights(folder / f"W_dec_{i}.safetensors")[f"W_dec_{i}"] for i in range(count)]
    activations: list[Activation] = []
    for i, weights in enumerate(encoders):
        threshold = weights.optional(f"threshold_{i}")
        activations.append(ReLU() if threshold is None else JumpReLU(threshold))
    config = read_settings(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return CrossLayerTranscoder(
        [w[f"W_enc_{i}"].T for i, w in enumerate(encoders)],
        decoders,
        [w[f"b_enc_{i}"] for i, w in enumerate(encoders)],
        [w[f"b_dec_{i}"] for i, w in enumerate(encoders)],
        activations=activations,
        reads=[_hook(config, "input", i) for i in range(count)],
        writes=[_hook(config, "output", i) for i in range(count)],
    )


def _hook(config: dict[str, Any], side: str, layer: int) -> Location | None:
    name = str(config.get(f"feature_{side}_hook") or "")
    return located(f"blocks.{layer}.{name}") if name else None


def _recognises(path: Path) -> bool:
    return path.suffix == ".safetensors" and {"W_enc", "W_dec", "b_enc", "b_dec"} <= set(read_weights(path))


FORMAT = Format("circuit-tracer", "a .safetensors file with W_enc, W_dec, b_enc and b_dec", _recognises, read)
