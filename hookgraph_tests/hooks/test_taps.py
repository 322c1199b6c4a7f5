import pytest
import torch
from torch import Tensor

from hookgraph.hooks.editing import Hook
from hookgraph.hooks.taps import Observer, Tap
from hookgraph.ontology.autoencoder import LATENTS
from hookgraph.ontology.dimensions import Dimension
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

    def see(self, value: Tensor, given: Location | None) -> None:
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
        observers=(Observer(log.see),),
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
        Tap(HERE, observers=(Observer(lambda value, given: None),)),
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
    reading, splicing = Tap(HERE, observers=(Observer(Log().see),)), Tap(HERE, splices=(Log().splice,))
    hooking = Tap(HERE, hooks=((HERE, torch.neg),))
    of_gradient = Tap(HERE, gradient_hooks=((HERE.grad, torch.neg),))
    assert [t.edits for t in (reading, splicing, hooking, of_gradient)] == [False, True, True, False]
    assert [t.tracks_gradient for t in (reading, of_gradient)] == [False, True]
    assert Tap(HERE, needs_gradient=True).tracks_gradient


# --- parts ------------------------------------------------------------------------------------

LATENT = LATENTS()


def code() -> Tensor:
    return torch.arange(10.0).view(1, 2, 5)


def seen(value: Tensor, given: Location | None) -> None:
    raise AssertionError("nothing is handed over here")


ASKED = {
    "nothing": (Tap(LATENT), ()),
    "hooks and saves": (
        Tap(
            LATENT,
            hooks=((LATENT.at(latent=3), torch.neg), (LATENT.at(latent=[0, 3], pos=1), torch.neg)),
            gradient_hooks=((LATENT.at(latent=1).grad, torch.neg),),
            observers=(Observer(seen, (LATENT.at(latent=[4]), LATENT.at(latent=0).grad)),),
        ),
        (0, 1, 3, 4),
    ),
    "a whole hook": (Tap(LATENT, hooks=((LATENT.at(pos=1), torch.neg),)), None),
    "a slice": (Tap(LATENT, hooks=((LATENT.at(latent=slice(0, 2)), torch.neg),)), None),
    "counted from the end": (Tap(LATENT, hooks=((LATENT.at(latent=[0, -1]), torch.neg),)), None),
    "a whole save": (Tap(LATENT, observers=(Observer(seen, (LATENT, LATENT.at(latent=1))),)), None),
    "an observer that does not say": (Tap(LATENT, observers=(Observer(seen),)), None),
    "a subgraph": (Tap(LATENT, splices=(lambda site, value: value,)), None),
}


@pytest.mark.parametrize(("tap", "expected"), ASKED.values(), ids=ASKED)
def test_a_tap_tells_of_which_indices_anything_is_asked(tap: Tap, expected: tuple[int, ...] | None):
    assert tap.asked(Dimension.LATENT) == expected


def test_a_part_that_holds_what_is_asked_does_as_well_as_the_whole():
    log = Log()
    tap = Tap(
        LATENT,
        hooks=((LATENT.at(latent=3), lambda x: x + 100), (LATENT.at(latent=[1, 3], pos=1), lambda x: 2 * x)),
        gradient_hooks=((LATENT.at(latent=1).grad, lambda g: 7 * g),),
        observers=(Observer(lambda value, given: log.append((str(given), value.detach().clone()))),),
    )
    held = [1, 3, 4]
    whole, part = code().requires_grad_(), code()[..., held].requires_grad_()
    given = LATENT.at(latent=held)
    out, out_part = tap(whole), tap(part, given)
    assert torch.equal(out[..., held], out_part)
    assert [name for name, _ in log] == ["None", str(given)]
    (gradient,) = torch.autograd.grad(out.sum(), whole)
    (gradient_part,) = torch.autograd.grad(out_part.sum(), part)
    assert torch.equal(gradient[..., held], gradient_part)
