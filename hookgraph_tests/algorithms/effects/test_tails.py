"""Exact patching of late positions runs these alone, and gives what a full pass for each node gives."""

from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import hookgraph as hg
from hookgraph.algorithms.effects import tails
from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.tails import by_start, first_position, late, shifted, tail
from hookgraph.algorithms.metrics import kl_to, logit_diff
from hookgraph.algorithms.pairs import prepare_pair
from hookgraph.algorithms.sites import Contrast
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.locations import ATTN_K, ATTN_PATTERN, ATTN_Q, ATTN_V, ATTN_Z, MLP_POST, RESID_POST, RESID_PRE
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs import Autoencoder, AutoencoderGraph, ModuleGraph
from hookgraph_tests.families import FAMILIES, bound, tokens
from hookgraph_tests.tiny import build

METRIC = logit_diff(3, torch.tensor([5, 7]))


def others() -> Tensor:
    return tokens().flip(0)


def one_by_one(graph: HookGraph, nodes: Sequence[Location], measure: hg.metrics.LogitDifference) -> Tensor:
    """A full pass for each node."""
    clean, corrupt = graph.run(tokens(), metric=measure), graph.run(others(), save=nodes)
    found: list[Tensor] = []
    for node in nodes:
        run = graph.hook(node, lambda _, node=node: corrupt[node]).run(tokens(), metric=measure)
        assert run.metric is not None
        assert clean.metric is not None
        found.append(run.metric - clean.metric)
    return torch.stack(found)


def counting(graph: HookGraph):
    """Counts the tails that are tried."""
    return patch.object(graph.binding, "remember", wraps=graph.binding.remember)


class Lengths(nn.Module):
    """Adds nothing, and keeps how many positions each pass had."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[1])
        return torch.zeros_like(x)


class Pointwise(ModuleGraph):  # pyright: ignore[reportGeneralTypeIssues] (final for users)
    """One that looks at each position alone."""

    pointwise = True


def watching(graph: HookGraph) -> tuple[HookGraph, list[int]]:
    """The graph, and the number of positions in each of its passes that end."""
    lengths = Lengths()
    return graph.inject(Pointwise(lengths, at=RESID_POST[2], output="added")), lengths.seen


def places_of_layer(layer: int, pos: int) -> list[Location]:
    heads = [
        kind[layer].at(pos=pos, **{axis: 1})
        for kind, axis in ((ATTN_Z, "head"), (ATTN_Q, "head"), (ATTN_K, "kv_head"), (ATTN_V, "kv_head"))
    ]
    return [*heads, MLP_POST[layer].at(d_mlp=7, pos=pos), RESID_POST[layer].at(pos=pos)]


@pytest.mark.parametrize("family", FAMILIES)
def test_late_positions_alone_give_what_full_passes_give(family: str):
    graph = bound(family, torch.float64)
    length = tokens().shape[1]
    nodes = [x for layer in range(3) for pos in (-1, length - 3) for x in places_of_layer(layer, pos)]
    nodes += [RESID_PRE[1].at(pos=slice(-2, None)), ATTN_Z[2].at(pos=[-2, -1], head=[0, 2])]
    with counting(graph) as made:
        found = exact_effects(graph, tokens(), others(), METRIC, nodes)
    assert [call.args[1] for call in made.call_args_list] == [length - 3, length - 2]
    expected = one_by_one(graph, nodes, METRIC)
    assert (expected != 0).all(1).sum() > len(nodes) / 2
    tolerance = 1e-12 if FAMILIES[family].double_throughout else 1e-5
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_the_clean_pass_is_the_only_one_over_early_positions():
    graph = bound("gpt2", torch.float64)
    nodes = [ATTN_Z[i].at(head=h, pos=pos) for i in range(3) for h in range(4) for pos in (-2, -3)]
    watched, seen = watching(graph)
    exact_effects(watched, tokens(), others(), METRIC, nodes)
    assert seen == [tokens().shape[1], 3], "the corrupt pass ends before the last layer does"


class Batches(nn.Module):
    """Adds nothing, and keeps how many rows each pass had."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return torch.zeros_like(x)


