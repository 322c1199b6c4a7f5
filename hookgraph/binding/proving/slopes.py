"""Prove that an edit has the effect that its gradient says: finite differences against autograd."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.binding.proving.edits import inside_kernel, live, replace_rows, rows_of, unmasked
from hookgraph.binding.proving.precision import rounding
from hookgraph.binding.proving.watching import Watch
from hookgraph.binding.running.outputs import per_example
from hookgraph.errors import MetricError
from hookgraph.graph.conformance import Gap, Proof
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location

_STEPS: Final = (1e-5, 1e-4, 1e-3, 1e-2, 4e-2)
"""Sizes of the finite differences, relative to the value: small ones for models that compute in double
precision throughout, larger ones for those that go through single precision inside."""

_FINE: Final = (1e-7, 1e-6)
"""What is tried beside them in double precision, where a model bends within the smallest of these."""

_COARSE: Final = (4e-3, 1e-2, 2e-2, 4e-2, 8e-2)
"""What is tried in lower precision, along another direction, where the rounding of a pass hides a slope."""

DEAD: Final = "on this example the logits do not depend on it"
_HIDDEN: Final = "in half precision a pass rounds by more than an edit changes"
_FLAT: Final = "within rounding the logits have no slope along it; larger edits change them"
CHOSEN_ANEW: Final = "where a choice changes"
_CUT: Final = (
    "an edit changes the logits, but the model computes them without gradients from here on, as through "
    "integers, under torch.no_grad() or in reentrant checkpointing"
)

_CUT_OFF: Final = "the model cuts off a part of the gradient by detach(); with that part they agree"

_PARTS: Final = (0.05, 0.5, 5.0)
"""How far an edit moves a value, relative to it, to see whether anything depends on it: where a small one
changes nothing, a larger one may lead to another choice, as of an expert.
"""

_POINTS: Final = 3
"""How many other points are tried where a choice, as of experts, changes within the smallest step."""


@final
@dataclass(frozen=True, slots=True)
class _Precision:
    """How exactly a pass can be measured.

    Args:
        tolerance: of a slope, relative to it.
        rounding: the relative error of a pass: ten roundings.
        reason: why it is not better.
    """

    tolerance: float
    rounding: float
    reason: str = ""


@final
@dataclass(frozen=True, slots=True)
class _Measured:
    """The slope at a location by finite differences, one for each step, and by autograd."""

    found: Float[Tensor, "..."]
    slope: float
    error: float
    flat: bool
    """Whether neither is more than the rounding of a pass: they agree, and nothing was measured."""
    chosen_anew: bool
    """Whether something else was chosen at one of the steps."""


class Slopes(NamedTuple):
    """What was proven of gradients, and where the model itself cuts them off."""

    proofs: list[Proof]
    gaps: list[Gap]


class _Passes(NamedTuple):
    """What is differentiated: a metric of passes of a graph over one example, along random directions.

    The gradients of `together` are asked for in each: one has to be the same alone and beside the others.
    A pass rounds in proportion to the `size` of what the metric adds up, of which little may be left.
    """

    graph: HookGraph
    example: Mapping[str, Any]
    metric: Metric
    size: float
    dtype: torch.dtype
    generator: torch.Generator
    together: Sequence[Location] = ()


def check_gradients(graph: HookGraph, example: Mapping[str, Any], clean: Run) -> Slopes:
    """Finite difference = gradient, along a direction that is half gradient, half random.

    Where it is not, but is with all that the model calls `detach()` on left in the gradient, nothing is
    proven: the edit is right, and the gradient is the one that the model is made to have.

    What is inside a fused kernel is edited in passes of its own: those may leave it for one that goes
    through single precision. Integers have no gradient; what an edit of them does is told by the algebra.
    """
    locations = [x for x in clean if clean[x].is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    shape = tuple(clean.logits.shape[1:])
    weights = torch.randn(shape, generator=generator).to(clean.logits)

    def terms(logits: Tensor) -> Tensor:
        return (unmasked(per_example(logits, shape)) * weights).flatten(1)

    def metric(logits: Tensor) -> Tensor:
        return terms(logits).sum(1)

    size = float(terms(clean.logits).double().norm())
    passes = _Passes(graph, example, metric, size, clean.logits.dtype, generator)
    proofs, gaps = list[Proof](), list[Gap]()
    for inside in (False, True):
        group = {x: clean[x] for x in locations if inside_kernel(x) == inside}
        try:
            found = _check_group(passes, group)
        except Exception:
            dead = _without_gradient(graph, example, list(group), metric)
            if not dead:
                raise
            cut = _effective(passes, [x for x, why in dead.items() if not why])
            notes = {x: why or (_CUT if x in cut else DEAD) for x, why in dead.items()}
            proofs += [Proof(x, "edit = gradient", False, 1.0, 0.0, note) for x, note in notes.items()]
            alive = {x: value for x, value in group.items() if x not in dead}
            found = _check_group(passes, alive)
        proofs += found.proofs
        gaps += found.gaps
    return Slopes(proofs, gaps)


def _check_group(passes: _Passes, values: Mapping[Location, Tensor]) -> Slopes:
    if not values:
        return Slopes([], [])
    passes = passes._replace(together=list(values))
    precision, measured = _measure(passes, values)
    wrong = {x: values[x] for x, found in measured.items() if found.error > precision.tolerance}
    if wrong:
        again = _measure(passes, wrong, steps=_COARSE if precision.reason else _FINE)[1]
        measured |= {x: found for x, found in again.items() if found.error <= precision.tolerance}
        wrong = {x: value for x, value in wrong.items() if measured[x].error > precision.tolerance}
    cut = _cut_off(passes, wrong)
    flat = [x for x, found in measured.items() if found.flat]
    dead = set(flat) - _effective(passes, flat)
    proofs, gaps = list[Proof](), list[Gap]()
    for location, found in measured.items():
        if location in cut:
            gaps.append(Gap(location, "edit = gradient", _CUT_OFF))
        elif location in dead and rounding(passes.dtype) > rounding(torch.float32):
            gaps.append(Gap(location, "edit = gradient", _HIDDEN))
        elif location in dead:
            proofs.append(Proof(location, "edit = gradient", False, 1.0, 0.0, DEAD))
        else:
            proofs.append(_proof(passes, location, found, precision))
    return Slopes(proofs, gaps)


def _proof(passes: _Passes, location: Location, found: _Measured, precision: _Precision) -> Proof:
    """Whether the slopes agree: at this point, or at another where nothing is chosen anew within a step."""
    note = _FLAT if found.flat else precision.reason
    for _ in range(_POINTS):
        if found.error <= precision.tolerance or not found.chosen_anew:
            break
        note = "at another point, as a choice changes within the step at this one"
        moved = passes.graph.hook(location, _mover(location, passes.generator, _PARTS[0]))
        value = moved.run(passes.example, save=[location])
        precision, again = _measure(passes._replace(graph=moved), value)
        found = again[location]
    holds = found.error <= precision.tolerance
    if not holds:
        note = f"finite difference {float(found.found[-1]):.4g}, gradient {found.slope:.4g}"
        note += f", {CHOSEN_ANEW}" if found.chosen_anew else ""
    return Proof(location, "edit = gradient", holds, found.error, precision.tolerance, note)


def _cut_off(passes: _Passes, values: Mapping[Location, Tensor]) -> set[Location]:
    """Where a gradient would be right if the model did not call `detach()`, and only then."""
    for whole in (True, False):
        if not values:
            break
        try:
            precision, found = _measure(passes, values, whole=whole)
        except MetricError:  # what has no effect may have no gradient either, by itself
            return set()
        values = {x: v for x, v in values.items() if (found[x].error <= precision.tolerance) == whole}
    return set(values)


def _mover(location: Location, generator: torch.Generator, part: float) -> Callable[[Tensor], Tensor]:
    """A hook that moves a value by about some part of its size, always to the same place."""
    seed = int(torch.randint(1 << 30, (1,), generator=generator))

    def move(value: Tensor) -> Tensor:
        own = torch.Generator().manual_seed(seed)
        noise = torch.randn((1, *value.shape[1:]), generator=own, dtype=torch.float64).to(value)
        size = torch.where(live(location, value), value, 0).detach().double().square().mean().sqrt()
        moved = value + (part * torch.where(size > 0, size, 1.0) * noise.double()).to(value)
        return torch.where(live(location, value), moved, value)

    return move


def _measure(
    passes: _Passes,
    values: Mapping[Location, Tensor],
    *,
    steps: Sequence[float] = _STEPS,
    whole: bool = False,
) -> tuple[_Precision, dict[Location, _Measured]]:
    """The slopes at all locations, in one pass backwards, `whole` or not, and one over all edits."""
    graph, example, metric, size, _, generator, together = passes
    with Watch(whole=whole) as plain:
        gradients = graph.run(example, save=[x.grad for x in together], metric=metric)
    per_location = 2 * len(steps)
    hooked, slopes, sizes = graph, dict[Location, float](), dict[Location, float]()
    for number, (location, value) in enumerate(values.items()):
        gradient = gradients[location.grad]
        direction = _direction(location, gradient, value, generator)
        slopes[location] = float((gradient.double() * direction.double()).sum())
        norm = torch.where(live(location, value), value, 0).double().norm()
        sizes[location] = max(float(norm), 1e-3) if norm else 1.0
        moves = [sign * step * sizes[location] for step in steps for sign in (1.0, -1.0)]
        edits = torch.cat([value + move * direction for move in moves])
        hooked = hooked.hook(location, replace_rows(number * per_location, edits))
    count = len(values) * per_location
    with Watch() as edited:
        outcome = metric(hooked.run(rows_of(graph, example, count)).logits).double()
    anew = edited.changed(plain, count).view(len(values), -1).any(-1)
    # The logits may have several rows per example, as one per codebook.
    outcome = outcome.view(len(values), len(steps), 2, -1).sum(-1).cpu()
    precision = _precision(next(iter(values.values())).dtype, plain.narrowed)
    rounded = precision.rounding * max(size, float(outcome.abs().max()))
    measured: dict[Location, _Measured] = {}
    for number, location in enumerate(values):
        distances = torch.tensor(steps, dtype=torch.float64) * sizes[location]
        found, slope = _slopes(outcome[number], distances), slopes[location]
        lost = rounded / float(distances[-1])  # slopes below this are lost in rounding
        off = float((found - slope).abs().min()) / max(abs(slope), lost / precision.tolerance, 1e-12)
        flat = max(abs(slope), float(found[len(steps) - 1].abs())) <= lost
        measured[location] = _Measured(found, slope, off, flat, bool(anew[number]))
    return precision, measured


def _slopes(outcome: Float[Tensor, "step 2"], steps: Float[Tensor, " step"]) -> Float[Tensor, "..."]:
    """The slope by each step, there and back; then each two neighbours, extrapolated to a step of zero."""
    found = (outcome[:, 0] - outcome[:, 1]) / (2 * steps)
    ratios = (steps[1:] / steps[:-1]) ** 2
    return torch.cat([found, (ratios * found[:-1] - found[1:]) / (ratios - 1)])


def _precision(dtype: torch.dtype, narrowed: int) -> _Precision:
    if dtype != torch.float64:
        return _Precision(5e-2, rounding(dtype), f"measured in {str(dtype).removeprefix('torch.')}")
    if narrowed:
        return _Precision(
            2e-3, rounding(torch.float32), f"the model goes through lower precision in {narrowed} operations"
        )
    return _Precision(1e-5, rounding(dtype))


def _without_gradient(
    graph: HookGraph, example: Mapping[str, Any], locations: Sequence[Location], metric: Metric
) -> dict[Location, str]:
    """The locations at which the metric has no gradient, with what the model's own backward pass raises."""
    try:
        graph.run(example, save=[x.grad for x in locations], metric=metric)
    except Exception as error:
        if len(locations) == 1:
            own = "" if isinstance(error, MetricError) else f"{type(error).__name__}: {error}"
            return {locations[0]: own and f"there is no gradient: {own}"}
        half = len(locations) // 2
        parts = (locations[:half], locations[half:])
        return {k: v for part in parts for k, v in _without_gradient(graph, example, part, metric).items()}
    return {}


