"""What the test run checks of every call: types, and axes that annotations share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.algorithms.bases.results import CausalBasis
from hookgraph.algorithms.copies import finite_metric
from hookgraph.algorithms.proximity import get_contributions
from hookgraph.locations import RESID_POST
from hookgraph_tests import checking
from hookgraph_tests.unchecked import unchecked

checked = checking.jaxtyped(typechecker=beartype)


@checked
def both(
    first: Float[Tensor, " pos"], second: Int[Tensor, " pos"], scale: float = 1.0
) -> Float[Tensor, "pos pos"]:
    return torch.zeros(len(first), len(first)) if scale else first[None]


@checked
def listed(values: dict[str, Float[Tensor, " pos"]], fn: Callable[[int], int] | None = None) -> int:
    return len(values)


@checked
def plain(number: int) -> str:
    return str(number) if number else number  # pyright: ignore[reportReturnType]


@checked
@dataclass(frozen=True)
class Pair:
    first: Float[Tensor, " pos"]
    second: Float[Tensor, " pos"]


@checked
def counted(stop: int) -> Iterator[int]:
    yield from range(stop)


A, B = torch.zeros(3), torch.ones(3, dtype=torch.long)


def test_what_fits_passes():
    assert both(A, B).shape == (3, 3)
    assert both(torch.zeros(2), second=B[:2]).shape == (2, 2)  # every call has axes of its own
    assert listed({"a": A}) == 1
    assert plain(3) == "3"
    assert Pair(A, A).first is A
    assert list(counted(2)) == [0, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: both(A, B[:2]),
        lambda: both(A, A),
        lambda: both(A, B, "1"),
        lambda: both(A, B, 0.0),
        lambda: listed({"a": A[None]}),
        lambda: plain("3"),
        lambda: plain(0),
        lambda: Pair(A, A[:2]),
        lambda: replace(Pair(A, A), second=B),
    ],
    ids=["axes", "dtype", "default", "returned axes", "nested", "type", "returned", "dataclass", "replaced"],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object]):
    with pytest.raises(BeartypeCallHintViolation):
        call()
    with unchecked():
        call()


def test_the_library_is_checked():
    assert jaxtyping.jaxtyped is checking.jaxtyped
    with pytest.raises(BeartypeCallHintViolation):
        CausalBasis(torch.zeros(4, 2), torch.zeros(3), RESID_POST[0])
    with pytest.raises(BeartypeCallHintViolation):
        finite_metric("run")  # pyright: ignore[reportArgumentType]
    with pytest.raises(BeartypeCallHintViolation):
        get_contributions(torch.zeros(2, 3), torch.zeros(3), "1")  # pyright: ignore[reportArgumentType]