@pytest.mark.parametrize("short", [True, False])
def test_clean_and_corrupt_are_run_in_one_pass_if_they_are_short(short: bool):
    graph, rows = bound("gpt2", torch.float64), Batches()
    watched = graph.inject(Pointwise(rows, at=RESID_POST[0], output="added"))
    nodes = [ATTN_Z[1].at(head=h, pos=-1) for h in range(4)]
    expected = one_by_one(graph, nodes, METRIC)
    with patch.object(tails, "_SHORT", 32 if short else 1):
        found = exact_effects(watched, tokens(), others(), METRIC, nodes)
    assert rows.seen == ([4] if short else [2, 2]), "the tail begins behind"
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [4, 6, 7])
def test_late_nodes_are_run_a_few_at_a_time(family: str, rows: int):
    graph = bound(family, torch.float64)
    nodes = [ATTN_Z[i].at(head=h, pos=-1) for i in range(3) for h in range(2)]
    found = exact_effects(graph, tokens(), others(), METRIC, nodes, batch_size=rows)
    assert torch.allclose(found, one_by_one(graph, nodes, METRIC), rtol=0, atol=1e-6)


def test_late_nodes_are_set_to_zero_without_corrupt_inputs():
    graph = bound("gpt2", torch.float64)
    nodes = [ATTN_Z[i].at(head=h, pos=-1) for i in range(3) for h in range(4)]
    found = exact_effects(graph, tokens(), None, METRIC, nodes)
    clean = graph.run(tokens(), metric=METRIC).measured
    for node, effect in zip(nodes, found, strict=True):
        zeroed = graph.hook(node, torch.zeros_like).run(tokens(), metric=METRIC).measured
        assert torch.allclose(effect, zeroed - clean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", [1, 4])
def test_of_early_positions_nothing_is_kept_but_what_the_model_remembers(start: int):
    graph = bound("gemma2", torch.float64)
    pair = prepare_pair(graph, tokens(), others())
    found, whole = late(graph, pair, METRIC, [ATTN_Z[1]], start), tail_of(graph, start)
    assert found is not None
    length = tokens().shape[1] - start
    for x in (*found.base.saved.values(), *found.clean.values(), *found.corrupt.values()):
        assert x.shape[1] == length
        assert x.untyped_storage().nbytes() <= 2 * x.nbytes, "of one pass over both"
    for a, b in zip(found.base.saved.values(), whole.base.saved.values(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    assert torch.allclose(found.corrupt[ATTN_Z[1]], whole.corrupt[ATTN_Z[1]], rtol=0, atol=1e-6)
    assert torch.allclose(found.measured, whole.measured, rtol=0, atol=1e-6)
    for name in ("fresh", "lasting"):
        ours, theirs = (getattr(x.inputs["past_key_values"], name)() for x in (found, whole))
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            assert a.keys.shape == b.keys.shape
            assert torch.allclose(a.keys, b.keys, rtol=0, atol=1e-6)
            assert torch.allclose(a.values, b.values, rtol=0, atol=1e-6)


def tail_of(graph: HookGraph, start: int) -> Contrast:
    """The tail of a contrast that kept everything."""
    kept = Contrast.of(graph, tokens(), others(), METRIC, [ATTN_Z[1]], replays=True, retains=True)
    found = tail(kept, start)
    assert found is not None
    return found


class OfClean:
    """A metric that is a number for the clean inputs only, and for what is close to them."""

    reads = -1

    def __init__(self, graph: HookGraph) -> None:
        self.clean = graph.run(tokens()).logits[:, -1, 3]

    def of(self, logits: Tensor) -> Tensor:
        known = torch.isclose(logits[:, -1, 3], self.clean, rtol=0, atol=1e-2)
        return torch.where(known, logits[:, -1, 5], torch.nan)

    __call__ = of

    def rows(self, chosen: slice) -> "OfClean":
        raise NotImplementedError


def test_the_metric_of_corrupt_inputs_may_be_no_number():
    graph = bound("gpt2", torch.float64)
    metric = OfClean(graph)
    assert metric(graph.run(others()).logits).isnan().all()
    node = ATTN_Z[1].at(head=0, pos=-1)
    assert exact_effects(graph, tokens(), others(), metric, [node, node]).isfinite().all()


def test_a_part_of_the_batch_is_no_node_in_late_positions_either():
    with pytest.raises(hg.HookGraphError, match="patched in every example"):
        exact_effects(
            bound("gpt2", torch.float64), tokens(), others(), METRIC, [ATTN_Z[1].at(batch=0, pos=-1)]
        )


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])  # which has a window of four positions
def test_patterns_of_late_queries_are_over_all_keys(family: str):
    graph = bound(family, torch.float64)
    nodes = [
        ATTN_PATTERN[i].at(head=h, pos=-1, key_pos=k) for i in range(3) for h in range(4) for k in (2, 5)
    ]
    nodes += [ATTN_PATTERN[0].at(head=1, pos=-1)]
    found = exact_effects(graph, tokens(), others(), METRIC, nodes)
    tolerance = 1e-12 if FAMILIES[family].double_throughout else 1e-5
    assert torch.allclose(found, one_by_one(graph, nodes, METRIC), rtol=0, atol=tolerance)


def test_one_row_of_position_ids_is_for_all_examples():
    graph = bound("llama", torch.float64)
    positions = torch.arange(tokens().shape[1])[None]
    clean, corrupt = ({"input_ids": x, "position_ids": positions} for x in (tokens(), others()))
    nodes = [ATTN_Z[i].at(head=h, pos=-1) for i in range(3) for h in range(4)]
    found = exact_effects(graph, clean, corrupt, METRIC, nodes)
    assert torch.allclose(found, one_by_one(graph, nodes, METRIC), rtol=0, atol=1e-12)


def test_what_runs_in_a_tail_has_as_many_positions_as_the_tail():
    graph = bound("gpt2", torch.float64)
    watched, seen = watching(graph)
    nodes = [ATTN_Z[i].at(head=h, pos=-2) for i in range(3) for h in range(4)]
    found = exact_effects(watched, tokens(), others(), METRIC, nodes)
    assert min(seen) == 2
    assert torch.allclose(found, one_by_one(graph, nodes, METRIC), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("hooked", lambda g: g.hook(RESID_PRE[0], lambda x: x)),
        ("a module", lambda g: g.inject(ModuleGraph(nn.Identity(), at=RESID_POST[0], output="replacing"))),
    ],
)
def test_hooks_and_modules_see_every_position(reason: str, change):  # pyright: ignore[reportMissingParameterType]
    graph = change(bound("gpt2", torch.float64))
    assert graph.remember(tokens(), 3) is None, reason
    nodes = [ATTN_Z[1].at(head=h, pos=-1) for h in range(4)]
    found = exact_effects(graph, tokens(), others(), METRIC, nodes)
    assert torch.allclose(found, one_by_one(graph, nodes, METRIC), rtol=0, atol=1e-12)


