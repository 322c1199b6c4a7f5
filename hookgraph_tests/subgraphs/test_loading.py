"""Files of every published format, written here by hand, load as what they say. `benchmarks/oracles.py`
compares with what the libraries themselves write and compute."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from hookgraph.errors import LoadError
from hookgraph.ontology.transformer import ATTN_Z, EMBED, MLP_IN, MLP_OUT, MLP_POST, RESID_MID, RESID_POST
from hookgraph.subgraphs.autoencoder import AutoencoderGraph
from hookgraph.subgraphs.loading import load_autoencoder, load_cross_layer_transcoder, load_crosscoder
from hookgraph.subgraphs.loading.gemma_scope import sites as gemma_sites
from hookgraph.subgraphs.loading.openai import site as openai_site
from hookgraph.subgraphs.loading.sparsify import sites as sparsify_sites
from hookgraph.subgraphs.transcoder import TranscoderGraph
from hookgraph_tests.unchecked import unchecked

D, F, K = 6, 20, 3
DRAWN = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAWN)


X = normal(2, 5, D)


def weights() -> dict[str, Tensor]:
    return {"W_enc": normal(D, F), "W_dec": normal(F, D), "b_enc": normal(F), "b_dec": normal(D)}


def top(pre: Tensor, k: int = K) -> Tensor:
    """The k largest of each position, by a threshold."""
    least = pre.relu().sort(-1, descending=True).values[..., k - 1 : k]
    return pre.relu() * (pre.relu() >= least)


def write_saelens(folder: Path, config: dict[str, Any], content: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in content.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, **config}))
    return folder


def agree(path: Path, latents: Tensor, reconstruction: Tensor) -> Any:
    found = load_autoencoder(path)
    torch.testing.assert_close(found.encode(X), latents)
    torch.testing.assert_close(found.decode(found.encode(X), X), reconstruction)
    assert not any(p.requires_grad for p in found.parameters())
    return found


# --- SAELens ----------------------------------------------------------------------------------


def test_saelens_of_today_with_its_site(tmp_path: Path):
    w, threshold = weights(), normal(F).abs()
    metadata = {"hook_name": "blocks.3.hook_mlp_out", "model_name": "gpt2"}
    config = {"architecture": "jumprelu", "apply_b_dec_to_input": True, "metadata": metadata}
    path = write_saelens(tmp_path / "sae", config, {**w, "threshold": threshold})
    pre = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = pre.relu() * (pre > threshold)
    found = agree(path, f, f @ w["W_dec"] + w["b_dec"])
    assert (found.origin.format, found.origin.reads, found.origin.model) == ("SAELens", MLP_OUT[3], "gpt2")
    assert AutoencoderGraph(found).site == MLP_OUT[3]
    assert load_autoencoder(tmp_path, "sae").n_latents == F
    assert load_autoencoder(path, dtype=torch.float64).W_dec.dtype == torch.float64


def test_saelens_before_version_6(tmp_path: Path):
    w = weights()
    config = {
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "hook_point": "blocks.2.attn.hook_z",
        "normalize_activations": None,
    }
    pre = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    path = write_saelens(tmp_path / "old", config, w)
    found = agree(path, top(pre), top(pre) @ w["W_dec"] + w["b_dec"])
    assert found.origin.reads == ATTN_Z[2]


def test_saelens_skip_transcoders_have_two_sites(tmp_path: Path):
    w, skip = weights(), normal(D, D)
    metadata = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    path = write_saelens(
        tmp_path / "t",
        {"architecture": "skip_transcoder", "apply_b_dec_to_input": False, "metadata": metadata},
        {**w, "W_skip": skip},
    )
    f = (X @ w["W_enc"] + w["b_enc"]).relu()
    found = agree(path, f, f @ w["W_dec"] + w["b_dec"] + X @ skip.T)
    transcoder = TranscoderGraph(found)
    assert (transcoder.read, transcoder.write) == (MLP_IN[1], MLP_OUT[1])


def test_saelens_matching_pursuit_has_one_matrix(tmp_path: Path):
    directions = torch.linalg.qr(normal(D, D)).Q.contiguous()
    bias = normal(D)
    config = {"architecture": "matching_pursuit", "residual_threshold": 0.0, "max_iterations": 2}
    path = write_saelens(tmp_path / "mp", config, {"W_dec": directions, "b_dec": bias})
    f = top((X - bias) @ directions.T, 2)
    found = agree(path, f, f @ directions + bias)
    assert not found.has_pre
    without = write_saelens(
        tmp_path / "no", {**config, "apply_b_dec_to_input": False}, {"W_dec": directions, "b_dec": bias}
    )
    f = top(X @ directions.T, 2)
    agree(without, f, f @ directions)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_saelens_temporal_expects_the_mean_of_what_was(tmp_path: Path, scale: float):
    """Queries of zeros attend to all alike; values and output are the identity."""
    W_dec, bias, zeros = normal(F, D), normal(D), torch.zeros(F)
    content = {"W_dec": W_dec, "b_dec": bias}
    for name, rows in {"q_target": 4, "k_ctx": 4, "v_ctx": F, "c_proj": F}.items():
        square = torch.eye(F) if rows == F else torch.zeros(rows, F)
        content |= {
            f"attn_layers.0.{name}.weight": square,
            f"attn_layers.0.{name}.bias": zeros[:rows].clone(),
        }
    config = {
        "architecture": "temporal", "n_heads": 2, "kval_topk": K, "normalize_activations":
        "constant_scalar_rescale", "activation_normalization_factor": scale,
    }  # fmt: skip
    path = write_saelens(tmp_path / "temporal", config, content)
    x = scale * X - bias
    codes = (x @ W_dec.T / (4 * D)).relu()
    towards = torch.zeros_like(x)
    for t in range(1, x.shape[1]):
        towards[:, t] = codes[:, :t].sum(1) / (t + 1) @ W_dec
    expected = (
        towards * (towards * x).sum(-1, keepdim=True) / (towards.norm(dim=-1, keepdim=True) + 1e-6) ** 2
    )
    f = top((x - expected) @ W_dec.T / (4 * D))
    agree(path, f, (f @ W_dec + bias + expected) / scale)


# --- the others -------------------------------------------------------------------------------


def test_dictionary_learning_with_and_without_a_configuration(tmp_path: Path):
    w = weights()
    state = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "b_dec": w["b_dec"],
        "k": torch.tensor(K),
        "threshold": torch.tensor(0.5),
    }
    torch.save(state, tmp_path / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "k": K, "layer": 4, "submodule_name": "resid_post_layer_4"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {**trainer, "lm_name": "m"}}))
    pre = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    found = agree(tmp_path, top(pre), top(pre) @ w["W_dec"] + w["b_dec"])
    assert (found.origin.reads, found.origin.model) == (RESID_POST[4], "m")
    (tmp_path / "plain").mkdir()
    plain = {k: v for k, v in state.items() if k not in ("b_dec", "k", "threshold")} | {"bias": w["b_dec"]}
    torch.save(plain, tmp_path / "plain" / "ae.pt")
    agree(tmp_path / "plain" / "ae.pt", pre.relu(), pre.relu() @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("name", ["ReLU", "TopK"])
def test_openai_normalises_with_top_k(tmp_path: Path, name: str):
    w = weights()
    state: dict[str, Any] = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "decoder.weight": w["W_dec"].T.contiguous(),
        "latent_bias": w["b_enc"],
        "pre_bias": w["b_dec"],
        "activation": name,
        "stats_last_nonzero": torch.zeros(F),
    }
    if name == "TopK":
        state["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
    path = tmp_path / "resid_delta_mlp_v5_32k" / "6.pt"
    path.parent.mkdir()
    torch.save(state, path)
    mean, deviation = X.mean(-1, keepdim=True), X.std(-1, keepdim=True)
    x = (X - mean) / (deviation + 1e-5) if name == "TopK" else X
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = top(pre) if name == "TopK" else pre.relu()
    hat = f @ w["W_dec"] + w["b_dec"]
    found = agree(path, f, hat * deviation + mean if name == "TopK" else hat)
    assert found.origin.reads == MLP_OUT[6]


def test_gemma_scope(tmp_path: Path):
    w, threshold = weights(), normal(F).abs()
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_7"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", threshold=threshold, **w)
    pre = X @ w["W_enc"] + w["b_enc"]
    f = pre.relu() * (pre > threshold)
    found = agree(folder, f, f @ w["W_dec"] + w["b_dec"])
    assert (found.origin.reads, found.origin.writes) == (MLP_IN[7], MLP_OUT[7])
    assert found.origin.model == "google/gemma-2-2b"


def test_sparsify(tmp_path: Path):
    w, skip = weights(), normal(D, D)
    folder = tmp_path / "layers.2.mlp"
    folder.mkdir()
    content = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"], "W_skip": skip}
    save_file({**content, "W_dec": w["W_dec"], "b_dec": w["b_dec"]}, folder / "sae.safetensors")
    config = {"k": K, "transcode": True, "activation": "topk", "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(config))
    pre = X @ w["W_enc"] + w["b_enc"]
    found = agree(folder, top(pre), top(pre) @ w["W_dec"] + w["b_dec"] + X @ skip.T)
    assert (found.origin.reads, found.origin.writes) == (MLP_IN[2], MLP_OUT[2])


@pytest.mark.parametrize("transposed", [False, True])
def test_circuit_tracer_in_either_orientation(tmp_path: Path, transposed: bool):
    w, threshold = weights(), normal(F).abs()
    content = {
        "W_enc": w["W_enc"].T.contiguous(),
        "W_dec": w["W_dec"].T.contiguous() if transposed else w["W_dec"],
        "b_enc": w["b_enc"],
        "b_dec": w["b_dec"],
        "activation_function.threshold": threshold,
    }
    save_file(content, tmp_path / "layer_5.safetensors")
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_name": "m", **hooks}))
    pre = X @ w["W_enc"] + w["b_enc"]
    f = pre.relu() * (pre > threshold)
    found = agree(tmp_path / "layer_5.safetensors", f, f @ w["W_dec"] + w["b_dec"])
    assert (found.origin.reads, found.origin.writes) == (RESID_MID[5], MLP_OUT[5])


def test_a_cross_layer_transcoder_is_one_folder(tmp_path: Path):
    W_enc, W_dec = [normal(F, D) for _ in range(2)], [normal(F, 2 - i, D) for i in range(2)]
    b_enc, b_dec = normal(2, F), normal(2, D)
    for i in range(2):
        encoder = {f"W_enc_{i}": W_enc[i], f"b_enc_{i}": b_enc[i].clone(), f"b_dec_{i}": b_dec[i].clone()}
        save_file(encoder, tmp_path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": W_dec[i]}, tmp_path / f"W_dec_{i}.safetensors")
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(hooks))
    found = load_cross_layer_transcoder(tmp_path)
    latents = [(X @ W_enc[i].T + b_enc[i]).relu() for i in range(2)]
    torch.testing.assert_close(found.encode(X, 1), latents[1])
    by_hand = latents[0] @ W_dec[0][:, 1] + latents[1] @ W_dec[1][:, 0] + b_dec[1]
    torch.testing.assert_close(found.decode(latents), by_hand)
    assert (found.reads, found.writes) == ((RESID_MID[0], RESID_MID[1]), (MLP_OUT[0], MLP_OUT[1]))


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_crosscoder_of_dictionary_learning(tmp_path: Path, prefix: str):
    content = {
        "encoder.weight": normal(2, D, F),
        "encoder.bias": normal(F),
        "decoder.weight": normal(2, F, D),
        "decoder.bias": normal(2, D),
    }
    torch.save({prefix + k: v for k, v in content.items()}, tmp_path / "ae.pt")
    x = normal(4, 2, D)
    f = (torch.einsum("bld,ldf->bf", x, content["encoder.weight"]) + content["encoder.bias"]).relu()
    found = load_crosscoder(tmp_path)
    torch.testing.assert_close(found.encode(x), f)
    hat = torch.einsum("bf,lfd->bld", f, content["decoder.weight"]) + content["decoder.bias"]
    torch.testing.assert_close(found.decode(f), hat)


def test_sites_are_told_by_names():
    gemma = Path("/hub/models--google--gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_9/params.npz")
    assert gemma_sites(gemma) == (ATTN_Z[3], ATTN_Z[3])
    assert gemma_sites(Path("/x/gemma-scope-2b-pt-res/embedding/width_4k/params.npz")) == (EMBED, EMBED)
    assert gemma_sites(Path("/x/params.npz")) == (None, None)
    assert openai_site(Path("gpt2-small/mlp_post_act/autoencoders/11.pt")) == MLP_POST[11]
    assert openai_site(Path("ae.pt")) is None
    assert sparsify_sites("layers.5", transcodes=False) == (RESID_POST[5], RESID_POST[5])
    assert sparsify_sites("h.5.mlp", transcodes=False) == (MLP_OUT[5], MLP_OUT[5])
    assert sparsify_sites("embed_tokens", transcodes=False) == (None, None)


# --- what cannot be loaded --------------------------------------------------------------------


class Code:
    """Pickled, it would be called on loading."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (print, ("executed",))


