"""`logit_lens`: what the model would say if it ended after each layer."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.padding import check_finite
from hookgraph.algorithms.readouts.decoding import decoded
from hookgraph.algorithms.readouts.lenses import Lens, LogitLens
from hookgraph.algorithms.readouts.trajectory import PredictionTrajectory
from hookgraph.algorithms.streams import last_residual
from hookgraph.errors import HookGraphError, LocationError
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import LOGITS, RESID_POST

_HALF = (torch.float16, torch.bfloat16)
_STREAM = (Dimension.BATCH, Dimension.POS, Dimension.D_MODEL)


def logit_lens(
    graph: HookGraph,
    inputs: Inputs,
    at: Sequence[Location] | None = None,
    *,
    lens: Lens | None = None,
    pos: int | Sequence[int] | None = None,
    k: int = 5,
    follow: Sequence[int] = (),
) -> PredictionTrajectory:
    """softmax(unembedding(norm(T x))) for the residual x after each layer: its k most likely tokens.

    Everything after the last layer, soft-caps and all, is the model's own, run with T x in the place of the
    last residual. T is the lens' translation; without one x itself. After the last layer the lens is what
    the model says.

    Args:
        graph: the hooked model; its hooks apply to the pass that is read, not to the lens.
        inputs: what is run.
        at: the residuals to read; by default `resid.post` of every layer.
        lens: a `TunedLens`; by default the logit lens.
        pos: the positions to read, those of each row's tokens where the batch is padded; by default every
            column of the batch, padding included.
        k: how many tokens.
        follow: tokens whose log-probability and rank are told everywhere.

    Raises:
        LocationError: a location is no whole residual, or a position is out of range.
        MetricError: a residual is not finite.
        HookGraphError: k is less than 1 or there are fewer tokens, or a token to follow is none.
        UnknownLocationError: the graph has no such location, or the lens no translator for it.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); Belrose et al.,
    arXiv:2303.08112 (tuned lens, prediction trajectory).
    """
    places = tuple(dict.fromkeys(graph.every(RESID_POST) if at is None else at))
    lens = lens or LogitLens()
    for place in places:
        check_residual(graph, place)
        lens.translation(place)
    prepared = graph.binding.prepare(inputs)
    last = last_residual(graph)
    run = graph.run(prepared, save=list(dict.fromkeys([*places, last])))
    check_finite(run)
    placed = graph.binding.place(prepared) is not None
    chosen = _positions(pos, run[last].shape[1], placed=placed)
    here = LOGITS if pos is None else LOGITS.at(pos=chosen)
    said = _log_probs(decoded(graph, prepared, run[last], here))
    if not 1 <= k <= said.shape[-1]:
        raise HookGraphError(f"k={k}: there are {said.shape[-1]} tokens to rank")
    for token in follow:
        if not 0 <= token < said.shape[-1]:
            raise HookGraphError(f"follow={token}: there are {said.shape[-1]} tokens, the first is 0")
    found = [_told(_log_probs(_through(graph, run, x, lens, here)), said, k, list(follow)) for x in places]
    parts = {name: torch.stack([x[name] for x in found]) for name in found[0]}
    names = graph.binding.token_texts([*parts["tokens"].unique().tolist(), *follow])
    return PredictionTrajectory(
        locations=places,
        positions=tuple(chosen),
        followed=tuple(follow),
        lens=type(lens).__name__,
        metadata=graph.binding.metadata,
        _names=names,
        **parts,
    )


def lens_logits(
    graph: HookGraph, run: Run, at: Sequence[Location], lens: Lens | None = None
) -> Mapping[Location, Float[Tensor, "batch pos vocab"]]:
    """All logits that a lens makes of what a run saved at locations of the stream.

    Raises:
        HookGraphError: inputs are given in place of their run.
        LocationError: a location is no whole residual.
        UnknownLocationError: the run has not saved a location, or the lens no translator for it.
    """
    if not isinstance(run, Run):  # pyright: ignore[reportUnnecessaryIsInstance] (users)
        raise HookGraphError(
            f"lens_logits reads what a run saved, not a {type(run).__name__}: graph.run(inputs, save=at)"
        )
    return {x: _through(graph, run, check_residual(graph, x), lens or LogitLens(), LOGITS) for x in at}


def check_residual(graph: HookGraph, place: Location) -> Location:
    """A location that a lens can read.

    Raises:
        LocationError: it is no whole residual.
        UnknownLocationError: the graph has no such location.
    """
    graph.check(place)
    if place.dims != _STREAM or place != place.whole or place.site is not None:
        raise LocationError(f"{place} is not the stream at all positions: read resid.pre, mid or post")
    return place


def _through(
    graph: HookGraph, run: Run, place: Location, lens: Lens, at: Location
) -> Float[Tensor, "batch pos vocab"]:
    translate = lens.translation(place)
    value = run[place] if translate is None else translate(run[place])
    return decoded(graph, run.inputs, value, at)


def _log_probs(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos vocab"]:
    return (logits.float() if logits.dtype in _HALF else logits).log_softmax(-1)


def _told(
    log_probs: Float[Tensor, "batch pos vocab"],
    said: Float[Tensor, "batch pos vocab"],
    k: int,
    follow: list[int],
) -> dict[str, Tensor]:
    """What a trajectory tells of one location, given what the model said."""
    best = log_probs.topk(k)
    followed = log_probs[..., follow]
    return {
        "tokens": best.indices,
        "log_probs": best.values,
        "entropy": torch.special.entr(log_probs.exp()).sum(-1),
        "divergence": torch.nn.functional.kl_div(log_probs, said, reduction="none", log_target=True).sum(-1),
        "followed_log_probs": followed,
        "followed_ranks": (log_probs[..., None, :] > followed[..., None]).sum(-1),
    }


def _positions(pos: int | Sequence[int] | None, length: int, *, placed: bool) -> list[int]:
    """The positions to read. With padding those from the end keep their sign: in each row they are others."""
    wanted = range(length) if pos is None else torch.as_tensor(pos).view(-1).tolist()
    for place in wanted:
        if not -length <= place < length:
            raise LocationError(f"pos={place} is out of range, the inputs have {length} positions")
    return [place if placed else place % length for place in wanted]
