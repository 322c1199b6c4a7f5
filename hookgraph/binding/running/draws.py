"""What a model draws at random in a pass: dropout and noise while it trains, or noise of its own."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

_DROPOUT = torch.nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage] (what all of them are)


def drawn_by(model: PreTrainedModel, run: Callable[[], object], device: torch.device) -> str:
    """What a pass of a model draws, empty if nothing. The generators are left as they were."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []), torch.no_grad():
        before = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else torch.empty(0)
        run()
        after = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else torch.empty(0)
    if all(map(torch.equal, before, after)):
        return ""
    return (_dropout(model) if model.training else "") or "random numbers of its own"


def _dropout(model: PreTrainedModel) -> str:
    """The first dropout with a rate, as a module or as a number of the configuration; empty without one."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    named = ((path, getattr(m, "p", 0.0)) for path, m in modules.items() if isinstance(m, _DROPOUT))
    numbers = ((k, v) for k, v in vars(model.config).items() if "drop" in k and isinstance(v, float))
    found = next(((name, rate) for name, rate in (*named, *numbers) if rate), None)
    return "" if found is None else f"dropout ({found[0]}, {found[1]:g})"
