"""An injected dictionary: values, edits, nesting, what is computed, and errors."""

from collections.abc import Callable
from typing import final

import pytest
import torch
from torch import Tensor

from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.errors import LocationError, ShapeMismatchError, SubgraphError, UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.autoencoder import LATENTS
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import ATTN_PATTERN, ATTN_Z, LOGITS, MLP_OUT, RESID_POST, RESID_PRE
from hookgraph.subgraphs.activations import JumpReLU, TopK
from hookgraph.subgraphs.autoencoder import AutoencoderGraph
from hookgraph.subgraphs.dictionary import Autoencoder, Origin
from hookgraph.subgraphs.module import ModuleGraph
from hookgraph.subgraphs.splicing import ErrorTerm, SpliceGradient
from hookgraph_tests.families import FAMILIES, bound, tokens
from hookgraph_tests.subgraphs.planted import activations, planted
from hookgraph_tests.toy import toy_graph, toy_of, toy_tokens
from hookgraph_tests.unchecked import unchecked

IDS = toy_tokens()
SITE = MLP_OUT[1]
PLANTED = planted()
X = activations(PLANTED)
F = PLANTED.encode(X)
ERROR = X - PLANTED.decode(F)
PLAIN = toy_graph().hook(SITE, lambda _: X.clone())


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


def with_value(value: Tensor) -> Tensor:
    """The logits of the toy network when this goes on at the site."""
    return toy_graph().hook(SITE, lambda _: value.clone()).run(IDS).logits


@final
class Only:
    """A dictionary of which nothing is known but that it encodes and decodes; it counts."""

    def __init__(self, inner: Autoencoder) -> None:
        self.inner, self.encoded, self.decoded = inner, 0, 0

    def encode(self, x: Tensor) -> Tensor:
        self.encoded += 1
        return self.inner.encode(x)

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded += 1
        return self.inner.decode(latents)


# --- values -----------------------------------------------------------------------------------


def test_its_locations_are_what_their_names_say():
    sae = AutoencoderGraph(PLANTED, SITE)
    run = PLAIN.inject(sae).run(IDS, save=sae.locations)
    pre = X @ PLANTED.W_enc + PLANTED.b_enc
    expected = [pre, pre.relu(), F @ PLANTED.W_dec + PLANTED.b_dec, ERROR]
    for location, value in zip(sae.locations, expected, strict=True):
        torch.testing.assert_close(run[location], value, rtol=1e-12, atol=1e-12)
    assert str(sae.latents.at(latent=3)) == "mlp.out[1]/sae/latents@latent=3"


@pytest.mark.parametrize("gradient", ["identity", "reconstruction", "frozen"])
@pytest.mark.parametrize("error", ["kept", "detached"])
@pytest.mark.parametrize("opaque", [False, True])
def test_unedited_nothing_changes_bit_for_bit(gradient: SpliceGradient, error: ErrorTerm, opaque: bool):
    dictionary = Only(PLANTED) if opaque else PLANTED
    sae = AutoencoderGraph(dictionary, SITE, splice_gradient=gradient, error=error)
    graph, plain = PLAIN.inject(sae), PLAIN.run(IDS).logits
    read = graph.hook(sae.latents, lambda f: None).hook(sae.reconstruction, lambda x: x.clone())
    asked = [*sae.locations, sae.latents.grad, LOGITS]
    for some in (graph, read):
        assert torch.equal(some.run(IDS).logits, plain)
        assert torch.equal(some.run(IDS, save=[*sae.locations, LOGITS]).logits, plain)
        assert torch.equal(some.run(IDS, save=asked, metric=metric).logits, plain)


def test_an_edited_latent_moves_its_direction_and_nothing_else():
    sae = AutoencoderGraph(PLANTED, SITE)
    graph = PLAIN.inject(sae).hook(sae.latents.at(latent=3), torch.zeros_like)
    run = graph.run(IDS, save=[sae.latents, sae.reconstruction, sae.error, LOGITS])
    without = F.clone()
    without[..., 3] = 0
    assert torch.equal(run[sae.latents], without)
    assert torch.equal(run[sae.error], ERROR), "the error is that of the unedited latents"
    torch.testing.assert_close(run[sae.reconstruction], PLANTED.decode(without), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        run.logits, with_value(PLANTED.decode(without) + ERROR), rtol=1e-12, atol=1e-12
    )
    assert not torch.allclose(run.logits, PLAIN.run(IDS).logits)


