"""Contributions against the same work written plainly: raw hooks, and every part of attention as a tensor.

W11 of the specification, on a random model of GPT-2 small's size. Run it with
`python -m benchmarks.contributions`.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import GPT2Config

import hookgraph as hg
from benchmarks.harness import Comparison
from benchmarks.overhead import Subject, registered, subject_of
from benchmarks.running import run
from hookgraph.algorithms.proximity import get_attention_contributions, get_mlp_contributions

Seen = dict[str, Tensor]


def _keeping(block: Any, seen: Seen) -> list[Any]:
    """Hooks that keep the stream, the values and both updates of a layer."""

    def given(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], *rest: Any) -> None:
            seen[name] = args[0]

        return keep

    def returned(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output if isinstance(output, Tensor) else output[0]

        return keep

    return [
        block.ln_1.register_forward_pre_hook(given("pre")),
        block.ln_2.register_forward_pre_hook(given("mid")),
        block.attn.c_attn.register_forward_hook(returned("qkv")),
        block.mlp.register_forward_hook(returned("mlp")),
        block.register_forward_hook(returned("post")),
    ]


def _attention(block: Any, seen: Seen, heads: int) -> tuple[Tensor, Tensor]:
    """Every (key, head) vector of a layer, then their shares."""
    q, k, v = (x.unflatten(2, (heads, -1)) for x in seen["qkv"].chunk(3, dim=2))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / q.shape[-1] ** 0.5
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    weight = block.attn.c_proj.weight.unflatten(0, (heads, -1))
    written = torch.einsum("bkhe,hed->bkhd", v, weight)
    parts = pattern.permute(0, 2, 3, 1)[..., None] * written[:, None]
    return get_attention_contributions(seen["pre"], seen["mid"], parts)


def whole(subject: Subject, limit: float) -> Iterator[Comparison]:
    """W11: the shares of every sum of every layer."""
    ids, heads = subject.ids, subject.plain.config.n_head

    def plain() -> Sequence[Tensor]:
        found: list[Tensor] = []
        seen: list[Seen] = [{} for _ in subject.blocks]
        hooks = [h for block, mine in zip(subject.blocks, seen, strict=True) for h in _keeping(block, mine)]
        with torch.no_grad():
            with registered(hooks):
                subject.plain(input_ids=ids, use_cache=False)
            for block, mine in zip(subject.blocks, seen, strict=True):
                found += _attention(block, mine, heads)
                found += get_mlp_contributions(mine["mid"], mine["post"], mine["mlp"])
        return found

    def ours() -> Sequence[Tensor]:
        answers: list[Tensor] = []
        for attention, mlp in hg.contributions(subject.graph, ids, progress=False).layers:
            if attention.heads is None or mlp.mlp is None:
                raise ValueError("GPT-2 has heads and MLPs")
            answers += [attention.heads, attention.residual, mlp.mlp, mlp.residual]
        return answers

    # Proximities are differences of nearly equal numbers: in single precision shares differ by this much.
    yield Comparison("W11 contributions of all layers", plain, ours, limit=limit, exact=False, within=5e-4)


def comparisons(only: str = "") -> Iterator[tuple[Subject, Comparison]]:
    """Two lengths: those whose name contains `only`."""
    for length, limit in ((64, 0.33), (256, 0.15)):
        name = f"small 1x{length}"
        if only in name:
            subject = subject_of(name, GPT2Config(), batch=1, length=length)
            yield from ((subject, comparison) for comparison in whole(subject, limit))


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of a comparison.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    only: Annotated[str, typer.Option(help="Only sizes whose name contains this.")] = "",
) -> None:
    """Compare contributions with plain code and print a table."""
    run(comparisons, rounds=rounds, threads=threads, json=json, only=only)


if __name__ == "__main__":
    typer.run(main)
