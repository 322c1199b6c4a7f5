"""Causal bases against eigenvectors, brute force, random directions, and two processes; subspaces; lenses."""

import socket
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

import hookgraph as hg
from hookgraph.algorithms import CausalBasis, LogitLens, TunedLens, ablate_layer, remove_subspace
from hookgraph.algorithms.bases.basis import causal_basis
from hookgraph.algorithms.bases.energies import DecodedEnergy, Loss, States, model_after
from hookgraph.algorithms.bases.greedy import evaluated, greedy
from hookgraph.algorithms.bases.rank_one import LensEnergy, RankOne, ending
from hookgraph.algorithms.bases.subspaces import Removal, Unit, ablate_subspace, deranged
from hookgraph.algorithms.readouts.decoding import decoded
from hookgraph.demo import ioi_pairs, load
from hookgraph.errors import (
    HookGraphError,
    LocationError,
    ShapeMismatchError,
)
from hookgraph.locations import LOGITS, MLP_OUT, RESID_POST, RESID_PRE
from hookgraph_tests.toy import ToyBinding
from hookgraph_tests.unchecked import unchecked


@pytest.fixture(scope="module")
def graph() -> hg.HookGraph:
    model, tokenizer = load()
    return hg.bind(model.double(), tokenizer=tokenizer, check=False)


@pytest.fixture(scope="module")
def tokens(graph: hg.HookGraph) -> dict[str, object]:
    return dict(graph.binding.prepare([pair.text for pair in ioi_pairs(1)]))


@pytest.fixture(scope="module")
def basis(graph: hg.HookGraph, tokens: dict[str, object]) -> CausalBasis:
    return causal_basis(graph, tokens, RESID_POST[1], k=3, tries=1, max_iter=40, tolerance=1e-5)


def toy() -> hg.HookGraph:
    return hg.HookGraph(ToyBinding(width=6, vocabulary=9))


TOKENS = torch.arange(20).view(4, 5) % 9


def test_a_quadratic_energy_gives_the_eigenvectors():
    drawn = torch.randn(8, 8, dtype=torch.float64)
    matrix = drawn @ drawn.mT
    found, energies = greedy(
        lambda j: lambda v: (v @ matrix @ v, 1),
        torch.eye(8, dtype=torch.float64),
        4, tries=2, max_iter=400, tolerance=1e-15, min_energy=0.0,
    progress=False)  # fmt: skip
    values, vectors = torch.linalg.eigh(matrix)
    torch.testing.assert_close(energies, values.flip(0)[:4], rtol=1e-8, atol=0)
    overlap = (found * vectors.flip(1)[:, :4]).sum(0).abs()
    torch.testing.assert_close(overlap, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_directions_are_orthonormal_and_the_energies_do_not_increase(basis: CausalBasis):
    torch.testing.assert_close(
        basis.basis.mT @ basis.basis, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert bool((basis.energies.diff() <= 1e-6 * basis.energies[0]).all())


def energy_by_hooks(graph: hg.HookGraph, tokens: dict[str, object], at: hg.Location, v: Tensor) -> float:
    """The whole model twice, the second time with the direction ablated by a hook."""
    before = graph.run(tokens).logits.log_softmax(-1)
    states = graph.run(tokens, save=[at])[at]
    kept = torch.as_tensor(tokens["attention_mask"]).bool()
    mean = states[kept].mean(0)
    ablated = graph.hook(at, lambda x: torch.where(kept[..., None], x - ((x - mean) @ v)[..., None] * v, x))
    after = ablated.run(tokens).logits.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1)[kept].mean())


def test_the_energies_are_those_of_the_whole_model_with_the_ablation_as_a_hook(
    graph: hg.HookGraph, tokens: dict[str, object], basis: CausalBasis
):
    for v, energy in zip(basis.basis.mT, basis.energies, strict=True):
        assert abs(float(energy) - energy_by_hooks(graph, tokens, RESID_POST[1], v)) < 1e-10


def test_a_replay_from_inside_a_layer_equals_the_whole_model(graph: hg.HookGraph, tokens: dict[str, object]):
    found = causal_basis(graph, tokens, MLP_OUT[1], k=1, tries=1, max_iter=20)
    by_hooks = energy_by_hooks(graph, tokens, MLP_OUT[1], found.basis[:, 0])
    assert abs(float(found.energies[0]) - by_hooks) < 1e-10