EDITS: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[], Tensor]]] = {
    "latents_pre": (
        "latents_pre",
        lambda pre: pre - 1,
        lambda: PLANTED.decode(PLANTED.activate(PLANTED.encode_pre(X) - 1)) + ERROR,
    ),
    "all latents": ("latents", lambda f: 2 * f + 1, lambda: PLANTED.decode(2 * F + 1) + ERROR),
    "reconstruction": ("reconstruction", torch.neg, lambda: -PLANTED.decode(F) + ERROR),
    "error": ("error", torch.zeros_like, lambda: PLANTED.decode(F)),
}


@pytest.mark.parametrize(
    ("name", "opaque"), [(n, o) for n in EDITS for o in (False, True) if not (o and n == "latents_pre")]
)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_what_goes_on_is_made_of_the_edited_parts(name: str, opaque: bool, with_gradient: bool):
    place, edit, expected = EDITS[name]
    sae = AutoencoderGraph(Only(PLANTED) if opaque else PLANTED, SITE)
    graph = PLAIN.inject(sae).hook(getattr(sae, place), edit)
    asked = [sae.latents.grad, LOGITS] if with_gradient else [LOGITS]
    logits = graph.run(IDS, save=asked, metric=metric).logits
    torch.testing.assert_close(logits, with_value(expected()), rtol=1e-12, atol=1e-12)


def test_with_the_error_dropped_the_reconstruction_goes_on():
    sae = AutoencoderGraph(PLANTED, SITE, error="dropped")
    graph = PLAIN.inject(sae)
    torch.testing.assert_close(graph.run(IDS).logits, with_value(PLANTED.decode(F)))
    edited = graph.hook(sae.latents, torch.zeros_like).run(IDS).logits
    torch.testing.assert_close(edited, with_value(PLANTED.decode(torch.zeros_like(F))))
    assert sae.error not in graph.locations
    with pytest.raises(UnknownLocationError, match="subgraph 'sae' brings none such into being"):
        graph.run(IDS, save=[sae.error])


def test_two_dictionaries_at_one_site_compose_in_order():
    other = planted(4, 7, seed=5)
    first, second = AutoencoderGraph(PLANTED, SITE, "first"), AutoencoderGraph(other, SITE, "second")
    graph = PLAIN.inject(first, second).hook(first.latents, lambda f: 2 * f)
    run = graph.run(IDS, save=[second.latents])
    torch.testing.assert_close(run[second.latents], other.encode(PLANTED.decode(2 * F) + ERROR))


def test_a_dictionary_at_heads_reads_them_side_by_side():
    graph = bound("gpt2", torch.float64)
    dictionary = planted(32, 50)
    sae = AutoencoderGraph(dictionary, ATTN_Z[1])
    run = graph.inject(sae).run(tokens(), save=[ATTN_Z[1], sae.latents, sae.error.grad], metric=metric)
    torch.testing.assert_close(run[sae.latents], dictionary.encode(run[ATTN_Z[1]].flatten(2)))
    edited = graph.inject(sae).hook(sae.latents, lambda f: f + 1).run(tokens()).logits
    moved = dictionary.W_dec.sum(0).view(4, 8)
    torch.testing.assert_close(edited, graph.hook(ATTN_Z[1], lambda z: z + moved).run(tokens()).logits)


def test_the_dictionary_computes_in_its_own_precision():
    single = planted().to(torch.float32)
    sae = AutoencoderGraph(single, SITE)
    run = PLAIN.inject(sae).run(
        IDS, save=[sae.latents, sae.error, sae.latents.grad, SITE.grad], metric=metric
    )
    assert [run[x].dtype for x in (sae.latents, sae.latents.grad)] == [torch.float32] * 2
    assert [run[x].dtype for x in (sae.error, SITE.grad)] == [torch.float64] * 2
    assert torch.equal(run.logits, PLAIN.run(IDS).logits)


