"""`optimal_constants`: the constants that an ablated model does best with."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hookgraph.algorithms.batches import stream_of
from hookgraph.algorithms.interventions.ablation import placed
from hookgraph.algorithms.interventions.replacements import Constant
from hookgraph.algorithms.interventions.statistics import AblationStatistics, with_optimal
from hookgraph.algorithms.padding import real_tokens
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import chosen_places
from hookgraph.errors import InputError, MetricError
from hookgraph.graph.abstract import Inputs, Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric, measure
from hookgraph.ontology.locations import Location


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
        InputError: there is no data, or it is no stream of batches.
        HookGraphError: the statistics lack a location.
        MetricError: the loss is not one finite number per example, or does not depend on a location.

    Source: Li & Janson, "Optimal ablation for interpretability", arXiv:2409.09951.
    """
    places = chosen_places(graph, at)
    batches = [graph.binding.prepare(x) for x in stream_of(data)]
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
        ablated = ablated.hook(*placed(place, Constant(place, constants[place])))
    losses = [loss or _Divergence.of(graph, x) for x in batches]
    generator = torch.Generator().manual_seed(seed)
    with Progress("fitting constants", steps, shown=progress) as bar:
        for _ in range(steps):
            chosen = int(torch.randint(len(batches), (1,), generator=generator))
            gradients = _gradients(ablated, batches[chosen], losses[chosen], constants)
            for place, gradient in gradients.items():
                constants[place].grad = gradient
            optimizer.step()
            bar.advance()
    return with_optimal(statistics, {x: v.detach() for x, v in constants.items()}, seed)


def _gradients(
    ablated: HookGraph, inputs: Prepared, loss: Metric, constants: dict[Location, Tensor]
) -> dict[Location, Float[Tensor, "..."]]:
    """Of the mean loss, by constant.

    Raises:
        MetricError: the loss is not one finite number per example, or does not depend on a constant.
    """
    with ablated.binding.frozen():
        value = measure(loss, ablated.run(inputs, grad=True).logits, taken=False).mean()
        if not bool(value.isfinite()):
            raise MetricError("the loss is not a finite number: use smaller steps, or look at the inputs")
        if not value.requires_grad:
            raise MetricError(f"the loss does not depend on {', '.join(map(str, constants))}")
        found = torch.autograd.grad(value, list(constants.values()), allow_unused=True)
    unused = [str(x) for x, gradient in zip(constants, found, strict=True) if gradient is None]  # pyright: ignore[reportUnnecessaryComparison] (stubs)
    if unused:
        raise MetricError(f"the loss does not depend on {', '.join(unused)}: no path leads from there to it")
    return dict(zip(constants, found, strict=True))


@final
@dataclass(frozen=True, eq=False)
class _Divergence:
    """KL(whole model ‖ this) of the next-token distributions, in nats, mean over real tokens."""

    target: Float[Tensor, "batch pos vocab"]
    """Log-probabilities of the whole model."""
    real: Bool[Tensor, "batch pos"]

    @staticmethod
    def of(graph: HookGraph, inputs: Prepared) -> "_Divergence":
        """From the model with nothing ablated."""
        target = graph.run(inputs).logits.log_softmax(-1)
        return _Divergence(target, real_tokens(inputs, target))

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        gap = (self.target.exp() * (self.target - logits.log_softmax(-1))).sum(-1)
        return (gap * self.real).sum(1) / self.real.sum(1)
