"""`load_autoencoder`: a published dictionary, whatever tool wrote it."""

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from hookgraph.errors import LoadError
from hookgraph.subgraphs.dictionary import Autoencoder
from hookgraph.subgraphs.loading import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    openai,
    saelens,
    sparsify,
)
from hookgraph.subgraphs.loading.files import read_with

FORMATS = (
    saelens.FORMAT,
    sparsify.FORMAT,
    openai.FORMAT,
    dictionary_learning.FORMAT,
    gemma_scope.FORMAT,
    circuit_tracer.FORMAT,
)
"""Every format, in the order in which they are tried."""


def load_autoencoder(
    path_or_repo: str | Path,
    name: str = "",
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Autoencoder:
    """A dictionary from a folder, a file, or a repository on the hub.

    Files are of SAELens, sparsify, OpenAI, dictionary_learning, Gemma Scope or circuit-tracer; which, is
    told by what is there. Nothing in them is executed.

    Args:
        path_or_repo: a path, or the name of a repository on the hub, as in `google/gemma-scope-2b-pt-res`.
        name: the folder or file inside it, as in `layer_20/width_16k/average_l0_71`.
        revision: of the repository.
        dtype: of the weights; by default as they are stored.
        device: where to put them.

    Raises:
        LoadError: nothing there, an unknown format, or a damaged file: what was expected, and what found.
    """
    root = Path(path_or_repo)
    if not root.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_repo)):
        root = _downloaded(str(path_or_repo), name, revision)
    return read_with(FORMATS, root / name if name else root).to(device=device, dtype=dtype)


def _downloaded(repository: str, name: str, revision: str | None) -> Path:
    wanted = [name, f"{name}/*"] if name else None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise LoadError(
            f"{repository}: expected a path, or a repository on the hub; found neither: {error}"
        ) from error
