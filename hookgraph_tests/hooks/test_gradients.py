import torch
from torch import Tensor

from hookgraph.hooks.gradients import differentiable, hook_gradient
from hookgraph.ontology.transformer import RESID_POST

HERE = RESID_POST[0]


def test_a_value_that_nothing_differentiates_becomes_a_leaf():
    value = torch.ones(1, 2, 3)
    assert differentiable(value) is value
    assert value.requires_grad
    assert value.is_leaf


def test_a_value_inside_the_autograd_graph_stays_what_it_is():
    value = torch.ones(1, 2, 3, requires_grad=True) * 2
    assert differentiable(value) is value
    assert not value.is_leaf


def test_no_gradient_is_asked_for_where_none_is_computed():
    value = torch.ones(1, 2, 3)
    with torch.no_grad():
        assert not differentiable(value).requires_grad
        hook_gradient(value, ((HERE.grad, torch.zeros_like),))
    assert not value.requires_grad


def test_hooks_see_and_replace_the_gradient_in_order():
    seen: list[float] = []

    def doubling(gradient: Tensor) -> Tensor:
        seen.append(float(gradient.sum()))
        return gradient * 2

    x = torch.ones(1, 2, 3, requires_grad=True)
    value = x * 1
    hook_gradient(value, ((HERE.grad, doubling), (HERE.grad.at(pos=0), doubling)))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert seen == [6, 6]
    assert gradient[0].tolist() == [[4, 4, 4], [2, 2, 2]]


def test_a_gradient_changed_in_place_is_that_of_its_own_value_only():
    x = torch.ones(1, 2, 3, requires_grad=True)
    left, right = x * 2, x * 5
    hook_gradient(left, ((HERE.grad, lambda gradient: gradient.zero_()),))
    (gradient,) = torch.autograd.grad((left + right).sum(), x)
    assert gradient.unique().tolist() == [5]


def test_a_gradient_hook_that_returns_none_changes_nothing():
    x = torch.ones(1, 2, 3, requires_grad=True)
    value = x * 1
    hook_gradient(value, ((HERE.grad, lambda gradient: None),))
    (gradient,) = torch.autograd.grad((3 * value).sum(), x)
    assert gradient.unique().tolist() == [3]
