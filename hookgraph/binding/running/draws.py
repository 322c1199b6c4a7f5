"""What a model draws at random while it runs in training mode."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedConfig

_DROPOUT = torch.nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage] (what all of them are)


def dropout(modules: Mapping[str, nn.Module], config: PreTrainedConfig) -> str:
    """The first dropout with a rate, as a module or as a number of the configuration; empty without one."""
    named = ((path, getattr(m, "p", 0.0)) for path, m in modules.items() if isinstance(m, _DROPOUT))
    numbers = ((k, v) for k, v in vars(config).items() if "drop" in k and isinstance(v, float))
    found = next(((name, rate) for name, rate in (*named, *numbers) if rate), None)
    return "" if found is None else f"dropout ({found[0]}, {found[1]:g})"