# --- many layers ------------------------------------------------------------------------------


def test_every_layer_of_a_mapping_is_injected_under_one_name():
    dictionaries = {layer: planted(seed=layer) for layer in (0, 2)}
    saes = AutoencoderGraph.every(dictionaries, at=MLP_OUT, name="s", error="detached")
    graph = toy_graph().inject(*saes)
    assert graph.every(LATENTS) == (saes[0].latents, saes[1].latents)
    assert [str(x) for x in graph.every(saes[0].latents)] == ["mlp.out[0]/s/latents", "mlp.out[2]/s/latents"]
    run = graph.run(IDS, save=[MLP_OUT[2], saes[1].latents])
    torch.testing.assert_close(run[saes[1].latents], dictionaries[2].encode(run[MLP_OUT[2]]))


def test_a_mapping_needs_layers():
    with pytest.raises(LocationError, match=r"logits has no layers: write it without \[0\]"):
        AutoencoderGraph.every({0: PLANTED}, at=LOGITS.type)


# --- nesting ----------------------------------------------------------------------------------


def nested(depth: int) -> list[AutoencoderGraph]:
    """A dictionary in a dictionary in a dictionary."""
    found = [AutoencoderGraph(PLANTED, SITE, "level0")]
    for level in range(1, depth):
        below = found[-1]
        width = planted().n_latents if level == 1 else 5
        found.append(AutoencoderGraph(planted(width, 5, seed=level), below.latents, f"level{level}"))
    return found


def test_nested_dictionaries_equal_their_composition_by_hand():
    outer, middle, inner = nested(3)
    graph = PLAIN.inject(outer, middle, inner)
    assert str(inner.latents) == "mlp.out[1]/level0/latents/level1/latents/level2/latents"
    assert torch.equal(
        graph.run(IDS, save=[inner.latents, inner.error, LOGITS]).logits, PLAIN.run(IDS).logits
    )
    run = graph.hook(inner.latents.at(latent=1), lambda f: f + 3).run(IDS, save=[inner.latents, LOGITS])
    f1 = middle.autoencoder.encode(F)
    f2 = inner.autoencoder.encode(f1)
    e1, e2 = F - middle.autoencoder.decode(f1), f1 - inner.autoencoder.decode(f2)
    f2[..., 1] += 3
    torch.testing.assert_close(run[inner.latents], f2)
    outer_latents = middle.autoencoder.decode(inner.autoencoder.decode(f2) + e2) + e1
    torch.testing.assert_close(run.logits, with_value(PLANTED.decode(outer_latents) + ERROR))


def test_gradients_of_nested_latents_are_chained_directions():
    outer, middle, inner = nested(3)
    asked = [inner.latents.grad, middle.error.grad, outer.latents.grad, SITE.grad, RESID_POST[1].grad]
    run = PLAIN.inject(outer, middle, inner).run(IDS, save=asked, metric=metric)
    g = run[RESID_POST[1].grad]
    torch.testing.assert_close(run[outer.latents.grad], g @ PLANTED.W_dec.T)
    torch.testing.assert_close(run[middle.error.grad], run[outer.latents.grad])
    chained = run[outer.latents.grad] @ middle.autoencoder.W_dec.T @ inner.autoencoder.W_dec.T
    torch.testing.assert_close(run[inner.latents.grad], chained)
    assert torch.equal(run[SITE.grad], g)


# --- what is computed -------------------------------------------------------------------------


@pytest.mark.parametrize("with_gradient", [False, True])
def test_an_unedited_pass_decodes_once_and_only_if_it_has_to(with_gradient: bool):
    counting = Only(PLANTED)
    sae = AutoencoderGraph(counting, SITE)
    graph = PLAIN.inject(sae)
    graph.run(IDS)
    graph.run(IDS, save=[RESID_PRE[0].grad], metric=metric)
    assert (counting.encoded, counting.decoded) == (0, 0)
    graph.run(IDS, save=[sae.latents, LOGITS])
    assert (counting.encoded, counting.decoded) == (1, 0)
    gradients = [x.grad for x in (sae.latents, sae.error, sae.reconstruction)] if with_gradient else []
    graph.run(IDS, save=[*sae.locations, LOGITS, *gradients], metric=metric)
    assert (counting.encoded, counting.decoded) == (2, 1)


