"""`direct_logit_attribution`: what each layer, head, neuron or latent adds to a logit difference directly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final, get_args

from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.metrics import Logit, LogitDifference, Tokens, logit, logit_diff
from hookgraph.algorithms.padding import check_finite
from hookgraph.algorithms.readouts.logit_attribution import LogitAttribution
from hookgraph.algorithms.readouts.splitting import Frozen, by_latents, by_writers, everything
from hookgraph.algorithms.streams import check_sum, if_present, last_residual, updates
from hookgraph.errors import HookGraphError, UnknownLocationError, nearest
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.examples import count_examples
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Reads, put, take
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import FINAL_LN_OUT, FINAL_LN_SCALE, RESID_PRE
from hookgraph.ontology.weights import W_U, b_U

Parts: TypeAlias = Literal["layer", "head", "neuron", "latent"]

_CLOSE = 1e-3
"""A residual below this share of the total is a rounding, also in half precision of the total's parts."""

_SUMMED = (Dimension.POS, Dimension.D_MODEL, Dimension.D_HEAD)


def direct_logit_attribution(
    graph: HookGraph,
    inputs: Inputs,
    correct: Tokens,
    wrong: Tokens | None = None,
    *,
    pos: Tokens = -1,
    by: Parts | Sequence[Parts] = "layer",
) -> LogitAttribution:
    """What every part of the residual stream adds to logit[correct] - logit[wrong] at position `pos`.

    The stream after the last layer is x = embeddings + Σ updates. With the scale s of the last norm held at
    its value, the logits before a soft-cap or scale are linear in x:

        logit[correct] - logit[wrong] = u · x + bias = Σ_parts u · part + bias

    with u the gradient of that difference at x for constant s, whatever kind of norm it is. An update is
    told apart further by what writes it: by `head` z[h] W_O[h], by `neuron` n[i] W_out[i], by `latent` an
    injected dictionary's latents and error. The scale of a norm after the update is held too. What none
    of these writes, such as the projection's bias, is `.rest`.

    Args:
        graph: the hooked model.
        inputs: what is run.
        correct: the answer's token id, one for all examples or one per example.
        wrong: that of the other answer; None for the logit of `correct` alone.
        pos: the position at which the logits are read.
        by: how updates are told apart; several, such as `["head", "neuron"]`, for each its own kind. Updates
            that none of them divides are one part each.

    Raises:
        HookGraphError: an unknown `by`, there is no dictionary to tell latents apart, or an update with one
            is to be divided among heads or neurons too; or the stream is not the sum of what is added to it.
        MetricError: a position or token is out of range, there is not one per example, or the stream is
            not finite.
        UnknownLocationError: the model lacks what is needed, such as the scale of its last norm.

    Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021); nostalgebraist,
    "interpreting GPT: the logit lens" (2020).
    """
    kinds = _kinds(by)
    frozen = _frozen(graph, inputs, correct, wrong, pos)
    parts = {place: frozen.along(frozen.run[place]) for place in frozen.places}
    rest: dict[Location, Tensor] = {}
    splits = by_writers(frozen, kinds)
    if "latent" in kinds:
        latents = by_latents(frozen)
        both = [str(x) for x in latents if x in splits]
        if both:
            raise HookGraphError(
                f"{', '.join(both)} has a dictionary, and is divided among {' and '.join(kinds)} at once, "
                "which would count it twice: ask for one of them at a time"
            )
        splits |= latents
    for update, (pieces, left) in splits.items():
        del parts[update]
        parts.update(pieces)
        rest[update] = left
    reduced: dict[Dimension, str] = dict.fromkeys(_SUMMED, "sum")
    attributed, remaining = Attribution(parts, reduced), Attribution(rest, reduced)
    explained = frozen.bias + sum(v.reshape(len(v), -1).sum(1) for v in (*parts.values(), *rest.values()))
    residual = frozen.total - explained
    if bool((residual.abs() > _CLOSE * frozen.total.abs().max()).any()):  # hooks on the stream may be why
        check_sum(
            graph,
            inputs,
            "direct logit attribution",
            "Use patching_effect, whose gradients see this",
        )
    return LogitAttribution(
        attributed, remaining, frozen.bias, frozen.total, residual, graph.binding.metadata
    )


def _kinds(by: Parts | Sequence[Parts]) -> tuple[Parts, ...]:
    kinds = (by,) if isinstance(by, str) else tuple(by)
    for kind in kinds:
        if kind not in get_args(Parts):
            raise HookGraphError(f"updates are not told apart by {kind!r}: {nearest(kind, get_args(Parts))}")
    return kinds


def _frozen(graph: HookGraph, inputs: Inputs, correct: Tokens, wrong: Tokens | None, pos: Tokens) -> Frozen:
    """The pass, and u: the gradient at the last residual with the last norm's scale constant."""
    last, out = last_residual(graph), if_present(graph, FINAL_LN_OUT)
    places = (graph.check(RESID_PRE[0]), *updates(graph))
    prepared = graph.binding.prepare(inputs)
    answer = logit(correct, pos) if wrong is None else logit_diff(correct, wrong, pos)
    batch = count_examples(prepared) or 1
    answer.check(batch)
    graph.binding.check_read(prepared, answer.reads)
    if out is None:
        run = graph.run(prepared, save=[*places, last, last.grad], metric=answer, logits=False)
        total = run.measured
    else:
        direction, offset = _unembedding(graph, answer, batch)
        held = _held(graph).hook(out.grad, _Push(answer.reads, direction))
        run = held.run(prepared, save=[*places, last, out, last.grad], metric=everything)
        total = (take(run[out], answer.reads)[:, 0] * direction).sum(-1) + offset
    check_finite({place: run[place] for place in (*places, last)})
    linear = (run[last] * run[last.grad]).flatten(1).sum(1)
    return Frozen(graph, prepared, run, places, run[last.grad], total, total - linear)


def _held(graph: HookGraph) -> HookGraph:
    """The graph with the scale of the last norm constant."""
    try:
        return graph.stop_gradient(FINAL_LN_SCALE)
    except UnknownLocationError as error:
        raise UnknownLocationError(
            f"the logits are divided among parts with the scale of the last norm held: {error}"
        ) from error


def _unembedding(graph: HookGraph, answer: Logit | LogitDifference, batch: int) -> tuple[Tensor, Tensor]:
    """W_U[:, correct] - W_U[:, wrong], one row per example, and the same of the bias."""
    table = graph.weight(W_U).detach()
    try:
        bias = graph.weight(b_U).detach()
    except UnknownLocationError:
        bias = table.new_zeros(table.shape[1])
    return answer.along(table, batch), answer.along(bias[None], batch)[:, 0]


@final
@dataclass(frozen=True, eq=False)
class _Push:
    """A gradient hook at what the unembedding reads: the difference's own gradient, whatever the metric."""

    reads: Reads
    direction: Float[Tensor, "batch d_model"]

    def __call__(self, gradient: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Zero but at the answer positions."""
        take(gradient, self.reads)  # which are there, or this says so
        return put(self.direction[:, None].to(gradient.dtype), self.reads, gradient.shape[1])
