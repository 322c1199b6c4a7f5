"""Logits of some tokens only: those are right, and all others are 0."""

import pytest
import torch
from torch import nn

from hookgraph.binding.running.reading import _narrow  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_only_the_tokens_asked_for_are_computed(dtype: torch.dtype):
    torch.manual_seed(0)
    head, tokens = nn.Linear(8, 100, dtype=dtype), torch.tensor([[7, 3], [3, 99]])
    forward = _narrow(head, tokens)
    assert forward is not None
    x = torch.randn(2, 1, 8, dtype=dtype)
    given = x.clone().requires_grad_()
    found, whole = forward(given), head(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found[..., [3, 7, 99]], whole[..., [3, 7, 99]])
    assert int(found.count_nonzero()) == 2 * 3
    found[..., 3].sum().backward()  # pyright: ignore[reportUnknownMemberType]
    torch.testing.assert_close(given.grad, head.weight[3].expand(2, 1, -1))
