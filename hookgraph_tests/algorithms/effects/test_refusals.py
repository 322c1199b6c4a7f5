"""What cannot be told is refused by one error; what can is told of every node."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hookgraph as hg
from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.patching import Method, patching_effect
from hookgraph.errors import HookGraphError, LocationError, MetricError, ShapeMismatchError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import ATTN_PATTERN, ATTN_Q, ATTN_SCORES, ATTN_Z, EMBED, MLP_OUT, MLP_POST
from hookgraph.ontology.locations import LocationType
from hookgraph.subgraphs.autoencoder import AutoencoderGraph
from hookgraph.subgraphs.splicing import SpliceGradient
from hookgraph_tests import tiny
from hookgraph_tests.families import bound, build, tokens
from hookgraph_tests.subgraphs.planted import planted

CLEAN, CORRUPT = tokens(), tokens(seed=1)
MEASURE = hg.metrics.logit_diff(5, 7)


def gpt2() -> HookGraph:
    return bound("gpt2", torch.float64)


# --- numbers that are none ----------------------------------------------------------------------


def gap(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


def steep() -> Callable[[Tensor], Tensor]:
    """A root of something that is just above 0 in the clean run, and falls below."""
    start = gap(gpt2().run(CLEAN).logits)
    return lambda logits: (gap(logits) - start + 1e-6).sqrt()


@pytest.mark.parametrize("method", ["exact", "ig"])
def test_a_metric_that_is_no_number_on_the_way_is_named(method: Method):
    with pytest.raises(MetricError, match="finite number"):
        patching_effect(gpt2(), CLEAN, CORRUPT, steep(), [ATTN_Z[1]], method, joint=["d_head"])


def test_a_gradient_that_is_no_number_is_named():
    def cornered(logits: Tensor) -> Tensor:
        return (gap(logits) - gap(logits).detach()).abs().sqrt()

    with pytest.raises(MetricError, match=r"gradient of the metric at attn.z\[1\] is not a finite number"):
        patching_effect(gpt2(), CLEAN, CORRUPT, cornered, [ATTN_Z[1]])


# --- which nodes are measured -------------------------------------------------------------------


def test_scores_are_measured_one_by_one_though_masked_ones_are_huge():
    node = ATTN_SCORES[1].at(head=2, pos=5, key_pos=5)
    found = patching_effect(gpt2(), CLEAN, None, MEASURE, [ATTN_SCORES[1]], "exact")
    alone = exact_effects(gpt2(), CLEAN, None, MEASURE, [node])[0]
    assert alone.abs().max() > 1e-4
    assert torch.allclose(found.effects[ATTN_SCORES[1]][:, 2, 5, 5], alone, rtol=1e-9, atol=0)
    masked = torch.ones(6, 6).triu(1).bool()
    assert not found.effects[ATTN_SCORES[1]][..., masked].any()


@pytest.mark.parametrize("method", ["attrib", "ig", "exact", "relp", "ig_inputs"])
def test_a_single_coordinate_is_a_place(method: Method):
    place = MLP_POST[1].at(d_mlp=3, pos=-1)
    whole = patching_effect(gpt2(), CLEAN, CORRUPT, MEASURE, [MLP_POST[1].at(pos=-1)], method, steps=20)
    found = patching_effect(gpt2(), CLEAN, CORRUPT, MEASURE, [place], method, steps=20)
    assert found.effects[place].shape == (2,)
    if method != "ig":  # whose way is another one where more moves
        expected = whole.effects[MLP_POST[1].at(pos=-1)][:, 3]
        assert torch.allclose(found.effects[place], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["attrib", "exact"])
def test_one_joint_axis_may_be_named_by_itself(method: Method):
    one, many = (
        patching_effect(gpt2(), CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]], method, joint=x).effects[ATTN_Z[1]]
        for x in ("d_head", ["d_head"])
    )
    assert torch.equal(one, many)
    with pytest.raises(LocationError, match="no joint axis is called 'd_haed': did you mean d_head"):
        patching_effect(gpt2(), CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]], method, joint=["d_haed"])


@pytest.mark.parametrize(
    ("part", "first"), [(slice(-7, None, 2), 0), (slice(-4, None, 2), 2), (slice(-9, -4), 0)]
)
def test_nodes_of_a_slice_that_is_cut_off_have_their_own_names(part: slice, first: int):
    place = ATTN_Z[0].at(pos=part, head=1)
    found = patching_effect(gpt2(), CLEAN, CORRUPT, MEASURE, [place], "exact", joint=["d_head"])
    node = next(iter(found.sum("batch").nodes())).location
    value = exact_effects(gpt2(), CLEAN, CORRUPT, MEASURE, [ATTN_Z[0].at(head=1, pos=first)])[0]
    assert torch.allclose(found.effects[place][:, 0].flatten(), value, rtol=1e-9, atol=1e-13)
    assert dict(node.index)["pos"] % 6 == first  # pyright: ignore[reportOperatorIssue] (a number)


def test_a_slice_between_an_end_and_a_beginning_is_refused():
    with pytest.raises(HookGraphError, match="from the end and from the beginning"):
        patching_effect(gpt2(), CLEAN, CORRUPT, MEASURE, [ATTN_Z[0].at(pos=slice(-7, 3))])


def test_a_location_beside_its_positions_is_refused_where_rows_are_padded():
    mask = torch.ones_like(CLEAN)
    mask[1, :2] = 0
    clean, corrupt = ({"input_ids": x, "attention_mask": mask} for x in (CLEAN, CORRUPT))
    with pytest.raises(HookGraphError, match="the first count columns, the others tokens"):
        patching_effect(gpt2(), clean, corrupt, MEASURE, [ATTN_Z[0], ATTN_Z[0].at(pos=2)], "exact")


# --- dictionaries -------------------------------------------------------------------------------


def injected(gradient: SpliceGradient = "identity") -> tuple[HookGraph, AutoencoderGraph]:
    sae = AutoencoderGraph(planted(32, 96), MLP_OUT[1], splice_gradient=gradient)
    return gpt2().inject(sae), sae


def test_ig_takes_what_stands_between_latents_and_error():
    graph, sae = injected()
    alone = patching_effect(graph, CLEAN, CORRUPT, MEASURE, [sae.latents, sae.error], "ig")
    places = [sae.latents, sae.error, sae.reconstruction, sae.latents_pre, sae.latents.at(latent=3)]
    found = patching_effect(graph, CLEAN, CORRUPT, MEASURE, places, "ig", steps=20)
    for place in (sae.latents, sae.error):
        assert torch.allclose(found.effects[place], alone.effects[place], rtol=1e-6, atol=1e-9)
    for place in places:
        assert float(found.residuals[place].abs().max()) < 1e-2, place


@pytest.mark.parametrize("gradient", ["reconstruction", "frozen", "identity"])
def test_the_gradient_of_a_splice_is_told(gradient: SpliceGradient):
    graph, sae = injected(gradient)
    found = patching_effect(graph, CLEAN, CORRUPT, MEASURE, [sae.latents])
    assert found.convention.splice_gradient == gradient
    if gradient == "reconstruction":
        with pytest.raises(MetricError, match="is a constant where splice_gradient='reconstruction'"):
            patching_effect(graph, CLEAN, CORRUPT, MEASURE, [sae.error])


# --- pairs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "beside", "message"),
    [
        ("attention_mask", lambda: torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]), "different attention masks"),
        ("position_ids", lambda: torch.arange(1, 7).expand(2, 6), "different position_ids"),
    ],
)
def test_pairs_have_one_mask_and_the_same_positions(name: str, beside: Callable[[], Tensor], message: str):
    plain = {"input_ids": CLEAN, "position_ids": torch.arange(6).expand(2, 6)}
    with pytest.raises(ShapeMismatchError, match=message):
        patching_effect(gpt2(), plain, {**plain, name: beside()}, MEASURE, [ATTN_Z[0]])
    longer = {"input_ids": torch.cat([CLEAN, CLEAN[:, :1]], 1), "attention_mask": torch.ones(2, 7)}
    with pytest.raises(ShapeMismatchError, match=r"differ in input_ids: .* need as many tokens"):
        patching_effect(gpt2(), {**plain, "attention_mask": torch.ones(2, 6)}, longer, MEASURE, [ATTN_Z[0]])
    same = {**plain, "attention_mask": torch.ones_like(CLEAN)}
    patching_effect(gpt2(), plain, same, MEASURE, [ATTN_Z[0]])  # a mask of ones masks nothing


@pytest.mark.parametrize("method", ["ig", "exact", "ig_inputs"])
def test_positions_may_be_given_first_and_once_for_all(method: Method):
    positions = torch.arange(6)[None]
    clean, corrupt = ({"position_ids": positions, "input_ids": x} for x in (CLEAN, CORRUPT))
    found, plain = (
        patching_effect(gpt2(), *pair, MEASURE, [ATTN_Z[1].at(pos=-1)], method, joint=["d_head"]).effects
        for pair in ((clean, corrupt), (CLEAN, CORRUPT))
    )
    assert torch.allclose(*(x[ATTN_Z[1].at(pos=-1)] for x in (found, plain)), rtol=1e-9, atol=1e-12)


# --- hooks and batches --------------------------------------------------------------------------


def test_a_batch_under_hooks_is_not_divided_unasked():
    graph = gpt2().hook(MLP_OUT[0], lambda x: x - x.mean(0))
    with pytest.raises(HookGraphError, match=r"has hooks, which may hold values .*: allow batch_size=2"):
        patching_effect(graph, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]], batch_size=1)
    given = gpt2().hook(MLP_OUT[0], lambda x: x + torch.ones(2, 6, 32).double())
    roomy = patching_effect(given, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]], max_memory=2**30)
    assert torch.equal(
        roomy.effects[ATTN_Z[1]],
        patching_effect(given, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]]).effects[ATTN_Z[1]],
    )


def test_what_others_did_to_the_modules_is_seen_where_late_positions_run_alone():
    """The masks of a bound model are taken away: later positions change earlier ones."""
    graph = bound("llama", torch.float64)
    layers = graph.binding.model.model.layers  # pyright: ignore[reportAttributeAccessIssue]

    def unmasked(module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return args, {**kwargs, "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.float64)}

    nodes = [ATTN_Z[i].at(head=h, pos=-1) for i in range(3) for h in range(4)]
    handles = [x.register_forward_pre_hook(unmasked, with_kwargs=True) for x in layers]
    try:
        assert graph.retaining(CLEAN) is None
        found = exact_effects(graph, CLEAN, CORRUPT, MEASURE, nodes)
        base, other = graph.run(CLEAN, metric=MEASURE), graph.run(CORRUPT, save=nodes)
        for node, effect in zip(nodes, found, strict=True):
            run = graph.hook(node, lambda _, node=node: other[node]).run(CLEAN, metric=MEASURE)
            assert run.metric is not None
            assert base.metric is not None
            assert torch.allclose(effect, run.metric - base.metric, rtol=0, atol=1e-9)
    finally:
        for handle in handles:
            handle.remove()
    assert graph.retaining(CLEAN) is not None


@pytest.mark.parametrize("method", ["exact", "ig"])
def test_an_error_of_a_hook_on_a_module_says_that_there_were_several_copies(method: Method):
    graph = gpt2()
    block = graph.binding.model.transformer.h[2]  # pyright: ignore[reportAttributeAccessIssue]
    shift = torch.randn(len(CLEAN), 1, 1, dtype=torch.float64)
    handle = block.mlp.register_forward_hook(lambda m, a, output: output + shift)
    try:
        with pytest.raises(RuntimeError, match="size of tensor") as caught:
            patching_effect(graph, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]], method)
        assert any("copies of the batch side by side" in note for note in caught.value.__notes__)
        own = graph.hook(MLP_OUT[2], lambda x: x + shift)
        single = patching_effect(graph, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]], method, batch_size=2)
    finally:
        handle.remove()
    found = patching_effect(own, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]], method)
    assert torch.allclose(single.effects[ATTN_Z[1]], found.effects[ATTN_Z[1]], rtol=1e-9, atol=1e-12)


def test_the_residual_of_inputs_that_move_stands_at_the_embeddings():
    found = patching_effect(gpt2(), CLEAN, CORRUPT, MEASURE, [EMBED, ATTN_Z[1]], "ig_inputs", steps=30)
    assert found.total_effect is not None
    total = found.effects[EMBED].sum((1, 2))
    assert torch.allclose(total - found.total_effect, found.residuals[EMBED], rtol=0, atol=1e-12)
    assert float(found.residuals[EMBED].abs().max()) < 1e-3


def test_what_no_embedding_carries_does_not_move():
    """What a hook adds stands for a picture: it differs as the inputs do, beside the embeddings of tokens."""
    first = int(CLEAN[0, 0])
    graph = gpt2()
    embedding = graph.binding.model.transformer.wpe  # pyright: ignore[reportAttributeAccessIssue]
    seen: list[Tensor] = []

    def beside(module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * (1 + float(seen[-1][0, 0] != first))

    handles = [
        graph.binding.model.register_forward_pre_hook(  # pyright: ignore[reportAttributeAccessIssue]
            lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True
        ),
        embedding.register_forward_hook(beside),
    ]
    corrupt = CLEAN.clone()
    corrupt[0, 0] = first - 1
    try:
        with pytest.raises(HookGraphError, match=r"differ in something else .* such as a picture"):
            patching_effect(graph, CLEAN, corrupt, MEASURE, [ATTN_Z[1]], "ig_inputs")
    finally:
        for handle in handles:
            handle.remove()


def test_inference_mode_is_named_as_the_reason_for_missing_gradients():
    with torch.inference_mode(), pytest.raises(MetricError, match=r"torch.inference_mode\(\) is on"):
        patching_effect(gpt2(), CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]])


def test_labels_of_a_data_collator_do_not_matter():
    clean, corrupt = ({"input_ids": x, "labels": x} for x in (CLEAN, CORRUPT))
    found = patching_effect(gpt2(), clean, corrupt, MEASURE, [ATTN_Z[1]])
    plain = patching_effect(gpt2(), CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]])
    assert torch.equal(found.effects[ATTN_Z[1]], plain.effects[ATTN_Z[1]])


# --- passes that would not agree ----------------------------------------------------------------


def test_a_model_that_draws_dropout_is_refused_until_it_evaluates():
    model = build("gpt2", torch.float64)
    model.transformer.drop.p = 0.1  # pyright: ignore
    graph = hg.bind(model, check=False)
    model.train()
    message = r"draws dropout \(transformer.drop, 0.1\) in every pass, .*: call model.eval\(\) first"
    with pytest.raises(HookGraphError, match=message):
        patching_effect(graph, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]])
    assert model.training
    model.eval()
    assert patching_effect(graph, CLEAN, CLEAN, MEASURE, [ATTN_Z[1]]).total_effect is not None


def test_noise_that_is_no_dropout_is_refused_too():
    model = tiny.build("causal", "mixtral")
    graph = hg.bind(model, check=False)
    for block in model.model.layers:
        block.mlp.jitter_noise = 0.2
    model.train()
    state = torch.get_rng_state()
    with pytest.raises(HookGraphError, match="draws random numbers of its own in every pass"):
        patching_effect(graph, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]])
    assert torch.equal(torch.get_rng_state(), state)


def test_rates_of_dropout_that_no_pass_reads_do_not_matter():
    model = build("gpt2", torch.float64)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert model.config.summary_first_dropout > 0
    graph = hg.bind(model, check=False)
    expected = patching_effect(graph, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]]).effects[ATTN_Z[1]]
    model.train()
    found = patching_effect(graph, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]]).effects[ATTN_Z[1]]
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_model_that_trains_without_dropout_is_measured():
    model = build("llama", torch.float64)
    graph = hg.bind(model, check=False)
    expected = patching_effect(graph, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]]).effects[ATTN_Z[1]]
    model.train()
    found = patching_effect(graph, CLEAN, CORRUPT, MEASURE, [ATTN_Z[1]]).effects[ATTN_Z[1]]
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_what_is_measured_does_not_depend_on_which_nodes_share_a_pass():
    """A layer whose pattern is asked for leaves the fused kernel, in the clean run and in all others."""
    graph = bound("llama", torch.bfloat16)
    nodes = [ATTN_Z[layer].at(head=head) for layer in range(3) for head in range(4)]
    nodes.append(ATTN_PATTERN[1].at(head=0))
    for batch_size in (2, 256):
        assert not exact_effects(graph, CLEAN, CLEAN, MEASURE, nodes, batch_size=batch_size).any()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("place", [ATTN_Q, ATTN_SCORES, ATTN_PATTERN], ids=str)
def test_relp_says_that_nothing_flows_through_patterns(family: str, place: LocationType):
    with pytest.raises(MetricError, match="relp holds attention patterns constant, so nothing flows through"):
        patching_effect(bound(family, torch.float64), CLEAN, CORRUPT, MEASURE, [place[1]], "relp")


def test_answers_that_are_not_one_per_example_are_refused_however_the_batch_is_divided():
    metric = hg.metrics.logit_diff([5, 6, 7], 3)
    with pytest.raises(MetricError, match=r"correct has shape \(3,\) for a batch of 2"):
        patching_effect(gpt2(), CLEAN, CORRUPT, metric, [ATTN_Z[1]], batch_size=1)
