"""Gradients at a location: make a value differentiable, let functions see and replace its gradient."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from hookgraph.errors import MetricError
from hookgraph.hooks.editing import Hook, apply_hook
from hookgraph.ontology.locations import Location


def differentiable(value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """`value`, made the start of the autograd graph if nothing before it needs gradients; not if it holds
    integers.
    """
    if not value.requires_grad and value.is_floating_point() and torch.is_grad_enabled():
        value.requires_grad_()
    return value


def hook_gradient(
    value: Shaped[Tensor, "..."], hooks: tuple[tuple[Location, Hook], ...], given: Location | None = None
) -> None:
    """Let `hooks`, in order, see and replace the gradient of `value`, the part `given` of an activation.

    Raises:
        MetricError: the value holds integers.
    """
    if not value.is_floating_point():
        raise MetricError(f"{hooks[0][0].whole} holds integers, so it has no gradient to hook")
    if not differentiable(value).requires_grad:
        return

    def on_gradient(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()  # autograd hands the same tensor to other branches of the backward pass
        for location, hook in hooks:
            gradient = apply_hook(location, hook, gradient, given)
        return gradient

    value.register_hook(on_gradient)  # pyright: ignore[reportUnknownMemberType]
