"""The stories of the README about dictionaries, word for word, on every family."""

from typing import Any

import pytest
import torch

import hookgraph as hg
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import ATTN_Z, MLP_OUT
from hookgraph.subgraphs import Autoencoder
from hookgraph_tests.families import FAMILIES, STORY_SIZE, bound, tokens

STORIES = {
    6: """
sae = AutoencoderGraph(autoencoder, at=MLP_OUT[8]); run = graph.inject(sae).run(tokens, save=[sae.latents, sae.error])
""",  # noqa: E501
    7: """
logits = graph.inject(sae).hook(sae.latents.at(latent=123), torch.zeros_like).run(tokens).logits
""",
    8: """
scores = patching_effect(graph.inject(sae), clean, corrupt, metric, at=[*graph.every(ATTN_Z), sae.latents, sae.error])
""",  # noqa: E501
}
WIDTH = STORY_SIZE.heads * STORY_SIZE.d_head
DIRECTIONS = torch.nn.functional.normalize(
    torch.randn(160, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1
)


def told(graph: HookGraph, *stories: int) -> dict[str, Any]:
    """The names that stories leave behind."""
    names: dict[str, Any] = {
        "graph": graph,
        "autoencoder": Autoencoder(DIRECTIONS.T, DIRECTIONS),
        "tokens": tokens(),
        "clean": tokens(),
        "corrupt": tokens(seed=1),
        "metric": hg.metrics.logit_diff(5, 7),
        "AutoencoderGraph": hg.AutoencoderGraph,
        "patching_effect": hg.patching_effect,
        "MLP_OUT": MLP_OUT,
        "ATTN_Z": ATTN_Z,
        "torch": torch,
    }
    for story in stories:
        exec(STORIES[story], names)
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dictionary_is_injected_and_one_latent_edited(family: str):
    graph = bound(family, size=STORY_SIZE)
    names = told(graph, 6, 7)
    sae, run = names["sae"], names["run"]
    x = graph.run(tokens(), save=[MLP_OUT[8]])[MLP_OUT[8]]
    f = (x @ DIRECTIONS.T).relu()
    torch.testing.assert_close(run[sae.latents], f)
    torch.testing.assert_close(run[sae.error], x - f @ DIRECTIONS)
    assert torch.equal(run.logits, graph.run(tokens()).logits)
    moved = x - f[..., [123]] * DIRECTIONS[123]
    torch.testing.assert_close(names["logits"], graph.hook(MLP_OUT[8], lambda _: moved).run(tokens()).logits)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_attribution_over_heads_latents_and_errors(family: str):
    names = told(bound(family, size=STORY_SIZE), 6, 8)
    scores, sae = names["scores"], names["sae"]
    assert list(scores.effects)[-2:] == [sae.latents, sae.error]
    assert all(effect.isfinite().all() for effect in scores.effects.values())
