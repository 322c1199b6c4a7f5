"""A line of latents and errors is walked at the site of their dictionary, with the same gradients."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.algorithms.sites import Contrast
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import ATTN_Z, MLP_IN, MLP_OUT, RESID_POST
from hookgraph.subgraphs import Autoencoder, AutoencoderGraph, ModuleGraph, TranscoderGraph
from hookgraph.subgraphs.dictionary import Normalisation
from hookgraph.subgraphs.splicing import ErrorTerm, SpliceGradient
from hookgraph_tests.families import bound, tokens
from hookgraph_tests.subgraphs.planted import planted

MEASURE = logit_diff(3, 5)
CLEAN, CORRUPT = tokens(), tokens(seed=1)
SITE = MLP_OUT[1]

Choice = Callable[[AutoencoderGraph], list[Location]]
CHOICES: dict[str, Choice] = {
    "both": lambda s: [s.latents, s.error],
    "latents": lambda s: [s.latents],
    "error": lambda s: [s.error],
}


def gpt2() -> HookGraph:
    return bound("gpt2", torch.float64)


def carrier(graph: HookGraph, *places: Location) -> Location | None:
    """Where the clean and corrupt inputs' line between these places is walked."""
    return Contrast.with_entries(graph, CLEAN, CORRUPT, MEASURE, places).carrier(places)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("site", [SITE, ATTN_Z[0], RESID_POST[0]], ids=str)
@pytest.mark.parametrize("normalisation", ["none", "layer norm"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_line_walked_at_the_site_has_the_gradients_of_one_in_the_dictionary(
    family: str, normalisation: Normalisation, site: Location, choice: str
):
    dictionary = planted(32, 96)
    dictionary = Autoencoder(
        dictionary.W_enc, dictionary.W_dec, dictionary.b_enc, dictionary.b_dec, normalisation=normalisation
    )
    walked, inside = (AutoencoderGraph(dictionary, site, splice_gradient=x) for x in ("identity", "frozen"))
    graph, places = bound(family, torch.float64), CHOICES[choice](walked)
    assert carrier(graph.inject(walked), *places) == site
    assert carrier(graph.inject(inside), *places) is None
    got, expected = (
        patching_effect(graph.inject(x), CLEAN, CORRUPT, MEASURE, places, "ig", steps=4)
        for x in (walked, inside)
    )
    for place in places:
        for a, b in ((got.effects, expected.effects), (got.grads, expected.grads)):
            assert torch.allclose(a[place], b[place], rtol=1e-9, atol=1e-12)
        assert torch.allclose(got.residuals[place], expected.residuals[place], rtol=1e-9, atol=1e-12)
        assert float(got.effects[place].abs().max()) > 1e-6


def test_there_is_one_copy_of_the_latents_however_many_steps_are_taken():
    sae = AutoencoderGraph(planted(32, 96), SITE)
    places = [sae.latents, sae.error]
    with patch.object(Autoencoder, "decode", autospec=True, side_effect=Autoencoder.decode) as decode:
        patching_effect(gpt2().inject(sae), CLEAN, CORRUPT, MEASURE, places, "ig", steps=16)
    assert {len(call.args[1]) for call in decode.call_args_list} == {len(CLEAN)}


@pytest.mark.parametrize(("gradient", "error"), [("identity", "detached"), ("reconstruction", "kept")])
def test_a_line_is_walked_inside_where_another_gradient_was_chosen(
    gradient: SpliceGradient, error: ErrorTerm
):
    sae = AutoencoderGraph(planted(32, 96), SITE, splice_gradient=gradient, error=error)
    assert carrier(gpt2().inject(sae), sae.latents) is None


def test_a_line_is_walked_inside_where_anything_else_happens_at_the_site():
    sae = AutoencoderGraph(planted(32, 96), SITE)
    beside = AutoencoderGraph(planted(32, 50, seed=3), SITE, name="beside")
    mixing = nn.Linear(96, 96, dtype=torch.float64)
    nested = ModuleGraph(mixing, sae.latents, "replacing")
    graph = gpt2().inject(sae, beside)
    assert carrier(graph, sae.latents, sae.error) == SITE
    assert carrier(graph.hook(beside.latents, torch.relu), sae.latents) is None
    assert carrier(graph.hook(SITE, torch.relu), sae.latents) is None
    assert carrier(graph.hook(MLP_OUT[0], torch.relu), sae.latents) == SITE
    assert carrier(graph.inject(nested), sae.latents) is None
    assert carrier(graph, sae.latents.at(latent=3)) is None
    assert carrier(graph, SITE) is None


def test_what_decodes_in_a_way_of_its_own_is_walked_inside():
    sae = AutoencoderGraph(Squaring(), SITE)
    graph = gpt2().inject(sae)
    assert carrier(graph, sae.latents) is None
    got = patching_effect(graph, CLEAN, CORRUPT, MEASURE, [sae.latents], "ig", tolerance=1e-6)
    change = got.effects[sae.latents].sum((1, 2))
    corrupt = graph.run(CORRUPT, save=sae.latents)[sae.latents]
    patched = graph.hook(sae.latents, lambda _: corrupt).run(CLEAN, metric=MEASURE).metric
    clean = graph.run(CLEAN, metric=MEASURE).metric
    assert patched is not None
    assert clean is not None
    assert torch.allclose(change, patched - clean, rtol=1e-5, atol=1e-8)


def test_latents_and_error_of_a_transcoder_move_together():
    """They stand at two locations; together they are all that the MLP writes."""
    transcoder = TranscoderGraph(planted(32, 96), MLP_IN[1], SITE)
    graph = gpt2()
    places = [transcoder.latents, transcoder.error]
    found = patching_effect(graph.inject(transcoder), CLEAN, CORRUPT, MEASURE, places, "ig", steps=30)
    corrupt = graph.run(CORRUPT, save=SITE)[SITE]
    moved = graph.hook(SITE, lambda _: corrupt).run(CLEAN, metric=MEASURE).metric
    clean = graph.run(CLEAN, metric=MEASURE).metric
    assert moved is not None
    assert clean is not None
    total = sum(found[x].sum((1, 2)) for x in places)
    assert torch.allclose(total, moved - clean, rtol=1e-4, atol=1e-7)  # pyright: ignore


class Squaring:
    """A dictionary whose decoder is not linear."""

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def decode(self, latents: Tensor) -> Tensor:
        return latents + latents**2