class Widths(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the sizes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            self.products.append(tuple(args[-1].shape))
        return out


def products(graph: HookGraph, *asked: Location) -> list[tuple[int, ...]]:
    """The shapes of what was multiplied from the right, beyond those of the plain network."""
    with Widths() as plain:
        PLAIN.run(IDS, save=[LOGITS])
    with Widths() as noted:
        graph.run(IDS, save=[*asked, LOGITS])
    found = list(noted.products)
    for shape in plain.products:
        found.remove(shape)
    return found


@pytest.mark.parametrize("jump", [False, True])
def test_where_few_latents_are_asked_for_only_those_are_computed(jump: bool):
    dictionary = planted(activation=JumpReLU(torch.full((9,), 0.3, dtype=torch.float64)) if jump else None)
    sae = AutoencoderGraph(dictionary, SITE)
    graph = PLAIN.inject(sae)
    few = graph.hook(sae.latents.at(latent=3), torch.zeros_like)
    whole = graph.hook(sae.latents, lambda f: f.index_fill(-1, torch.tensor(3), 0.0))
    assert products(few, sae.latents.at(latent=[5, 3])) == [(4, 2), (1, 4)]
    assert products(graph, sae.latents.at(latent=5)) == [(4, 1)]
    assert products(whole) == [(4, 9), (1, 4)]
    assert products(whole, sae.error) == [(4, 9), (9, 4), (1, 4)]
    asked = sae.latents.at(latent=[5, 3])
    runs = [some.run(IDS, save=[asked, asked.grad, LOGITS], metric=metric) for some in (few, whole)]
    for place in (asked, asked.grad):
        torch.testing.assert_close(runs[0][place], runs[1][place], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(runs[0].logits, runs[1].logits, rtol=1e-12, atol=1e-12)


def test_latents_that_depend_on_each_other_are_all_computed():
    sae = AutoencoderGraph(planted(activation=TopK(2)), SITE)
    assert products(PLAIN.inject(sae), sae.latents.at(latent=5)) == [(4, 9)]
    run = PLAIN.inject(sae).run(IDS, save=[sae.latents.at(latent=5), sae.latents_pre.at(latent=0)])
    assert torch.equal(run[sae.latents.at(latent=5)], sae.autoencoder.encode(X)[..., 5])


def test_a_latent_out_of_range_is_an_error():
    sae = AutoencoderGraph(PLANTED, SITE)
    with pytest.raises(LocationError, match="latent=9 is out of range, latent has size 9"):
        PLAIN.inject(sae).run(IDS, save=[sae.latents.at(latent=9)])


def test_a_pass_stops_before_the_decoder_where_latents_are_all_that_is_asked():
    counting = Only(PLANTED)
    sae = AutoencoderGraph(counting, SITE, error="dropped")
    graph = PLAIN.inject(sae)
    toy_of(graph).executed.clear()
    graph.run(IDS, save=[sae.latents])
    assert (counting.encoded, counting.decoded) == (1, 0)
    assert toy_of(graph).executed == [0, 1]


def test_a_replay_reaches_it():
    sae = AutoencoderGraph(PLANTED, SITE)
    graph = toy_graph().inject(sae)
    first = graph.run(IDS, save=[RESID_PRE[1]])
    expected = graph.run(IDS, save=[sae.latents, sae.error])
    replayed = graph.replay(first, RESID_PRE[1], save=[sae.latents, sae.error])
    for place in expected:
        assert torch.equal(replayed[place], expected[place])


# --- attribution ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attribution_takes_latents_and_errors_beside_raw_locations(family: str):
    graph = bound(family, torch.float64)
    sae = AutoencoderGraph(planted(32, 60), MLP_OUT[1])
    clean, corrupt = tokens(seed=0), tokens(seed=1)
    at = [ATTN_Z[1].at(pos=-1), MLP_OUT[1], sae.latents, sae.error]
    effect = patching_effect(graph.inject(sae), clean, corrupt, metric, at=at)
    summed = effect.effects[sae.latents].flatten(1).sum(1) + effect.effects[sae.error].flatten(1).sum(1)
    whole = effect.effects[MLP_OUT[1]].flatten(1).sum(1)
    torch.testing.assert_close(summed, whole, msg="latents and errors are all of the site")
    strongest = int(effect.effects[sae.latents].abs().sum((0, 1)).argmax())
    alone = patching_effect(graph.inject(sae), clean, corrupt, metric, at=[sae.latents.at(latent=strongest)])
    torch.testing.assert_close(
        alone.effects[sae.latents.at(latent=strongest)], effect.effects[sae.latents][..., strongest]
    )
    assert all(node.exact is not None for node in alone.check(top=3))


# --- errors -----------------------------------------------------------------------------------


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no dictionary": (lambda: AutoencoderGraph(torch.nn.ReLU(), SITE), "a ReLU is no dictionary: it needs"),
    "no site": (lambda: AutoencoderGraph(PLANTED), "does not say where it belongs: give its site"),
    "no positions": (
        lambda: AutoencoderGraph(PLANTED, ATTN_PATTERN[0]),
        r"reads one vector per position, and attn.pattern\[0\] has the axes batch head pos key_pos",
    ),
    "part": (
        lambda: AutoencoderGraph(PLANTED, SITE.at(pos=1)),
        r"a site is a whole location, not mlp.out\[1\]@pos=1: inject at mlp.out\[1\], and take the part",
    ),
    "site's gradient": (lambda: AutoencoderGraph(PLANTED, SITE.grad), r"not mlp.out\[1\].grad: inject at"),
    "gradient": (
        lambda: AutoencoderGraph(PLANTED, SITE, splice_gradient="identiti"),  # pyright: ignore
        "splice_gradient='identiti' is unknown: did you mean identity",
    ),
    "error": (
        lambda: AutoencoderGraph(PLANTED, SITE, error="drop"),  # pyright: ignore
        "error='drop' is unknown: did you mean dropped",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_a_subgraph_says_why(make: Callable[[], object], message: str):
    with unchecked(), pytest.raises(SubgraphError, match=message):
        make()


def test_what_is_no_location_is_no_site():
    for made in (AutoencoderGraph, ModuleGraph):
        with unchecked(), pytest.raises(LocationError, match=r"write Location.parse\('mlp.out\[1\]'"):
            made(PLANTED, "mlp.out[1]")  # pyright: ignore[reportArgumentType]


def test_a_dictionary_of_another_width_is_an_error():
    sae = AutoencoderGraph(planted(width=5), SITE)
    with pytest.raises(ShapeMismatchError, match=r"reads width 5, and mlp.out\[1\] has width 4"):
        PLAIN.inject(sae).run(IDS, save=[sae.latents])

    class Wide:
        def encode(self, x: Tensor) -> Tensor:
            return x

        def decode(self, latents: Tensor) -> Tensor:
            return torch.cat([latents, latents], -1)

    wide = AutoencoderGraph(Wide(), SITE)
    with pytest.raises(
        ShapeMismatchError, match=r"reconstructs \(2, 3, 8\), the value there has shape \(2, 3, 4\)"
    ):
        PLAIN.inject(wide).run(IDS, save=[wide.error])


def test_a_dictionary_that_says_where_it_belongs_needs_no_site():
    known = Autoencoder(PLANTED.W_enc, PLANTED.W_dec, origin=Origin(reads=SITE))
    assert AutoencoderGraph(known).site == SITE


@pytest.mark.parametrize("family", FAMILIES)
def test_it_works_alike_on_every_model(family: str):
    graph, dictionary = bound(family, torch.float64), planted(32, 64)
    sae = AutoencoderGraph(dictionary, SITE)
    run = graph.inject(sae).run(tokens(), save=[SITE, sae.latents, sae.error])
    torch.testing.assert_close(run[sae.latents], dictionary.encode(run[SITE]))
    edited = graph.inject(sae).hook(sae.latents.at(latent=7), lambda f: f + 1).run(tokens()).logits
    moved = graph.hook(SITE, lambda x: x + dictionary.W_dec[7]).run(tokens()).logits
    torch.testing.assert_close(edited, moved)
