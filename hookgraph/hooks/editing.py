"""Call a user's hook on the part of an activation that it was registered for."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from jaxtyping import Shaped
from torch import Tensor

from hookgraph.errors import ShapeMismatchError
from hookgraph.hooks.slicing import read, relative, write
from hookgraph.ontology.locations import Location

Hook = Callable[[Tensor], Tensor | None]
"""What a user registers: gets the tensor, returns a replacement, or None to leave it."""


@final
@dataclass(frozen=True, eq=False, slots=True)
class SetTo:
    """A hook: a location has this value, whatever it is given.

    What stands there otherwise need not be computed: a dictionary whose latents and error are set encodes
    nothing.
    """

    value: Shaped[Tensor, "..."]

    def __call__(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The value, as a tensor of its own: gradients may be asked for there."""
        return self.value.view_as(self.value)


def apply_hook(
    location: Location,
    hook: Hook,
    value: Shaped[Tensor, "..."],
    given: Location | None = None,
    name: Location | None = None,
) -> Shaped[Tensor, "..."]:
    """`value` after `hook` was given the part that `location` names; `value` itself if unchanged.

    With `given`, `value` is no more than that part of the activation. A hook that changes its tensor in
    place, and returns it or None, has edited it too. `name` is what the user calls the part.

    Raises:
        ShapeMismatchError: the hook returned no tensor, or one of another shape, dtype or device.
    """
    here = location if given is None else relative(location, given)
    part = read(here, value)
    version = _version(part)
    new = hook(part)
    if new is None or new is part:
        if version is not None and _version(part) == version:
            return value
        # Changed in place: told by another tensor, because the part may be a copy.
        new = part.view_as(part)
    if not isinstance(new, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] (users' code)
        raise ShapeMismatchError(
            f"the hook at {name or location} returned {type(new).__name__}; return a tensor, or None to "
            "leave it"
        )
    if new.shape != part.shape or new.dtype != part.dtype or new.device != part.device:
        raise ShapeMismatchError(
            f"the hook at {name or location} was given {_describe(part)} and returned {_describe(new)}; "
            "an edit keeps shape, dtype and device"
        )
    return write(here, value, new)


def hook_apart(hook: Callable[..., Any], held: Callable[[Tensor], bool]) -> Callable[..., Any]:
    """`hook`, given a copy of a tensor of which `held` says that its memory is not to change."""
    return partial(_called_apart, hook, held)


def _called_apart(hook: Callable[..., Any], held: Callable[[Tensor], bool], value: Tensor, *told: Any) -> Any:
    # What a user's hook returns is checked where it is written back.
    if not held(value):
        return hook(value, *told)
    copy = value.clone()
    version = _version(copy)
    new = hook(copy, *told)
    unchanged = version is not None and _version(copy) == version
    return (None if unchanged else copy) if new is None or new is copy else new


def shares_memory(value: Shaped[Tensor, "..."], others: Iterable[Tensor]) -> bool:
    """Whether a tensor lies in the memory of one of the others."""
    memory = value.untyped_storage().data_ptr()
    return any(other.untyped_storage().data_ptr() == memory for other in others)


def _version(value: Tensor) -> int | None:
    """How often a tensor was changed in place; None where PyTorch does not count."""
    return None if value.is_inference() else value._version  # pyright: ignore[reportPrivateUsage]


def _describe(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
