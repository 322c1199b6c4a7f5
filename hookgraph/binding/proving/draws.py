"""Random numbers that a model draws in evaluation, held still while it is proven.

A model may draw where nothing is trained: noise that it turns into sound, latents of a variational encoder,
an order of patches. What an edit does is told from what two passes differ in, so both must draw the same, and
so must all rows of a batch that differ in their edits only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.random import fork_rng
from torch.utils._python_dispatch import TorchDispatchMode

# fmt: off
_DRAWING: Final = frozenset(
    {
        "rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "normal", "normal_",
        "uniform_", "random_", "exponential_", "geometric_", "bernoulli", "bernoulli_", "multinomial",
        "poisson", "randperm"
    }
)
# fmt: on


@final
class HeldDraws(TorchDispatchMode):
    """Within this context every draw gives the numbers that it gave before, the same ones in every row.

    `count` tells how many draws there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ not in _DRAWING:
            return func(*args, **kwargs)
        self.count += 1
        sizes = [i for i, x in enumerate(args) if isinstance(x, (list, tuple)) and len(x) > 1]
        if sizes:
            count, *rest = args[sizes[0]]
            row = _seeded(func, (*args[: sizes[0]], [min(1, count), *rest], *args[sizes[0] + 1 :]), kwargs)
            return row.repeat(count, *[1] * len(rest)) if count else row
        first = args[0] if args else None
        if not isinstance(first, Tensor) or first.ndim < 2 or not len(first):
            return _seeded(func, args, kwargs)
        drawn = torch.cat([_seeded(func, _row(args, i, len(first)), kwargs) for i in range(len(first))])
        return first.copy_(drawn) if func._schema.is_mutable else drawn


def _row(args: Sequence[Any], number: int, count: int) -> tuple[Any, ...]:
    """The arguments for one row of `count`."""
    whole = [isinstance(x, Tensor) and x.ndim and len(x) == count for x in args]
    return tuple(x[number : number + 1] if by_row else x for x, by_row in zip(args, whole, strict=True))


def _seeded(func: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a function draws first of all; the generators are left as they were."""
    places = [x.device for x in args if isinstance(x, Tensor)]
    device = torch.device(kwargs.get("device") or (places[0] if places else "cpu"))
    if kwargs.get("generator") is not None:
        return func(*args, **{**kwargs, "generator": torch.Generator(device).manual_seed(0)})
    with fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        torch.manual_seed(0)
        return func(*args, **kwargs)
