"""Effects from gradients against finite differences, and against gradients of plain passes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.effects.quadrature import nodes_and_weights
from hookgraph.graph.measuring import Metric
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location
from hookgraph_tests.sweep.effects.findings import Finding, compared, told
from hookgraph_tests.sweep.effects.trials import Trial, metrics

_STEPS = (1e-4, 1e-6)
_TOLERANCE = 1e-5
_POINTS = 3


def attrib(trial: Trial, places: Sequence[Location], clean: Run, corrupt: Run) -> Iterator[Finding]:
    """Attribution patching of whole locations: the first order of the change along corrupt - clean.

    Where a model bends within a large step, a small one tells.
    """
    base = trial.graph.run(trial.clean).logits
    name, metric = next(iter(metrics(base, len(next(iter(corrupt.values())))).items()))

    def measure(these: Sequence[Location]) -> Tensor:
        found = patching_effect(trial.graph, trial.clean, trial.corrupt, metric, these)
        return torch.stack([found.effects[x].reshape(len(base), -1).sum(1) for x in these])

    expected = {place: _slope(trial, metric, place, clean, corrupt, _STEPS[0]) for place in places}
    first = [*compared(f"attrib/{name}", places, measure, expected, metric(base), _TOLERANCE)]
    if any(x.verdict == "wrong" for x in first):
        expected = {place: _slope(trial, metric, place, clean, corrupt, _STEPS[1]) for place in places}
        first = [*compared(f"attrib/{name}", places, measure, expected, metric(base), _TOLERANCE)]
    yield from first


def _slope(trial: Trial, metric: Metric, place: Location, clean: Run, corrupt: Run, step: float) -> Tensor:
    delta = torch.where(corrupt[place] == clean[place], 0.0, corrupt[place] - clean[place])
    ends = [
        metric(trial.graph.hook(place, lambda x, s=s: x + s * delta).run(trial.clean).logits)
        for s in (step, -step)
    ]
    return (ends[0] - ends[1]) / (2 * step)


def integrals(trial: Trial, places: Sequence[Location], clean: Run, corrupt: Run) -> Iterator[Finding]:
    """Integrated gradients against the same points run one by one, and what they leave out."""
    base = trial.graph.run(trial.clean).logits
    for name, metric in [] if not places else [*metrics(base, len(next(iter(corrupt.values())))).items()][:2]:
        try:
            found = patching_effect(
                trial.graph, trial.clean, trial.corrupt, metric, places, "ig", steps=_POINTS, progress=False
            )
            sums = {x: found.effects[x].reshape(len(base), -1).sum(1) for x in places}
            missing = {x: found.residuals[x] for x in places}
        except Exception as error:
            yield Finding(f"ig/{name}", *told(error))
            continue
        expected = {x: _integral(trial, metric, x, clean, corrupt) for x in places}
        ends = {
            x: metric(trial.graph.hook(x, lambda _, x=x: corrupt[x]).run(trial.clean).logits) for x in places
        }
        left = {x: expected[x] - (ends[x] - metric(base)) for x in places}
        scale = metric(base)
        yield from compared(f"ig/{name}", places, lambda these: _stack(sums, these), expected, scale)  # noqa: B023
        yield from compared(f"residual/{name}", places, lambda these: _stack(missing, these), left, scale)  # noqa: B023


def _stack(found: dict[Location, Tensor], places: Sequence[Location]) -> Tensor:
    return torch.stack([found[x] for x in places])


def _integral(trial: Trial, metric: Metric, place: Location, clean: Run, corrupt: Run) -> Tensor:
    """Σ w dm/dz(α) · (corrupt - clean), a pass for each α."""
    total = torch.zeros(())
    for alpha, weight in zip(*nodes_and_weights("gauss-legendre", _POINTS), strict=True):
        moved = torch.lerp(clean[place], corrupt[place], alpha).requires_grad_()
        run = trial.graph.hook(place, lambda _, moved=moved: moved).run(trial.clean, grad=True)
        (slope,) = torch.autograd.grad(metric(run.logits).sum(), moved)
        total = total + weight * ((corrupt[place] - clean[place]) * slope).flatten(1).sum(1)
    return total
