"""Path patching against two passes per sender, written by hand."""

import pytest
import torch
from torch import Tensor

from hookgraph.algorithms import path_patching
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.errors import HookGraphError, MetricError
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import (
    ATTN_K_IN,
    ATTN_OUT,
    ATTN_Q_IN,
    ATTN_V_IN,
    ATTN_Z,
    LOGITS,
    MLP_IN,
    MLP_OUT,
    MLP_POST,
    RESID_POST,
    RESID_PRE,
)
from hookgraph.ontology.locations import Location
from hookgraph_tests.families import FAMILIES, bound, tokens
from hookgraph_tests.toy import Coordinates, orthonormal, toy_graph, toy_of, toy_tokens

MEASURE = logit_diff([3, 4], 5)
OTHER = torch.tensor([[1, 3, 3], [0, 5, 2]])
SENDERS = {
    ATTN_Z[0].at(head=2): ATTN_OUT[0],
    ATTN_Z[1].at(head=3, pos=1): ATTN_OUT[1],
    MLP_OUT[0]: MLP_OUT[0],
    MLP_POST[1].at(pos=-1, d_mlp=[3, 7]): MLP_OUT[1],
    RESID_PRE[1]: None,
}
"""What sends, and the update that it goes into."""
RECEIVERS = {
    "queries of a head": [ATTN_Q_IN[2].at(head=1)],
    "keys and values": [ATTN_K_IN[2].at(kv_head=0), ATTN_V_IN[1].at(kv_head=1)],
    "all that a layer's heads read": [ATTN_Q_IN[2], ATTN_K_IN[2], ATTN_V_IN[2]],
    "what an MLP reads": [MLP_IN[2]],
    "what an MLP writes": [MLP_OUT[1].at(pos=-1)],
    "the stream": [RESID_POST[1].at(pos=2)],
    "the logits": [LOGITS],
    "heads of two layers": [ATTN_Q_IN[1].at(head=2), ATTN_Q_IN[2].at(head=0)],
}


def measured(graph: HookGraph, inputs: Inputs) -> Tensor:
    found = graph.run(inputs, metric=MEASURE).metric
    assert found is not None
    return found


def by_hand(graph: HookGraph, clean: Inputs, corrupt: Inputs, sender: Location, to: list[Location]) -> Tensor:
    updates = [x for x in graph.locations if x.type in (ATTN_OUT, MLP_OUT)]
    held, source = graph.run(clean, save=updates), graph.run(corrupt, save=[sender])
    reached = [x for x in to if sender.root.precedes(x.root)]
    first, seen = graph.hook(sender, lambda _: source[sender]), {}
    for place in reached:
        first = first.hook(place, lambda value, x=place: seen.update({x: value.clone()}))
    for update in updates:
        if sender.root.precedes(update) and update != SENDERS[sender]:
            first = first.hook(update, lambda _, x=update: held[x])
    assert first.run(clean).logits.isfinite().all()
    second = graph
    for place in reached:
        second = second.hook(place, lambda _, x=place: seen[x])
    return measured(second, clean) - measured(graph, clean)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded on the left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_paths_are_two_passes_by_hand(family: str, padded: bool):
    graph = bound(family, torch.float64)
    clean, corrupt = tokens(), tokens(seed=1)
    if padded and family != "gemma2":  # its own attention over padding is not a number in double precision
        mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
        clean, corrupt = ({"input_ids": x, "attention_mask": mask} for x in (clean, corrupt))
    for kind, receivers in RECEIVERS.items():
        found = path_patching(graph, clean, corrupt, MEASURE, list(SENDERS), receivers, batch_size=6)
        for sender in SENDERS:
            expected = by_hand(graph, clean, corrupt, sender, receivers)
            close = torch.allclose(found.effects[sender], expected, rtol=1e-9, atol=1e-12)
            assert close, f"{sender} to {kind}"


def test_senders_are_told_apart_along_axes():
    graph, clean, corrupt = bound("llama", torch.float64), tokens(), tokens(seed=1)
    senders = [ATTN_Z[0], ATTN_Z[1].at(head=[3, 1])]
    found = path_patching(graph, clean, corrupt, MEASURE, senders, [LOGITS], over=["head", "pos"])
    assert found.effects[ATTN_Z[0]].shape == (2, 6, 4)
    assert found.effects[senders[1]].shape == (2, 6, 2)
    alone = path_patching(graph, clean, corrupt, MEASURE, [ATTN_Z[1].at(head=1, pos=5)], [LOGITS])
    expected = alone.effects[ATTN_Z[1].at(head=1, pos=5)]
    assert torch.allclose(found.effects[senders[1]][:, 5, 1], expected, atol=1e-12)
    assert any(node.location == ATTN_Z[1].at(head=1, pos=5) for node in found.mean("batch").nodes())