def damaged_safetensors(folder: Path) -> Path:
    write_saelens(folder / "sae", {}, weights())
    (folder / "sae" / "sae_weights.safetensors").write_bytes(b"\x00" * 20)
    return folder / "sae"


def code(folder: Path) -> Path:
    torch.save({"bias": Code()}, folder / "ae.pt")
    return folder


def of_shape(folder: Path) -> Path:
    return write_saelens(folder / "sae", {}, {**weights(), "b_enc": normal(F + 1)})


def of_architecture(folder: Path) -> Path:
    return write_saelens(folder / "sae", {"architecture": "spatial"}, weights())


def of_attention(folder: Path) -> Path:
    names = ("q_target", "k_ctx", "v_ctx", "c_proj")
    content = {f"attn_layers.0.{n}.weight": normal(F, F + 1) for n in names}
    content |= {f"attn_layers.0.{n}.bias": normal(F) for n in names}
    settings = {"architecture": "temporal", "n_heads": 2}
    return write_saelens(folder / "sae", settings, {**weights(), **content})


def without_output(folder: Path) -> Path:
    content = {f"attn_layers.0.{n}.weight": normal(F, F) for n in ("q_target", "k_ctx", "v_ctx")}
    content |= {f"attn_layers.0.{n}.bias": normal(F) for n in ("q_target", "k_ctx", "v_ctx")}
    settings = {"architecture": "temporal", "n_heads": 2}
    return write_saelens(folder / "sae", settings, {**weights(), **content})


