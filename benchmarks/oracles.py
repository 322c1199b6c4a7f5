"""Dictionaries written by the libraries that train them, loaded here and compared with what those compute.

The libraries pin old versions of others, so that this takes two environments:

    python -m venv oracle && oracle/bin/pip install torch sae-lens eai-sparsify
    oracle/bin/pip install --no-deps dictionary-learning
    oracle/bin/python benchmarks/oracles.py write FOLDER
    python -m benchmarks.oracles compare FOLDER

`write` makes a random dictionary of every architecture, saves it in the library's own way, and keeps beside
it inputs, latents and reconstructions that the library computes. `compare` loads it with hookgraph.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

D_MODEL, LATENTS, OUT = 24, 96, 20
LIMIT = 1e-6
UNUSED = ("nnsight", "zstandard", "umap", "circuitsvis")
"""What dictionary_learning imports and neither saving nor computing needs; stood in for where missing."""

Written = tuple[str, Tensor, Tensor]
"""The name of a case, its latents and its reconstruction."""


# --- in the environment of the libraries -----------------------------------------------------------


def write(folder: Path) -> None:
    """Save every dictionary, and what it computes of the same inputs."""
    torch.manual_seed(0)
    x = 2 * torch.randn(4, 16, D_MODEL)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(x, folder / "inputs.pt")
    for library in (saelens, dictionary_learning, sparsify):
        with torch.no_grad():
            for name, latents, reconstruction in library(folder, x):
                torch.save({"latents": latents, "reconstruction": reconstruction}, folder / f"{name}.answers")
                print(f"wrote {name}")


def randomised(module: Any) -> Any:
    """The module with random parameters: biases and thresholds too, which start at zero."""
    for name, parameter in module.named_parameters():
        scale = parameter.shape[0] ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = scale * torch.randn_like(parameter)
        if "threshold" in name:
            parameter.data = parameter.data.abs() + 0.2
    return module


def saelens(folder: Path, x: Tensor) -> Iterator[Written]:
    """Every architecture registered with SAELens, with the options that change what it computes."""
    library: Any = importlib.import_module("sae_lens")
    registry: Any = importlib.import_module("sae_lens.registry")
    shape = {"d_in": D_MODEL, "d_sae": LATENTS}
    subtracting = ({"apply_b_dec_to_input": True}, {"apply_b_dec_to_input": False})
    normalised = ({"normalize_activations": "layer_norm"}, {"normalize_activations": "constant_norm_rescale"})
    temporal = {"n_heads": 2, "bottleneck_factor": 8, "kval_topk": 7}
    options: dict[str, tuple[dict[str, Any], ...]] = {
        "standard": (*subtracting, *normalised),
        "gated": subtracting,
        "jumprelu": (*subtracting, *normalised),
        "topk": tuple({"k": 7, "rescale_acts_by_decoder_norm": r} for r in (False, True)),
        "abstopk": tuple({"k": 7, "rescale_acts_by_decoder_norm": r} for r in (False, True)),
        "batchtopk": ({"k": 7},),
        "matryoshka_batchtopk": ({"k": 7, "matryoshka_widths": [32, LATENTS]},),
        "transcoder": ({"d_out": OUT, "apply_b_dec_to_input": False},),
        "skip_transcoder": ({"d_out": OUT, "apply_b_dec_to_input": False},),
        "jumprelu_transcoder": ({"d_out": OUT, "apply_b_dec_to_input": False},),
        "jumprelu_skip_transcoder": ({"d_out": OUT, "apply_b_dec_to_input": False},),
        "matching_pursuit": (
            *subtracting,
            *normalised,
            {"residual_threshold": 0.5, "max_iterations": 9},
            {"residual_threshold": 0.0, "max_iterations": 9, "stop_on_duplicate_support": False},
        ),
        "temporal": (
            *({**temporal, **one} for one in (*subtracting, *normalised)),
            {**temporal, "tied_weights": False, "n_attn_layers": 2},
            {**temporal, "sae_diff_type": "relu", "tied_weights": False, "apply_b_dec_to_input": False},
            {
                **temporal,
                "normalize_activations": "constant_scalar_rescale",
                "activation_normalization_factor": 0.7,
            },
        ),
    }
    known = {*registry.SAE_CLASS_REGISTRY, *registry.SAE_TRAINING_CLASS_REGISTRY}
    print(f"sae-lens {library.__version__}; not compared: {', '.join(sorted(known - set(options)))}")
    for architecture, cases in options.items():
        for i, extra in enumerate(cases):
            name = f"saelens-{architecture}-{i}"
            if architecture in registry.SAE_CLASS_REGISTRY:
                kind, config = registry.SAE_CLASS_REGISTRY[architecture]
                sae = randomised(kind(config(**shape, **extra)))
                sae.save_model(folder / name)
            else:
                kind, config = registry.SAE_TRAINING_CLASS_REGISTRY[architecture]
                trained = randomised(kind(config(**shape, **extra)))
                trained.topk_threshold = torch.tensor(0.4, dtype=torch.double)
                trained.save_inference_model(folder / name)
                sae = library.SAE.load_from_disk(folder / name)
            latents = sae.encode(x)
            whole = "skip" in architecture or architecture == "temporal"
            yield name, latents, sae(x) if whole else sae.decode(latents)


def dictionary_learning(folder: Path, x: Tensor) -> Iterator[Written]:
    """Every class that dictionary_learning's own loader knows."""
    for name in UNUSED:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock(name=name, __spec__=None, __path__=[])
    plain: Any = importlib.import_module("dictionary_learning.dictionary")
    trainers = {
        "AutoEncoderTopK": "top_k",
        "BatchTopKSAE": "batch_top_k",
        "MatryoshkaBatchTopKSAE": "matryoshka_batch_top_k",
    }
    for name in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", *trainers):
        module = plain
        if name in trainers:
            module = importlib.import_module(f"dictionary_learning.trainers.{trainers[name]}")
        extra: list[Any] = [7] if name in trainers else []
        if name == "MatryoshkaBatchTopKSAE":
            extra.append([32, LATENTS - 32])
        coder = randomised(getattr(module, name)(D_MODEL, LATENTS, *extra))
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            coder.threshold.fill_(0.4)
        place = folder / f"dictionary_learning-{name}"
        place.mkdir(exist_ok=True)
        torch.save(coder.state_dict(), place / "ae.pt")
        (place / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": 7}}))
        latents = coder.encode(x)
        yield place.name, latents, coder.decode(latents)


def sparsify(folder: Path, x: Tensor) -> Iterator[Written]:
    """Autoencoders and transcoders with both activations."""
    library: Any = importlib.import_module("sparsify")
    flat = x.flatten(0, -2)
    for name, extra in {
        "topk": {},
        "groupmax": {"activation": "groupmax"},
        "transcoder": {"transcode": True, "skip_connection": True},
    }.items():
        config = library.SparseCoderConfig(num_latents=LATENTS, k=8, **extra)
        coder = randomised(library.SparseCoder(D_MODEL, config))
        coder.save_to_disk(folder / f"sparsify-{name}")
        values, indices, _ = coder.encode(flat)
        latents = torch.zeros(len(flat), LATENTS).scatter(-1, indices, values)
        skip = 0 if coder.W_skip is None else flat @ coder.W_skip.mT
        reconstruction = latents @ coder.W_dec + coder.b_dec + skip
        shape = x.shape[:-1]
        yield f"sparsify-{name}", latents.unflatten(0, shape), reconstruction.unflatten(0, shape)


# --- in the environment of hookgraph ---------------------------------------------------------------


def compare(folder: Path) -> None:
    """Load every dictionary, and print by how much latents and reconstructions differ."""
    load_autoencoder: Callable[..., Any] = importlib.import_module("hookgraph.subgraphs").load_autoencoder
    x = torch.load(folder / "inputs.pt", weights_only=True)
    worst = 0.0
    for file in sorted(folder.glob("*.answers")):
        answers = torch.load(file, weights_only=True)
        autoencoder = load_autoencoder(file.with_suffix(""))
        latents = autoencoder.encode(x)
        found = {"latents": latents, "reconstruction": autoencoder.decode(latents, x)}
        gaps = {name: float((found[name] - answers[name]).abs().max()) for name in found}
        size = float(answers["latents"].abs().max())
        active = float((answers["latents"] != 0).float().sum(-1).mean())
        print(
            f"{file.stem:36} latents {gaps['latents']:.1e}  reconstruction {gaps['reconstruction']:.1e}"
            f"  (largest latent {size:.1f}, {active:.1f} active)"
        )
        worst = max(worst, *(gaps[n] / float(answers[n].abs().max()) for n in gaps))
    print(f"largest difference, relative to the largest number: {worst:.1e}")
    if worst > LIMIT:
        raise SystemExit(f"more than {LIMIT}")


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