def test_paths_of_the_toy_network_are_its_closed_form():
    graph, ids = toy_graph(), toy_tokens()
    metric = logit_diff(1, 2)
    direct = path_patching(graph, ids, OTHER, metric, [ATTN_OUT[0]], [LOGITS])
    toy = toy_of(graph)
    none = torch.zeros(7, dtype=torch.float64)
    clean, corrupt = (toy.closed_form(x, none) for x in (ids, OTHER))
    change = (corrupt[ATTN_OUT[0]] - clean[ATTN_OUT[0]])[:, -1]
    expected = change @ (toy.unembedding[:, 1] - toy.unembedding[:, 2])
    assert torch.allclose(direct.effects[ATTN_OUT[0]], expected, atol=1e-12)
    # To the last MLP: what it makes of the change of what it reads, and nothing else.
    by_mlp = path_patching(graph, ids, OTHER, metric, [ATTN_OUT[0]], [MLP_OUT[2]])
    before = (clean[RESID_PRE[2]] + clean[ATTN_OUT[2]])[:, -1]
    moved_by = ((before + change) @ toy.into[2]).square() - (before @ toy.into[2]).square()
    expected = moved_by @ toy.out[2] @ (toy.unembedding[:, 1] - toy.unembedding[:, 2])
    assert torch.allclose(by_mlp.effects[ATTN_OUT[0]], expected, atol=1e-12)


def test_only_layers_behind_the_sender_are_executed():
    graph, ids = toy_graph(), toy_tokens()
    toy = toy_of(graph)
    toy.executed.clear()
    path_patching(graph, ids, OTHER, logit_diff(1, 2), [ATTN_OUT[1], ATTN_OUT[2]], [LOGITS])
    assert toy.executed == [0, 1, 2, 0, 1, 2, 1, 2, 2]


def test_coordinates_of_a_subgraph_send():
    graph, ids = toy_graph(), toy_tokens()
    subspace = Coordinates(ATTN_OUT[0], "basis", orthonormal(4, 4))
    spliced = graph.inject(subspace)
    latents = subspace.locations[0]
    found = path_patching(spliced, ids, OTHER, logit_diff(1, 2), [latents], [LOGITS])
    whole = path_patching(graph, ids, OTHER, logit_diff(1, 2), [ATTN_OUT[0]], [LOGITS])
    assert torch.allclose(found.effects[latents], whole.effects[ATTN_OUT[0]], atol=1e-12)


def test_what_cannot_be_asked_is_refused():
    graph, ids = toy_graph(), toy_tokens()
    with pytest.raises(HookGraphError, match="no sender precedes a receiver"):
        path_patching(graph, ids, OTHER, MEASURE, [MLP_OUT[1]], [ATTN_OUT[0]])
    model = bound("gpt2", torch.float64)
    for late in (LOGITS, RESID_POST[1], MLP_OUT[1]):
        with pytest.raises(HookGraphError, match=r"all that receiver mlp\.in\[1\] does goes through"):
            path_patching(model, tokens(), tokens(seed=1), MEASURE, [ATTN_OUT[0]], [late, MLP_IN[1]])


def test_a_metric_that_is_no_number_on_a_path_names_example_and_sender():
    graph = bound("gpt2", torch.float64)
    clean, corrupt = tokens(), tokens(seed=1)
    lowest = graph.run(clean, metric=MEASURE).metric.min() - 1e-3  # pyright: ignore[reportOptionalMemberAccess]

    def root(logits: Tensor) -> Tensor:
        return (MEASURE(logits) - lowest).sqrt()

    with pytest.raises(MetricError, match=r"in example [01] where attn\.z\[0\] is patched"):
        path_patching(graph, clean, corrupt, root, [ATTN_Z[0]], [LOGITS], over=["head", "pos"])


def test_an_effect_along_a_path_is_exact_and_not_checked():
    found = path_patching(toy_graph(), toy_tokens(), OTHER, logit_diff(1, 2), [ATTN_OUT[0]], [LOGITS])
    with pytest.raises(HookGraphError, match="it is exact already, and a path is no node"):
        found.check()
