import pytest
import torch
from torch import Tensor

from hookgraph.hooks.editing import Hook
from hookgraph.hooks.taps import Tap
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import RESID_POST

HERE = RESID_POST[0]


def stream() -> Tensor:
    return torch.ones(1, 2, 3)


class Log(list[tuple[str, Tensor]]):
    """Who was called, in order, and with what."""

    def hook(self, name: str, factor: float = 1.0) -> Hook:
        def called(x: Tensor) -> Tensor:
            self.append((name, x.detach().clone()))
            return x * factor

        return called

    def observer(self, value: Tensor) -> None:
        self.append(("save", value.detach().clone()))

    def splice(self, site: Location, value: Tensor) -> Tensor:
        self.append((f"splice {site}", value.detach().clone()))
        return value + 100

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self]

    def value(self, name: str) -> float:
        """The number that all entries of the tensor had which `name` was called with."""
        (found,) = (tensor for called, tensor in self if called == name)
        assert (found == found.flatten()[0]).all()
        return float(found.flatten()[0])


def test_events_happen_in_the_documented_order():
    log = Log()
    tap = Tap(
        HERE,
        hooks=((HERE, log.hook("first", 2.0)), (HERE, log.hook("second", 3.0))),
        gradient_hooks=((HERE.grad, log.hook("gradient", 5.0)), (HERE.grad, log.hook("again"))),
        observers=(log.observer,),
        splices=(log.splice,),
    )
    x = stream().requires_grad_()
    (gradient,) = torch.autograd.grad((7 * tap(x)).sum(), x)
    assert log.names == ["first", "second", "save", f"splice {HERE}", "gradient", "again"]
    assert [log.value(name) for name in log.names] == [1, 2, 6, 6, 7, 35]
    assert gradient.unique().tolist() == [7 * 5 * 2 * 3]


def test_gradient_hooks_see_the_gradient_of_the_final_hooked_value():
    log = Log()
    tap = Tap(
        HERE,
        hooks=((HERE, lambda x: x.square()),),
        gradient_hooks=((HERE.grad, log.hook("gradient")),),
    )
    x = (3 * stream()).requires_grad_()
    (gradient,) = torch.autograd.grad(tap(x).sum(), x)
    assert log.value("gradient") == 1, "not the gradient before the hook, which is 6"
    assert gradient.unique().tolist() == [6]


@pytest.mark.parametrize(
    "tap",
    [
        Tap(HERE),
        Tap(HERE, observers=(lambda value: None,)),
        Tap(HERE, hooks=((HERE, lambda value: None),)),
        Tap(HERE, gradient_hooks=((HERE.grad, lambda value: None),)),
        Tap(HERE, needs_gradient=True),
    ],
    ids=["nothing", "save", "reading hook", "gradient hook", "gradient"],
)
def test_where_nothing_is_replaced_the_very_tensor_goes_on(tap: Tap):
    value = stream()
    assert tap(value) is value


def test_a_tap_tells_what_a_binding_has_to_provide():
    reading, splicing = Tap(HERE, observers=(Log().observer,)), Tap(HERE, splices=(Log().splice,))
    hooking = Tap(HERE, hooks=((HERE, torch.neg),))
    of_gradient = Tap(HERE, gradient_hooks=((HERE.grad, torch.neg),))
    assert [t.edits for t in (reading, splicing, hooking, of_gradient)] == [False, True, True, False]
    assert [t.tracks_gradient for t in (reading, of_gradient)] == [False, True]
    assert Tap(HERE, needs_gradient=True).tracks_gradient
