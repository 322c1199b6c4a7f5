"""Any module at a location."""

import pytest
import torch
from torch import Tensor, nn

from hookgraph.errors import ShapeMismatchError, SubgraphError
from hookgraph.ontology.transformer import LOGITS, MLP_OUT, RESID_PRE
from hookgraph.subgraphs.module import ModuleGraph, OutputUse
from hookgraph_tests.toy import toy_graph, toy_tokens
from hookgraph_tests.unchecked import unchecked

IDS = toy_tokens()
SITE = MLP_OUT[1]
PLAIN = toy_graph()
MODULE = nn.Linear(4, 4).double().requires_grad_(False)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


@pytest.mark.parametrize("output", ["read", "added", "replacing"])
def test_its_output_is_a_location_and_goes_on_as_said(output: OutputUse):
    subgraph = ModuleGraph(MODULE, SITE, output)
    graph = PLAIN.inject(subgraph)
    run = graph.run(IDS, save=[SITE, subgraph.output, LOGITS])
    y = MODULE(run[SITE])
    torch.testing.assert_close(run[subgraph.output], y)
    goes_on = {"read": run[SITE], "added": run[SITE] + y, "replacing": y}[output]
    expected = PLAIN.hook(SITE, lambda _: goes_on).run(IDS).logits
    torch.testing.assert_close(run.logits, expected)
    torch.testing.assert_close(graph.run(IDS).logits, expected)


def test_it_may_read_elsewhere_and_is_differentiated():
    subgraph = ModuleGraph(MODULE, SITE, "replacing", read=RESID_PRE[1])
    graph = PLAIN.inject(subgraph)
    run = graph.run(IDS, save=[RESID_PRE[1], subgraph.output, subgraph.output.grad], metric=metric)
    torch.testing.assert_close(run[subgraph.output], MODULE(run[RESID_PRE[1]]))
    direction = torch.randn_like(run[subgraph.output])
    ends = [
        graph.hook(subgraph.output, lambda y, s=s: y + s * 1e-6 * direction).run(IDS, metric=metric).metric
        for s in (1, -1)
    ]
    expected = (run[subgraph.output.grad] * direction).flatten(1).sum(1)
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, expected, rtol=1e-6, atol=1e-8)


def test_what_makes_no_sense_is_an_error():
    with unchecked(), pytest.raises(SubgraphError, match="output='add' is unknown: did you mean"):
        ModuleGraph(MODULE, SITE, "add")
    with pytest.raises(SubgraphError, match=r"reads before it writes: mlp.out\[1\] is not before resid.pre"):
        ModuleGraph(MODULE, RESID_PRE[1], read=SITE)
    probe = ModuleGraph(nn.Linear(4, 2).double(), SITE)
    with pytest.raises(SubgraphError, match="is read by nothing"):
        PLAIN.inject(probe).hook(probe.output, torch.zeros_like).run(IDS)
    narrow = ModuleGraph(nn.Linear(4, 2).double(), SITE, "added")
    with pytest.raises(ShapeMismatchError, match=r"returns \(2, 3, 2\), the value at mlp.out\[1\] has shape"):
        PLAIN.inject(narrow).run(IDS)