def of_rounds(folder: Path) -> Path:
    settings = {"architecture": "matching_pursuit", "max_iterations": "many"}
    return write_saelens(folder / "sae", settings, weights())


def of_no_rounds(folder: Path) -> Path:
    settings = {"architecture": "matching_pursuit", "max_iterations": 0}
    return write_saelens(folder / "sae", settings, weights())


def without_decoder(folder: Path) -> Path:
    found = weights()
    del found["W_dec"]
    return write_saelens(folder / "sae", {}, found)


def broken_settings(folder: Path) -> Path:
    path = write_saelens(folder / "sae", {}, weights())
    (path / "cfg.json").write_text("{")
    return path


def truncated(folder: Path) -> Path:
    (folder / "ae.pt").write_bytes(b"PK\x03\x04 and no more")
    return folder


def objects(folder: Path) -> Path:
    np.savez(folder / "params.npz", W_enc=np.array([Code()], dtype=object))
    return folder


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda folder: folder / "sea", "sea: expected a dictionary, found no such file"),
    "empty": (lambda folder: folder, r"expected one of \(SAELens: a folder with .*found: an empty folder"),
    "damaged": (damaged_safetensors, "expected tensors in a .safetensors file, found: "),
    "code": (code, "expected tensors, found something that could be code"),
    "objects": (objects, "expected tensors in a .npz file, found: Object arrays cannot be loaded"),
    "truncated": (truncated, "expected tensors in a .pt file, found: "),
    "shapes": (of_shape, r"expected weights that fit each other, found: b_enc has shape \(21,\)"),
    "architecture": (of_architecture, "expected architecture to be one of standard, .*, found 'spatial'"),
    "attention": (
        of_attention,
        r"expected weights that fit each other, found: a projection has shape \(20, 21\)",
    ),
    "output": (without_output, r"expected one output projection in attn_layers\.0\.\*, found none"),
    "rounds": (of_rounds, "expected settings that are numbers, found: "),
    "no rounds": (
        of_no_rounds,
        "expected settings that make a dictionary, found: rounds=0: matching pursuit",
    ),
    "missing": (without_decoder, "expected a tensor 'W_dec', found W_enc, b_dec, b_enc"),
    "settings": (broken_settings, "cfg.json: expected settings, found: "),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_loaded_is_told_with_what_was_expected(
    make: Callable[[Path], Path], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = make(tmp_path)
    with unchecked(), pytest.raises(LoadError, match=message):
        load_autoencoder(path)
    assert capsys.readouterr().out == "", "nothing was executed"


def test_a_repository_that_is_not_there_is_an_error():
    with pytest.raises(LoadError, match="nobody/nothing: expected a path, or a repository on the hub"):
        load_autoencoder("nobody/nothing")


def test_a_folder_without_a_cross_layer_transcoder_is_an_error(tmp_path: Path):
    with pytest.raises(LoadError, match=r"expected W_enc_0.safetensors, .*, found none"):
        load_cross_layer_transcoder(tmp_path)
