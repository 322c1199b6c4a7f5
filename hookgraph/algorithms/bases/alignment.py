"""`stimulus_response`: whether a lens reads at a location what the rest of the model makes of it."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.bases.energies import Decode, States, model_after, through
from hookgraph.algorithms.bases.responses import StimulusResponse
from hookgraph.algorithms.bases.subspaces import away_from_target
from hookgraph.algorithms.padding import check_finite, real_tokens
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.readouts.decoding import decoded
from hookgraph.algorithms.readouts.lens import check_residual
from hookgraph.algorithms.readouts.lenses import Lens, LogitLens
from hookgraph.errors import HookGraphError, nearest
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import RESID_POST

Intervention: TypeAlias = Literal["noise", "resample", "lens"]

Rows: TypeAlias = Float[Tensor, "... vocab"]
_INVERSION = 50


def stimulus_response(
    graph: HookGraph,
    inputs: Inputs,
    at: Sequence[Location] | None = None,
    *,
    lens: Lens | None = None,
    intervention: Intervention = "resample",
    noise: float = 0.5,
    seed: int = 0,
    progress: bool | None = None,
) -> StimulusResponse:
    """cos(stimulus, response): how the lens' logits change with the states, and how those of the model do.

    At each location in turn all states h change to h', the rest of the model runs, and
    stimulus = log softmax(D(h') - D(h)), response = log softmax(final' - final). The cosine is Aitchison's,
    with weights w = (p + p')/2 of the model's own distributions: ⟨x, y⟩ = Σ w clr(x) clr(y),
    clr(x) = x - Σ w x.

    * `noise`: h' = h + ε, ε normal with `noise` times the root mean square of the states.
    * `resample`: h' = another state, every one moved, drawn from `seed`.
    * `lens`: h' is the state near h at which the lens says what it says at another one; what the lens cannot
      read stays.

    Args:
        graph: the hooked model.
        inputs: what is run. Padding, as the attention mask tells it, neither changes nor counts.
        at: the residuals; by default `resid.post` of every layer.
        lens: D; by default the logit lens.
        intervention: see above.
        noise: of `noise`.
        seed: of the noise and the permutation.
        progress: whether a bar is shown; by default on a terminal, if it takes long.

    Raises:
        HookGraphError: an unknown intervention, or fewer than two states to resample.
        LocationError: a location is no whole residual.
        MetricError: a state is not finite.
        UnknownLocationError: the graph has no such location, or the lens no translator for it.

    Source: Belrose et al., arXiv:2303.08112, section 4.2.
    """
    if intervention not in get_args(Intervention):
        known = get_args(Intervention)
        raise HookGraphError(f"unknown intervention {intervention!r}: {nearest(intervention, known)}")
    lens = lens or LogitLens()
    places = tuple(dict.fromkeys(graph.every(RESID_POST) if at is None else at))
    prepared = graph.binding.prepare(inputs)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with Progress("stimulus and response", len(places), shown=progress) as bar:
        for place in places:
            translation = lens.translation(check_residual(graph, place))
            read = through(partial(decoded, graph, prepared), translation)
            after, run = model_after(graph, prepared, place)
            check_finite({place: run[place]})
            states = States(run[place].detach(), real_tokens(prepared, run[place]))
            changed = _changed(states, read, intervention, noise, seed)
            found.append(_aligned(states, changed, read, after))
            bar.advance()
    similarity, stimulus, response = (torch.stack(part) for part in zip(*found, strict=True))
    convention = {"intervention": intervention, "lens": type(lens).__name__, "seed": str(seed)}
    return StimulusResponse(places, similarity, stimulus, response, convention, graph.binding.metadata)


def aitchison(x: Rows, y: Rows, weights: Rows) -> Float[Tensor, "..."]:
    """Σ w clr(x) clr(y) / √(Σ w clr(x)² Σ w clr(y)²), clr(x) = x - Σ w x, over the last axis.

    Args:
        x: log-probabilities, up to a constant.
        y: likewise.
        weights: w, which sum to 1.
    """
    x, y = (z - (weights * z).sum(-1, keepdim=True) for z in (x, y))
    inner, first, second = ((weights * product).sum(-1) for product in (x * y, x * x, y * y))
    return inner / (first * second).sqrt()


@torch.no_grad()
def _aligned(
    states: States, changed: Float[Tensor, "batch pos d_model"], read: Decode, after: Decode
) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """The cosine, and the sizes of stimulus and response."""
    before, then = (_said(read, x, states) for x in (states.value, changed))
    model, moved = (_said(after, x, states) for x in (states.value, changed))
    cosine = aitchison(then - before, moved - model, (model.exp() + moved.exp()) / 2)
    sizes = _kl(before, then), _kl(model, moved)
    return _placed(cosine, states), _placed(sizes[0], states), _placed(sizes[1], states)


def _said(decode: Decode, value: Float[Tensor, "batch pos d_model"], states: States) -> Rows:
    """Log-probabilities at the positions that count."""
    return decode(value)[states.kept].log_softmax(-1)


def _kl(before: Rows, after: Rows) -> Float[Tensor, "..."]:
    return (before.exp() * (before - after)).sum(-1)


def _placed(values: Float[Tensor, "..."], states: States) -> Float[Tensor, "batch pos"]:
    """NaN where there is padding."""
    whole = values.new_full(states.kept.shape, torch.nan)
    whole[states.kept] = values
    return whole


def _changed(
    states: States, read: Decode, intervention: Intervention, noise: float, seed: int
) -> Float[Tensor, "batch pos d_model"]:
    rows = states.rows
    if intervention == "noise":
        drawn = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return states.replaced(rows + noise * rows.square().mean().sqrt() * drawn.to(rows))
    others = states.replaced(rows - away_from_target(rows, "resample", seed))
    if intervention == "resample":
        return others
    with torch.no_grad():
        target = _said(read, others, states)
    return _inverted(states, read, target)


def _inverted(states: States, read: Decode, target: Rows) -> Float[Tensor, "batch pos d_model"]:
    """argmin over h' of Σ KL(target ‖ softmax D(h')), by L-BFGS from h."""
    moved = states.rows.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([moved], max_iter=_INVERSION, line_search_fn="strong_wolfe")

    def closure() -> float:
        with torch.enable_grad():
            loss = _kl(target, _said(read, states.replaced(moved), states)).mean()
            (moved.grad,) = torch.autograd.grad(loss, moved)
        return float(loss.detach())

    optimizer.step(closure)
    return states.replaced(moved.detach())
