"""`ablate`: a graph without what locations tell it: zero, their mean, another example's value, a constant."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hookgraph.algorithms.interventions.statistics import AblationStatistics, with_optimal
from hookgraph.algorithms.padding import real_tokens
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import chosen_places
from hookgraph.errors import HookGraphError, InputError, ShapeMismatchError, nearest
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.ontology.locations import Location

AblationMode: TypeAlias = Literal["zero", "mean", "resample", "optimal"]


def ablate(
    graph: HookGraph,
    at: Sequence[Location],
    mode: AblationMode = "mean",
    *,
    statistics: AblationStatistics | None = None,
    seed: int = 0,
) -> HookGraph:
    """A graph in which locations, or parts of them, say nothing of their own example.

    * `zero`: x -> 0.
    * `mean`: x -> its mean over a data set, from `mean_activations`.
    * `resample`: x[b] -> x[σ(b)] of the same pass, σ a permutation that moves every example, drawn from
      `seed` for the size of the batch: the same for every location and every pass.
    * `optimal`: x -> the constant with which the model does best, from `optimal_constants`.

    Args:
        graph: the hooked model.
        at: what is ablated.
        mode: see above.
        statistics: what `mean` and `optimal` put in place.
        seed: of the permutation.

    Raises:
        HookGraphError: an unknown mode, statistics that lack a location; when it is run, a batch of one
            example to resample.
        UnknownLocationError: the graph has no such location.
        ShapeMismatchError: when it is run, a longer input than means per position were taken of.

    Source: Wang et al., arXiv:2211.00593 (mean); Chan et al., "Causal scrubbing" (2022) (resample);
    Li & Janson, arXiv:2409.09951 (optimal).
    """
    if mode not in get_args(AblationMode):
        raise HookGraphError(f"unknown ablation {mode!r}: {nearest(mode, get_args(AblationMode))}")
    for place in chosen_places(graph, at):
        if mode == "zero":
            graph = graph.hook(place, torch.zeros_like)
        elif mode == "resample":
            graph = graph.hook(place, _Resample(place, seed))
        elif statistics is None:
            made = "mean_activations" if mode == "mean" else "optimal_constants"
            raise HookGraphError(f"{mode} ablation needs statistics: statistics={made}(graph, data, at)")
        else:
            graph = graph.hook(place, _Constant(place, statistics.of(place, mode)))
    return graph


def moved(count: int, seed: int) -> Int[Tensor, " batch"]:
    """A random permutation of `count` examples, all in one cycle, so that none stays (Sattolo's algorithm).

    Raises:
        HookGraphError: there are fewer than two.
    """
    if count < 2:
        raise HookGraphError(f"resampling takes another example's value, and the batch has {count}: pass two")
    generator = torch.Generator().manual_seed(seed)
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = int(torch.randint(i, (1,), generator=generator))
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order)


@final
@dataclass(frozen=True, slots=True)
class _Resample:
    location: Location
    seed: int

    def __call__(self, value: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "batch ..."]:
        return value[moved(len(value), self.seed).to(value.device)]


@final
@dataclass(frozen=True, eq=False)
class _Constant:
    location: Location
    constant: Float[Tensor, "..."]

    def __call__(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        found = self.constant.to(value)
        cut = tuple(
            slice(n) if k > 1 else slice(None) for n, k in zip(value.shape[1:], found.shape, strict=True)
        )
        try:
            return found[cut].expand(value.shape).clone()
        except RuntimeError as error:
            raise ShapeMismatchError(
                f"{self.location} has shape {tuple(value.shape)}, its constant {tuple(found.shape)}: "
                "use means over all positions, or inputs no longer than those that they were taken of"
            ) from error


def optimal_constants(
    graph: HookGraph,
    data: Iterable[Inputs],
    at: Sequence[Location],
    statistics: AblationStatistics,
    *,
    loss: Metric | None = None,
    steps: int = 100,
    learning_rate: float = 0.03,
    seed: int = 0,
    progress: bool | None = None,
) -> AblationStatistics:
    """The constants with which the ablated model does best: argmin over a of the mean loss(model | x := a).

    Starts at the means and follows Adam, one batch per step, in an order drawn from `seed`. All locations
    are ablated together, so that the constants belong to one another.

    Args:
        graph: the hooked model.
        data: batches of inputs; they are kept.
        at: what is ablated.
        statistics: the means, from `mean_activations` of the same locations.
        loss: logits -> one number per example, the less the better; by default the KL divergence from the
            whole model's next-token distribution, mean over real tokens.
        steps: how many.
        learning_rate: of Adam, in units of the root mean square of each mean.
        seed: of the order of batches.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        InputError: there is no data.
        HookGraphError: the statistics lack a location.

    Source: Li & Janson, "Optimal ablation for interpretability", arXiv:2409.09951.
    """
    places = chosen_places(graph, at)
    batches = [graph.binding.prepare(x) for x in data]
    if not batches:
        raise InputError("there is no data to fit constants to: pass an iterable of batches")
    constants = {x: statistics.of(x, "mean").detach().clone().requires_grad_() for x in places}
    sizes = [float(v.detach().square().mean().sqrt()) or 1.0 for v in constants.values()]
    groups = [
        {"params": [v], "lr": learning_rate * size} for v, size in zip(constants.values(), sizes, strict=True)
    ]
    optimizer = torch.optim.Adam(groups)
    ablated = graph
    for place in places:
        ablated = ablated.hook(place, _Constant(place, constants[place]))
    targets = [None if loss else graph.run(x).logits.log_softmax(-1) for x in batches]
    generator = torch.Generator().manual_seed(seed)
    with Progress("fitting constants", steps, shown=progress) as bar:
        for _ in range(steps):
            chosen = int(torch.randint(len(batches), (1,), generator=generator))
            with graph.binding.frozen():
                logits = ablated.run(batches[chosen], grad=True).logits
                target = targets[chosen]
                value = loss(logits) if loss else _divergence(logits, target, batches[chosen])
                found = torch.autograd.grad(value.mean(), list(constants.values()))
            for constant, gradient in zip(constants.values(), found, strict=True):
                constant.grad = gradient
            optimizer.step()
            bar.advance()
    return with_optimal(statistics, {x: v.detach() for x, v in constants.items()}, seed)


def _divergence(
    logits: Float[Tensor, "batch pos vocab"], target: Tensor | None, inputs: object
) -> Float[Tensor, " batch"]:
    if target is None or not isinstance(inputs, dict):
        raise ValueError("there are targets where there is no loss")
    gap = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)
    real = real_tokens(inputs, *gap.shape).to(gap)
    return (gap * real).sum(1) / real.sum(1)
