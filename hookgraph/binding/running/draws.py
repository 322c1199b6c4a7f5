"""What a model draws at random in a pass: dropout and noise while it trains, or noise of its own."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PreTrainedConfig

_DROPOUT = torch.nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage] (what all of them are)


def drawn_by(run: Callable[[], object], device: torch.device) -> bool:
    """Whether some work draws random numbers. The generators are left as they were."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []), torch.no_grad():
        before = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else torch.empty(0)
        run()
        after = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else torch.empty(0)
    return not all(map(torch.equal, before, after))


def dropout(modules: Mapping[str, nn.Module], config: PreTrainedConfig) -> str:
    """The first dropout with a rate, as a module or as a number of the configuration; empty without one."""
    named = ((path, getattr(m, "p", 0.0)) for path, m in modules.items() if isinstance(m, _DROPOUT))
    numbers = ((k, v) for k, v in vars(config).items() if "drop" in k and isinstance(v, float))
    found = next(((name, rate) for name, rate in (*named, *numbers) if rate), None)
    return "" if found is None else f"dropout ({found[0]}, {found[1]:g})"
