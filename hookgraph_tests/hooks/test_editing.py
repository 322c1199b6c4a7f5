from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hookgraph.errors import ShapeMismatchError
from hookgraph.hooks.editing import SetTo, apply_hook
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import ATTN_Z, RESID_POST

WHOLE, PART = RESID_POST[1], RESID_POST[1].at(pos=-1)


def stream() -> Tensor:
    return torch.arange(24.0).view(2, 3, 4)


@pytest.mark.parametrize("location", [WHOLE, PART, RESID_POST[1].at(pos=[0, 2])], ids=str)
@pytest.mark.parametrize("hook", [lambda x: None, lambda x: x], ids=["None", "itself"])
def test_a_hook_that_leaves_the_value_leaves_the_very_tensor(
    location: Location, hook: Callable[[Tensor], Tensor | None]
):
    value = stream()
    assert apply_hook(location, hook, value) is value


def test_a_hook_gets_its_part_and_replaces_only_that():
    seen: list[Tensor] = []

    def hook(x: Tensor) -> Tensor:
        seen.append(x)
        return -x

    value = stream()
    changed = apply_hook(PART, hook, value)
    assert torch.equal(seen[0], stream()[:, -1])
    assert torch.equal(changed[:, -1], -stream()[:, -1])
    assert torch.equal(changed[:, :-1], stream()[:, :-1])
    assert torch.equal(value, stream())


def test_a_replacement_of_the_whole_is_taken_as_it_is():
    new = torch.zeros(2, 3, 4)
    assert apply_hook(WHOLE, lambda _: new, stream()) is new


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "shape": (
        lambda x: x[:, :-1],
        r"the hook at resid.post\[1\]@pos=-1 was given \(2, 4\) float32 on cpu "
        r"and returned \(2, 3\) float32 on cpu; an edit keeps shape, dtype and device",
    ),
    "broadcastable shape": (lambda x: x[:1], r"returned \(1, 4\) float32"),
    "dtype": (lambda x: x.double(), r"returned \(2, 4\) float64 on cpu; an edit keeps shape, dtype"),
    "device": (lambda x: x.to("meta"), r"returned \(2, 4\) float32 on meta"),
    "number": (lambda x: 0.0, "returned float; return a tensor, or None to leave it"),
    "tuple": (lambda x: (x,), "returned tuple; return a tensor, or None to leave it"),
}


@pytest.mark.parametrize(("hook", "message"), WRONG.values(), ids=WRONG)
def test_a_replacement_that_does_not_fit_is_an_error(hook: Callable[[Tensor], Any], message: str):
    with pytest.raises(ShapeMismatchError, match=message):
        apply_hook(PART, hook, stream())


def test_an_error_of_the_hook_itself_comes_through():
    def hook(x: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        apply_hook(ATTN_Z[0], hook, torch.zeros(1, 1, 1, 1))


def test_a_location_is_set_to_a_value_that_stays_its_own():
    value = stream()
    new = apply_hook(WHOLE, SetTo(value), -stream())
    assert torch.equal(new, stream())
    new.requires_grad_()
    assert not value.requires_grad
    part = apply_hook(PART, SetTo(torch.zeros(2, 4)), stream())
    assert torch.equal(part[:, -1], torch.zeros(2, 4))
    assert torch.equal(part[:, :-1], stream()[:, :-1])


def test_a_value_of_another_shape_is_not_set():
    with pytest.raises(ShapeMismatchError, match="an edit keeps shape, dtype and device"):
        apply_hook(WHOLE, SetTo(torch.zeros(2, 4)), stream())
