"""`causal_basis`: the directions of a location without which the output changes most."""

from functools import partial
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.algorithms import reduction
from hookgraph.algorithms.bases.energies import (
    DecodedEnergy,
    Loss,
    States,
    checked_labels,
    model_after,
    through,
)
from hookgraph.algorithms.bases.greedy import Energy, greedy
from hookgraph.algorithms.bases.rank_one import LensEnergy, ending
from hookgraph.algorithms.bases.results import CausalBasis
from hookgraph.algorithms.bases.starts import starts
from hookgraph.algorithms.bases.subspaces import Removal, deranged
from hookgraph.algorithms.padding import check_finite, real_tokens
from hookgraph.algorithms.readouts.decoding import decoded
from hookgraph.algorithms.readouts.lens import check_residual
from hookgraph.algorithms.readouts.lenses import Lens
from hookgraph.errors import HookGraphError, LocationError, nearest
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location


def causal_basis(
    graph: HookGraph,
    inputs: Inputs,
    at: Location,
    k: int = 8,
    ablation: Removal = "mean",
    decoder: Lens | None = None,
    *,
    labels: Int[Tensor, "batch pos"] | None = None,
    tries: int = 3,
    max_iter: int = 200,
    tolerance: float = 1e-8,
    min_energy: float = 1e-9,
    seed: int = 0,
    progress: bool | None = None,
) -> CausalBasis:
    """v_j = argmax E(v), |v| = 1, v ⟂ v_1..v_{j-1}; E(v) = mean_n KL(softmax D(h_n) ‖ softmax D(R_v h_n)).

    R_v h = h - v (v · (h - target)), the target being 0, the mean state, or another state. D is the rest
    of the model, all positions ablated at once, or a lens. Where a group of processes is initialised, each
    passes its own inputs, and all get the same basis.

    Args:
        graph: the hooked model.
        inputs: what is run. Padding, as the attention mask tells it, does not count.
        at: a location with batch and positions, whole.
        k: how many directions at most.
        ablation: the target: `zero`, `mean` or `resample`, whose permutation is drawn once per direction.
        decoder: a lens, for the stream; by default the rest of the model.
        labels: the loss is then the increment of cross-entropy to these tokens; negative ones are left out.
        tries: how many of the starts are followed: axes drawn from the seed, singular vectors of the
            unembedding, and the directions to which the model's own choice is most sensitive.
        max_iter: L-BFGS iterations for each start.
        tolerance: the relative change of E at which a search ends.
        min_energy: a direction of less is not in the basis, and ends it.
        seed: of the axes and of the permutations.
        progress: whether a bar is shown; by default on a terminal, if it takes long.

    Raises:
        HookGraphError: k is out of range, an unknown ablation, or fewer than two states for it.
        LocationError: the location is a part, or has no positions, or a lens cannot read it.
        UnknownLocationError: the graph has no such location, or the lens no translator for it.
        ShapeMismatchError: labels of another shape than the inputs.
        MetricError: a state is not finite.

    Source: Belrose et al., arXiv:2303.08112, section 4.1.
    """
    place = _checked(graph, at, ablation, lens=decoder is not None)
    prepared = graph.binding.prepare(inputs)
    decode, run = model_after(graph, prepared, place)
    value = run[place].detach()
    check_finite({place: value})
    kept = real_tokens(prepared, value)
    if labels is not None:
        kept = kept & checked_labels(labels, tuple(value.shape[:2])).to(kept.device)
    states = States(value, kept)
    width = states.rows.shape[-1]
    if not 1 <= k <= width:
        raise HookGraphError(f"k={k}: {place} has {width} dimensions, ask for 1 to {width} directions")
    targets = k if ablation == "resample" else 1
    rest = [_rest(states.rows, ablation, seed, j) for j in range(targets)]
    translation = None if decoder is None else decoder.translation(place)
    end = partial(decoded, graph, prepared)
    if decoder is not None:
        decode = through(end, translation)
    with torch.no_grad():
        before = decode(value)[kept].log_softmax(-1)
    loss = Loss(before, None if labels is None else labels.to(kept.device)[kept])
    found = None if decoder is None else ending(graph, end, value)

    def energy(j: int) -> Energy:
        away = rest[j % targets]
        if found is None:
            return DecodedEnergy(states, away, decode, loss)
        return LensEnergy(states.rows, away, loss, found, translation)

    basis, energies = greedy(
        energy,
        starts(graph, states, decode, translation, k, seed),
        k,
        tries=tries,
        max_iter=max_iter,
        tolerance=tolerance,
        min_energy=min_energy,
        progress=progress,
    )
    convention = {
        "ablation": ablation,
        "decoder": "model" if decoder is None else type(decoder).__name__,
        "loss": "KL" if labels is None else "cross-entropy",
        "seed": str(seed),
    }
    return CausalBasis(basis.to(value), energies.to(value), place, convention, graph.binding.metadata)


def _checked(graph: HookGraph, at: Location, ablation: str, *, lens: bool) -> Location:
    if ablation not in get_args(Removal):
        raise HookGraphError(f"unknown ablation {ablation!r}: {nearest(ablation, get_args(Removal))}")
    graph.check(at)
    if at != at.whole or at.dims[:2] != (Dimension.BATCH, Dimension.POS) or len(at.dims) < 3:
        raise LocationError(f"a basis is that of vectors at every position, {at} is not: name it whole")
    return check_residual(graph, at) if lens else at


def _rest(
    rows: Float[Tensor, "... d_model"], ablation: Removal, seed: int, j: int
) -> Float[Tensor, "... d_model"]:
    """h - target, over the states of all processes.

    Raises:
        HookGraphError: fewer than two states.
    """
    if ablation == "zero":
        return rows
    count = int(reduction.summed(rows.new_tensor(len(rows)).double()))
    if count < 2:
        raise HookGraphError(
            f"ablation {ablation!r} needs at least two states, there is {count}: pass more tokens, or 'zero'"
        )
    if ablation == "mean":
        return rows - (reduction.summed(rows.double().sum(0)) / count).to(rows)
    everyone, first = reduction.gathered(rows)
    order = deranged(count, seed * 1_000_003 + j).to(rows.device)
    return rows - everyone[order[first : first + len(rows)]]
