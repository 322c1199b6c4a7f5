"""Edges against the same work written plainly: raw hooks, full forward passes, one gradient per reader.

W7e of the specification, on a random model of GPT-2 small's size: integrated gradients over the inputs of all
157 writers and 445 readers. Run it with `python -m benchmarks.edges`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2Config

import hookgraph as hg
from benchmarks.attribution import METRIC, measured
from benchmarks.harness import Comparison
from benchmarks.overhead import Subject, registered, subject_of
from benchmarks.running import run
from hookgraph.algorithms.effects.quadrature import nodes_and_weights

_STEPS = 5
Seen = dict[str, Float[Tensor, "..."]]


def _watched(subject: Subject, seen: Seen) -> list[Any]:
    """Hooks that keep what every branch reads, before and after its norm, and what it adds."""
    hooks: list[Any] = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            seen[f"{name}.in"], seen[f"{name}.out"] = args[0], output

        return hook

    body = subject.plain.transformer
    parts = {"embed": body.drop, "last": body.ln_f}
    for i, block in enumerate(subject.blocks):
        own = {"ln_1": block.ln_1, "qkv": block.attn.c_attn, "z": block.attn.c_proj}
        parts |= {f"{k}{i}": v for k, v in {**own, "ln_2": block.ln_2, "mlp": block.mlp}.items()}
    for name, part in parts.items():
        hooks.append(part.register_forward_hook(keep(name)))
    return hooks


def _written(subject: Subject, ids: Int[Tensor, "batch pos"]) -> list[Float[Tensor, "..."]]:
    """What the embedding, the heads and the MLPs add, each (writer, batch, pos, d_model)."""
    seen: Seen = {}
    with registered(_watched(subject, seen)), torch.no_grad():
        subject.plain(input_ids=ids, use_cache=False)
    found = [seen["embed.out"][None]]
    for i, block in enumerate(subject.blocks):
        z = seen[f"z{i}.in"].unflatten(-1, (block.attn.num_heads, -1))
        weight = block.attn.c_proj.weight.unflatten(0, (block.attn.num_heads, -1))
        found += [torch.einsum("bshe,hed->hbsd", z, weight), seen[f"mlp{i}.out"][None]]
    return found


def _slopes(subject: Subject, seen: Seen, logits: Tensor) -> Iterator[tuple[int, Float[Tensor, "..."]]]:
    """How many writers each reader has before it, and the gradient at the stream through it alone."""
    layers = range(len(subject.blocks))
    names = [x for i in layers for x in (f"qkv{i}.out", f"mlp{i}.in")]
    ends = [*names, "last.in"]
    slopes = torch.autograd.grad(measured(logits).sum(), [seen[x] for x in ends], retain_graph=True)
    found = dict(zip(ends, slopes, strict=True))

    def through(norm: str, slope: Tensor) -> Tensor:
        return torch.autograd.grad(seen[f"{norm}.out"], seen[f"{norm}.in"], slope, retain_graph=True)[0]

    for i, block in enumerate(subject.blocks):
        width, heads = block.attn.embed_dim, block.attn.num_heads
        for part in range(3):
            for head in range(heads):
                rows = slice(part * width + head * width // heads, part * width + (head + 1) * width // heads)
                slope = found[f"qkv{i}.out"][..., rows] @ block.attn.c_attn.weight[:, rows].T
                yield 1 + 2 * i, through(f"ln_1{i}", slope)
        yield 2 + 2 * i, through(f"ln_2{i}", found[f"mlp{i}.in"])
    yield 1 + 2 * len(subject.blocks), found["last.in"]


def integrated(subject: Subject) -> Iterator[Comparison]:
    """W7e: EAP-IG over inputs; every edge."""
    clean, corrupt = subject.ids, subject.ids.flip(0)
    nodes, weights = (x.tolist() for x in nodes_and_weights("gauss-legendre", _STEPS))

    def plain() -> Sequence[Tensor]:
        first, second = _written(subject, clean), _written(subject, corrupt)
        deltas = [b - a for a, b in zip(first, second, strict=True)]
        embed = subject.plain.transformer.wte
        total: list[Tensor] = []
        for node, weight in zip(nodes, weights, strict=True):
            seen: Seen = {}
            start = torch.lerp(embed(clean), embed(corrupt), node).detach().requires_grad_()
            with registered(_watched(subject, seen)):
                logits = subject.plain(inputs_embeds=start, use_cache=False).logits
            scores = [
                weight * torch.einsum("wbsd,bsd->w", torch.cat(deltas[:count]), slope) / len(clean)
                for count, slope in _slopes(subject, seen, logits)
            ]
            total = [a + b for a, b in zip(total, scores, strict=True)] if total else scores
        return total

    def ours() -> Sequence[Tensor]:
        scores = hg.edge_attribution(subject.graph, [(clean, corrupt)], METRIC, "eap-ig-inputs", steps=_STEPS)
        by_reader: dict[Any, list[Tensor]] = {}
        for (_, reader), block in scores.edges.items():
            readers = int(block.target.max()) + 1 if block.target.shape[1] else 1
            by_reader.setdefault(reader, []).append(block.values.view(-1, readers))
        return [column for parts in by_reader.values() for column in torch.cat(parts).T]

    count = sum(len(x) for x in ours())
    yield Comparison(f"W7e EAP-IG over inputs, 5 steps, {count} edges", plain, ours, exact=False, effort=0.4)


def comparisons(only: str = "") -> Iterator[tuple[Subject, Comparison]]:
    """W7e, if its name contains `only`."""
    subject = subject_of("small 2x16", GPT2Config(), batch=2, length=16)
    yield from ((subject, c) for c in integrated(subject) if only in c.name)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of a comparison.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    only: Annotated[str, typer.Option(help="Only comparisons whose name contains this.")] = "",
) -> None:
    """Compare edges with plain code and print a table."""
    run(comparisons, rounds=rounds, threads=threads, json=json, only=only)


if __name__ == "__main__":
    typer.run(main)