def test_latents_of_a_dictionary_are_patched_in_a_tail():
    torch.manual_seed(0)
    width, latents = 32, 20
    weights = torch.randn(width, latents, dtype=torch.float64)
    sae = AutoencoderGraph(Autoencoder(weights, weights.T / latents), at=RESID_POST[1])
    graph = bound("gpt2", torch.float64).inject(sae)
    nodes = [*(sae.latents.at(latent=i, pos=-1) for i in range(latents)), sae.error.at(pos=-1)]
    assert graph.remember(tokens(), 3) is not None
    found = exact_effects(graph, tokens(), others(), METRIC, nodes)
    assert torch.allclose(found, one_by_one(graph, nodes, METRIC), rtol=0, atol=1e-12)


@pytest.mark.parametrize("what", ["padding", "an early answer", "a metric of all logits"])
def test_where_a_tail_is_not_enough_everything_runs(what: str):
    graph = bound("gpt2", torch.float64)
    nodes = [ATTN_Z[1].at(head=h, pos=-1) for h in range(4)]
    clean: hg.graph.abstract.Inputs = tokens()
    corrupt: hg.graph.abstract.Inputs = others()
    metric: hg.graph.measuring.Metric = METRIC
    if what == "padding":
        mask = torch.ones_like(tokens())
        mask[0, :2] = 0
        clean, corrupt = ({"input_ids": x, "attention_mask": mask} for x in (tokens(), others()))
        assert graph.remember(clean, 3) is None
    elif what == "an early answer":
        metric = logit_diff(3, 5, pos=torch.tensor([-1, 2]))
    else:
        metric = kl_to(graph.run(others()).logits, pos=None)
    with counting(graph) as made:
        found = exact_effects(graph, clean, corrupt, metric, nodes)
    assert made.called == (what == "padding"), "only the binding sees the padding"
    base, other = graph.run(clean, metric=metric), graph.run(corrupt, save=[ATTN_Z[1]])
    for node, effect in zip(nodes, found, strict=True):
        head = dict(node.index)["head"]

        def put(x: Tensor, head: object = head) -> Tensor:
            x[:, -1, head] = other[ATTN_Z[1]][:, -1, head]
            return x

        run = graph.hook(ATTN_Z[1], put).run(clean, metric=metric)
        assert run.metric is not None
        assert base.metric is not None
        assert torch.allclose(effect, run.metric - base.metric, rtol=0, atol=1e-12)