def _effective(passes: _Passes, locations: Sequence[Location]) -> set[Location]:
    """The locations at which an edit changes the metric by more than a pass in single precision, or a lower
    one, rounds.

    The plain pass is hooked there as well: what is inside a fused kernel makes a model leave it.
    """
    graph, example, metric = passes.graph, passes.example, passes.metric
    generator = torch.Generator().manual_seed(3)
    coarse = max(rounding(dtype) for dtype in (passes.dtype, torch.float32))

    def outcome(location: Location, hook: Callable[[Tensor], Tensor]) -> Tensor:
        return metric(graph.hook(location, hook).run(example).logits).double()

    def changed(location: Location) -> bool:
        plain = outcome(location, torch.clone)
        lost = coarse * max(passes.size, float(plain.abs().max()))
        movers = (_mover(location, generator, part) for part in _PARTS)
        return any(not float((outcome(location, x) - plain).abs().max()) <= lost for x in movers)

    return {x for x in locations if changed(x)}


def _direction(location: Location, gradient: Tensor, value: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    noise = torch.where(live(location, value), noise, 0)
    mixed = gradient / gradient.norm().clamp_min(1e-30) + noise / noise.norm().clamp_min(1e-30)
    return (mixed / mixed.norm().clamp_min(1e-30)).to(value.dtype)
