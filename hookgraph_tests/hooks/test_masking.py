"""What is masked gets a weight of zero, and a row that is masked altogether stays finite."""

import pytest
import torch

from hookgraph.hooks.masking import masked_cells, masked_score


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_masked_scores_stays_finite_in_a_softmax_in_single_precision(dtype: torch.dtype):
    row = torch.full((1, 4), masked_score(dtype), dtype=dtype)
    assert torch.equal(row.softmax(-1, dtype=torch.float32), torch.full((1, 4), 0.25))


@pytest.mark.parametrize("number", [masked_score(torch.float32), float("-inf"), -1e4])
def test_cells_that_a_softmax_ignores_are_masked(number: float):
    scores = torch.tensor([[[[1.0, number, -80.0]]]])
    assert masked_cells(scores).flatten().tolist() == [False, True, False]
    assert float(scores.softmax(-1)[0, 0, 0, 1]) == 0.0