def test_the_first_energy_is_above_the_best_of_a_thousand_random_directions(
    graph: hg.HookGraph, tokens: dict[str, object], basis: CausalBasis
):
    decode, run = model_after(graph, tokens, RESID_POST[1])
    states, before = run[RESID_POST[1]], run[LOGITS].log_softmax(-1)
    rest = states - states[0].mean(0)
    best = 0.0
    for _ in range(10):
        drawn = torch.nn.functional.normalize(torch.randn(100, states.shape[-1], dtype=torch.float64))
        with torch.no_grad():
            after = decode(states - (rest[0] @ drawn.mT).mT[..., None] * drawn[:, None]).log_softmax(-1)
        best = max(best, float((before.exp() * (before - after)).sum(-1).mean(-1).max()))
    assert float(basis.energies[0]) > best


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_a_lens_by_rank_one_updates_equals_decoding_the_ablated_states(
    graph: hg.HookGraph, tokens: dict[str, object], ablation: Removal
):
    kept = torch.as_tensor(tokens["attention_mask"]).bool()
    states = States(graph.run(tokens, save=[RESID_POST[1]])[RESID_POST[1]], kept)
    rows = states.rows
    rest = {"zero": rows, "mean": rows - rows.mean(0), "resample": rows - rows[deranged(len(rows), 1)]}[
        ablation
    ]

    def end(value: Tensor, /) -> Tensor:
        return decoded(graph, tokens, value)

    with torch.no_grad():
        loss = Loss(end(states.value)[kept].log_softmax(-1))
    closed = ending(graph, end, states.value)
    assert closed is not None
    v = torch.nn.functional.normalize(torch.randn(rows.shape[1], dtype=torch.float64), dim=0)
    fast = evaluated(LensEnergy(rows, rest, loss, closed, None), v)
    slow = evaluated(DecodedEnergy(states, rest, end, loss), v)
    assert fast[0] == pytest.approx(slow[0], rel=1e-5)
    torch.testing.assert_close(fast[1], slow[1], rtol=1e-4, atol=1e-7)


def test_the_hand_written_backward_is_the_gradient():
    N, c, u = (torch.randn(*s, dtype=torch.float64) for s in ((5, 7), (5,), (7,)))
    r, bias = torch.rand(5, dtype=torch.float64) + 0.5, torch.randn(7, dtype=torch.float64)
    weights = torch.randn(5, 7, dtype=torch.float64).softmax(-1)
    parts = [x.requires_grad_() for x in (c, u, r)]
    assert torch.autograd.gradcheck(
        lambda *x: RankOne.apply(*x, N, bias, weights, (weights * weights.log()).sum()), parts
    )


def test_with_labels_the_energy_is_the_increment_of_cross_entropy():
    graph, labels = toy(), TOKENS.roll(-1, 1).clone()
    labels[:, -1] = -100
    found = causal_basis(graph, TOKENS, RESID_POST[0], k=1, ablation="zero", labels=labels)
    v = found.basis[:, 0]
    keep = labels >= 0
    hooked = graph.hook(RESID_POST[0], lambda x: torch.where(keep[..., None], x - (x @ v)[..., None] * v, x))
    losses = [
        torch.nn.functional.cross_entropy(g.run(TOKENS).logits.flatten(0, 1), labels.flatten())
        for g in (hooked, graph)
    ]
    assert float(found.energies[0]) == pytest.approx(float(losses[0] - losses[1]), abs=1e-10)


def test_directions_below_the_least_energy_are_left_out():
    assert causal_basis(toy(), TOKENS, RESID_POST[0], k=3, min_energy=1e6).rank == 0


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (TOKENS[:1, :1], {"k": 1}, "at least two states, there is 1"),
        (TOKENS, {"k": 7}, "has 6 dimensions, ask for 1 to 6"),
        (TOKENS, {"ablation": "means"}, "unknown ablation 'means'"),
        (TOKENS, {"labels": TOKENS[:, :2]}, "labels have shape"),
    ],
)
def test_what_cannot_be_done_is_refused(inputs: Tensor, options: dict, message: str):
    with unchecked(), pytest.raises(HookGraphError, match=message):
        causal_basis(toy(), inputs, RESID_POST[0], **options)


def test_a_part_has_no_basis():
    with pytest.raises(LocationError, match="name it whole"):
        causal_basis(toy(), TOKENS, RESID_POST[0].at(pos=0))


def test_a_basis_is_saved_loaded_tabled_and_drawn(basis: CausalBasis, tmp_path: Path):
    basis.save(tmp_path / "basis.safetensors")
    again = CausalBasis.load(tmp_path / "basis.safetensors")
    assert torch.equal(again.basis, basis.basis)
    assert torch.equal(again.energies, basis.energies)
    assert (again.location, again.convention, again.metadata) == (
        basis.location,
        basis.convention,
        basis.metadata,
    )
    assert list(basis.to_frame()["energy"]) == basis.energies.tolist()
    assert "resid.post[1]" in repr(basis)
    assert "<table" in basis._repr_html_()
    assert basis.plot().axes


