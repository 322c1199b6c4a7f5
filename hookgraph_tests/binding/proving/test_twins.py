"""Copies of a model on which it is proven: in another precision, and with weights that show errors."""

import pytest
import torch
from torch import nn

from hookgraph.binding import bind
from hookgraph.binding.proving.twins import kernels_of, make_twin
from hookgraph.binding.resolving.examples import example_inputs
from hookgraph.ontology.transformer import ATTN_OUT, ENCODER
from hookgraph_tests.tiny import build


@pytest.mark.parametrize(
    "kernel",
    [
        nn.Conv1d(8, 16, 5, bias=False),
        nn.Conv2d(8, 16, 3, groups=4, bias=False),
        nn.ConvTranspose1d(32, 16, 6, stride=3, bias=False),
        nn.ConvTranspose2d(32, 16, 4, stride=2, groups=4, bias=False),
    ],
)
def test_a_kernel_of_its_share_neither_enlarges_nor_reduces_what_it_reads(kernel: nn.Conv1d):
    generator, weight = torch.Generator().manual_seed(0), kernel.weight
    given = torch.randn(4, kernel.in_channels, *[40] * (weight.ndim - 2), generator=generator)
    nn.init.normal_(weight, 0.0, kernels_of(kernel)[id(weight)] ** -0.5, generator=generator)
    with torch.no_grad():
        assert 0.8 < float(kernel(given).std()) < 1.25


def test_a_twin_has_in_its_precision_what_a_module_keeps_undeclared():
    model = build("base", "mimi")
    example = example_inputs(model)  # in this pass each codebook keeps a table
    twin, given = make_twin(model, example, torch.float64)
    assert twin(**given).audio_values.dtype == torch.float64
    assert model(**example).audio_values.dtype == torch.float32


def test_where_codes_cut_the_gradient_that_is_told():
    graph = bind(build("base", "mimi"), cached=False)
    assert ATTN_OUT[1] in graph.locations
    assert "as through integers" in graph.binding.why_absent(ENCODER.RESID_POST[0])