def test_a_model_whose_later_positions_change_earlier_ones_is_seen_and_run_whole():
    """The copy that is not patched tells."""
    graph = bound("gpt2", torch.float64)
    nodes = [ATTN_Z[1].at(head=h, pos=-1) for h in range(4)]
    remembered = graph.binding.remember

    def wrong(inputs: hg.graph.abstract.Prepared, length: int) -> hg.graph.abstract.Prepared | None:
        ids = inputs["input_ids"]
        assert isinstance(ids, Tensor)
        return remembered(
            {**inputs, "input_ids": torch.cat([ids[:, :length].flip(1), ids[:, length:]], 1)}, length
        )

    unproven = patch.object(graph.binding, "retaining", return_value=None)
    with unproven, patch.object(graph.binding, "remember", wrong):
        found = exact_effects(graph, tokens(), others(), METRIC, nodes)
    assert torch.allclose(found, one_by_one(graph, nodes, METRIC), rtol=0, atol=1e-12)


def test_nodes_are_grouped_by_where_they_begin():
    first = [ATTN_Z[0].at(pos=0, head=h) for h in range(20)]
    last = [ATTN_Z[0].at(pos=-1, head=h) for h in range(2)]
    whole = ATTN_Z[0].at(head=1)
    assert by_start([*last, *first, whole], 5) == [(0, [*first, whole]), (4, last)]
    assert by_start([*last, *first[:3]], 5) == [(0, [*first[:3], *last])], "too few for a pass of their own"


@pytest.mark.parametrize(
    ("node", "first", "moved"),
    [
        (RESID_POST[0].at(pos=-2), 3, RESID_POST[0].at(pos=0)),
        (RESID_POST[0].at(pos=[4, 3]), 3, RESID_POST[0].at(pos=[1, 0])),
        (RESID_POST[0].at(pos=slice(-2, None)), 3, RESID_POST[0].at(pos=[0, 1])),
        (RESID_POST[0].at(pos=9), 0, None),
        (RESID_POST[0], 0, None),
    ],
)
def test_positions_are_counted_within_a_tail(node: Location, first: int, moved: Location | None):
    assert first_position(node, 5) == first
    if moved is not None:
        assert shifted(node, first, 5) == moved


def test_keys_that_a_cache_holds_in_another_precision_are_patched():
    graph = hg.bind(build("causal", "gptj").double())  # rotates in single precision
    nodes = [kind[1].at(pos=pos, head=1) for kind in (ATTN_Z, ATTN_Q) for pos in range(6)]
    nodes += [ATTN_K[layer].at(pos=pos, kv_head=2) for layer in range(2) for pos in range(6)]
    expected = one_by_one(graph, nodes, METRIC)
    found = exact_effects(graph, tokens(), others(), METRIC, nodes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
