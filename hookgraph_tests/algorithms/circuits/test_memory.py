"""The memory of edges: that of active nodes, not of all that a dictionary has."""

import torch

from hookgraph.algorithms.circuits.direct import edges
from hookgraph.algorithms.effects.footprint import Footprint
from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.locations import MLP_OUT
from hookgraph.subgraphs import Autoencoder, AutoencoderGraph, TopK
from hookgraph_tests.families import bound, tokens

BATCH, POS, LATENTS, TARGETS = 32, 10, 32_768, 1000
METRIC = logit_diff(3, 5)
CLEAN, CORRUPT = tokens(BATCH, POS, seed=1), tokens(BATCH, POS, seed=2)


def coder(width: int, seed: int) -> Autoencoder:
    drawn = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(LATENTS, width, generator=drawn), dim=1)
    return Autoencoder(directions.T.clone(), directions, activation=TopK(8))


def test_edges_of_a_thousand_nodes_of_a_wide_dictionary_take_less_than_a_gigabyte():
    """Dense, the gradients of so many nodes would be 42 GB."""
    graph = bound("gpt2", torch.float32)
    width = graph.run(CLEAN, save=MLP_OUT[0])[MLP_OUT[0]].shape[-1]
    early, late = (AutoencoderGraph(coder(width, seed), MLP_OUT[seed]) for seed in (0, 1))
    graph = graph.inject(early, late)
    with Footprint() as alone:
        effect = patching_effect(graph, CLEAN, CORRUPT, METRIC, [late.latents]).effects[late.latents]
    threshold = float(effect.abs().flatten().topk(3 * TARGETS).values[-1])
    del effect

    with Footprint() as counted:
        found = edges(
            graph, CLEAN, CORRUPT, METRIC, early, late, node_threshold=threshold, aggregation="examples"
        )
    block = found[early.latents, late.latents]
    assert len(block.target.unique(dim=0)) >= TARGETS
    assert counted.peak < 1_000_000_000
    assert counted.peak < alone.peak + 8 * 4 * BATCH * POS * LATENTS, "a few times one dictionary's values"
    stored = sum(x.numel() * x.element_size() for x in (block.source, block.target, block.values))
    assert stored <= (2 * 3 * 8 + 4) * len(block)