def _alone(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    for ablation in ("mean", "resample"):
        found = causal_basis(
            toy(), TOKENS[2 * rank : 2 * rank + 2], RESID_POST[0], k=2, ablation=ablation, tolerance=1e-14
        )
        torch.save((found.basis, found.energies), f"{folder}/{ablation}{rank}.pt")
    lens = TunedLens.fit(toy(), [TOKENS[2 * rank : 2 * rank + 2]], **FIT)
    torch.save(_weights(lens), f"{folder}/lens{rank}.pt")
    torch.distributed.destroy_process_group()


FIT: Final[dict[str, Any]] = {"epochs": 3, "learning_rate": 1e-2, "progress": False}


def _weights(lens: TunedLens) -> list[Tensor]:
    return [x for t in lens.translators.values() for x in (t.weight, t.bias)]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found, each on half of the texts."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_alone, args=(port, str(folder)), nprocs=2)
    return folder


def test_two_processes_find_the_basis_of_one(of_two: Path):
    for ablation in ("mean", "resample"):
        whole = causal_basis(toy(), TOKENS, RESID_POST[0], k=2, ablation=ablation, tolerance=1e-14)
        (first, energies), (second, _) = (torch.load(of_two / f"{ablation}{rank}.pt") for rank in (0, 1))
        assert torch.equal(first, second)
        torch.testing.assert_close(first, whole.basis, rtol=0, atol=1e-6)
        torch.testing.assert_close(energies, whole.energies, rtol=1e-6, atol=1e-9)


def test_two_processes_fit_the_lens_of_one(of_two: Path):
    whole = _weights(TunedLens.fit(toy(), [TOKENS], **FIT))
    first, second = (torch.load(of_two / f"lens{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(bool(x.abs().max() > 1e-3) for x in whole), "it was fitted"
    for ours, theirs in zip(first, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_an_oblique_basis_is_removed_whole():
    x, A = torch.randn(10, 6, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    P = A @ torch.linalg.inv(A.mT @ A) @ A.mT
    torch.testing.assert_close(remove_subspace(x, A, "zero"), x - x @ P)
    torch.testing.assert_close(remove_subspace(x, A, "mean"), x - (x - x.mean(0)) @ P)
    torch.testing.assert_close(remove_subspace(x, A[:, 0], "zero"), remove_subspace(x, A[:, :1], "zero"))


def test_no_vector_stays_in_its_place():
    assert all(bool((deranged(n, s) != torch.arange(n)).all()) for n in (2, 3, 7) for s in range(20))


def test_subspaces_that_cannot_be_removed_are_refused():
    x = torch.randn(1, 6)
    with pytest.raises(HookGraphError, match="at least two vectors"):
        remove_subspace(x, torch.randn(6))
    with pytest.raises(HookGraphError, match="dependent"):
        remove_subspace(x, torch.ones(6, 2), "zero")
    with pytest.raises(ShapeMismatchError, match="one row per coordinate"):
        remove_subspace(x, torch.randn(5), "zero")


def test_a_graph_without_a_subspace_says_nothing_in_it():
    A = torch.randn(6, 2, dtype=torch.float64)
    run = ablate_subspace(toy(), RESID_POST[0], A, "zero").run(TOKENS, save=[RESID_POST[0]])
    torch.testing.assert_close(
        run[RESID_POST[0]] @ A, torch.zeros(4, 5, 2, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("unit", "axes"), [("batch", (0,)), ("token", (0, 1))])
def test_an_update_is_replaced_by_its_mean(unit: Unit, axes: tuple[int, ...]):
    before = toy().run(TOKENS, save=[MLP_OUT[0]])[MLP_OUT[0]]
    after = ablate_layer(toy(), MLP_OUT[0], unit=unit).run(TOKENS, save=[MLP_OUT[0]])[MLP_OUT[0]]
    torch.testing.assert_close(after, before.mean(axes, keepdim=True).expand_as(before))


def test_a_basis_through_a_tuned_lens_is_that_of_decoding_translated_states(
    graph: hg.HookGraph, tokens: dict[str, object]
):
    lens = TunedLens.fit(graph, [tokens], epochs=3, learning_rate=3e-3)
    found = causal_basis(graph, tokens, RESID_PRE[1], k=1, decoder=lens, tries=1, max_iter=40)
    assert found.convention["decoder"] == "TunedLens"
    kept = torch.as_tensor(tokens["attention_mask"]).bool()
    states, v = graph.run(tokens, save=[RESID_PRE[1]])[RESID_PRE[1]], found.basis[:, 0]
    translation = lens.translators[1]
    moved = states - ((states - states[kept].mean(0)) @ v)[..., None] * v
    before, after = (decoded(graph, tokens, translation(x)).log_softmax(-1) for x in (states, moved))
    energy = (before.exp() * (before - after)).sum(-1)[kept].mean()
    assert float(found.energies[0]) == pytest.approx(float(energy), rel=1e-5)


def test_a_logit_lens_after_the_last_layer_is_the_model(graph: hg.HookGraph, tokens: dict[str, object]):
    last = graph.every(RESID_POST)[-1]
    lens = causal_basis(graph, tokens, last, k=1, decoder=LogitLens(), tries=1, max_iter=60)
    model = causal_basis(graph, tokens, last, k=1, tries=1, max_iter=60)
    torch.testing.assert_close(lens.energies, model.energies, rtol=1e-4, atol=0)
