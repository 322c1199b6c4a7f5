"""The energy of a direction and its gradient, against autograd through the model's own modules.

W10 of the specification, on random models of GPT-2 small's size: one evaluation at a common point, since the
paths of a line search are chaotic. Run it with `python -m benchmarks.bases`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import GPT2Config

from benchmarks.harness import Comparison
from benchmarks.overhead import Subject, registered, subject_of
from benchmarks.running import run
from hookgraph.algorithms.bases.energies import DecodedEnergy, Loss, States, model_after
from hookgraph.algorithms.bases.greedy import Energy, evaluated
from hookgraph.algorithms.bases.rank_one import LensEnergy, ending
from hookgraph.algorithms.readouts.decoding import decoded
from hookgraph.locations import RESID_POST

_LAYER = 6


def _plain(
    rest: Tensor, states: Tensor, before: Tensor, end: Callable[[Tensor], Tensor], drawn: Tensor
) -> Sequence[Tensor]:
    """E(v) and its gradient, every ablated state decoded, and everything kept for autograd."""
    v = drawn.clone().requires_grad_()
    after = end(states - (rest @ v)[..., None] * v).log_softmax(-1)
    energy = (before.exp() * (before - after)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(energy, v)
    return [energy.detach(), gradient]


def _ours(energy: Energy, v: Tensor) -> Sequence[Tensor]:
    value, gradient = evaluated(energy, v)
    return [torch.tensor(value), gradient.float()]


def energies(subject: Subject) -> Iterator[Comparison]:
    """W10: one evaluation, through the logit lens and through the six blocks that follow."""
    graph, place = subject.graph, RESID_POST[_LAYER - 1]
    subject.plain.requires_grad_(False)
    after, run = model_after(graph, {"input_ids": subject.ids, "use_cache": False}, place)
    value = run[place]
    rest = value - value.mean((0, 1))
    v = nn.functional.normalize(
        torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(0)), dim=0
    )
    states = States(value, torch.ones(value.shape[:2], dtype=torch.bool))
    away = rest.flatten(0, 1)

    def lens(x: Tensor) -> Tensor:
        return subject.plain.lm_head(subject.plain.transformer.ln_f(x))

    def whole(x: Tensor) -> Tensor:
        def put(module: nn.Module, args: Any, output: Any) -> Tensor:
            return x

        with registered([subject.blocks[_LAYER - 1].register_forward_hook(put)]):
            return subject.plain(input_ids=subject.ids, use_cache=False).logits

    end = partial(decoded, graph, {"input_ids": subject.ids, "use_cache": False})
    closed = ending(graph, end, value)
    if closed is None:
        raise ValueError("the end of GPT-2 is a norm and an unembedding")
    with torch.no_grad():
        said = [x(value).log_softmax(-1) for x in (end, after)]
    through_lens, through_model = (Loss(x[states.kept]) for x in said)
    by_lens = LensEnergy(states.rows, away, through_lens, closed, None)
    by_model = DecodedEnergy(states, away, after, through_model)
    rest_of_model = f"energy and gradient, the rest of the model after layer {_LAYER} of 12"
    for name, decode, before, energy, limit in (
        ("W10 energy and gradient, logit lens", lens, said[0], by_lens, 0.94),
        (rest_of_model, whole, said[1], by_model, None),
    ):
        yield Comparison(
            name,
            partial(_plain, rest, value, before, decode, v),
            partial(_ours, energy, v),
            limit=limit,
            exact=False,
        )


def comparisons(only: str = "") -> Iterator[tuple[Subject, Comparison]]:
    """W10: what has a name that contains `only`."""
    subject = subject_of("small 1x64", GPT2Config(), batch=1, length=64)
    yield from ((subject, comparison) for comparison in energies(subject) if only in comparison.name)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of a comparison.")] = 15,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    only: Annotated[str, typer.Option(help="Only comparisons whose name contains this.")] = "",
) -> None:
    """Compare energies with plain code and print a table."""
    run(comparisons, rounds=rounds, threads=threads, json=json, only=only)


if __name__ == "__main__":
    typer.run(main)
