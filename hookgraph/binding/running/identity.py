"""Which model this is: a name, and a fingerprint of its configuration and of a few of its weights."""

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import torch
from transformers import PreTrainedModel

_LOOKED_AT: Final = 4
"""So many entries of each weight are looked at: training changes them in every weight that it moves."""


def identity(model: PreTrainedModel) -> Mapping[str, str]:
    """Name, revision and class: every run remembers them, and a configuration is slow to ask."""
    config: Any = model.config
    return {
        "model": str(getattr(config, "_name_or_path", "") or config.model_type),
        "revision": str(getattr(config, "_commit_hash", None) or ""),
        "class": type(model).__name__,
    }


def fingerprint(model: PreTrainedModel) -> str:
    """A short name of the configuration, and of some entries of every weight that is in memory."""
    found = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, weight in model.named_parameters():
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta" and weight.numel():
            flat = weight.detach().flatten()
            chosen = torch.linspace(0, len(flat) - 1, min(_LOOKED_AT, len(flat))).long()
            found.update(repr(flat[chosen.to(flat.device)].tolist()).encode())
    return found.hexdigest()[:16]
