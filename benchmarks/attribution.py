"""Attribution against the same work written plainly: raw hooks, full forward passes, every logit.

W5 to W9 of the specification, on a random model of GPT-2 small's size. Run it with
`python -m benchmarks.attribution`.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2Config

import hookgraph as hg
from benchmarks.harness import Comparison
from benchmarks.overhead import Subject, registered, subject_of
from benchmarks.running import run
from benchmarks.splicing import Weights, dictionaries, injected
from hookgraph import locations as at
from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.quadrature import nodes_and_weights

Hooked = dict[str, Float[Tensor, "..."]]

_CORRECT, _WRONG = 11, 23
_LAYER = 6
"""Of the twelve, where the path integral is taken."""


def measured(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
    """The metric, plainly."""
    return logits[:, -1, _CORRECT] - logits[:, -1, _WRONG]


METRIC = hg.metrics.logit_diff(_CORRECT, _WRONG)


def _logits(subject: Subject, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
    return subject.plain(input_ids=ids, use_cache=False).logits


def _keeping(subject: Subject, seen: Hooked) -> list[Any]:
    """Hooks that keep z and mlp.out of every layer."""

    def given(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return keep

    def returned(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = output

        return keep

    hooks: list[Any] = []
    for i, block in enumerate(subject.blocks):
        hooks.append(block.attn.c_proj.register_forward_pre_hook(given(f"z{i}")))
        hooks.append(block.mlp.register_forward_hook(returned(f"mlp{i}")))
    return hooks


def gradients(subject: Subject) -> Iterator[Comparison]:
    """W5: gradients at every attn.out, mlp.out and resid.post, by one backward pass."""
    kinds = (at.ATTN_OUT, at.MLP_OUT, at.RESID_POST)
    places = [place for kind in kinds for place in subject.graph.every(kind)]

    def plain() -> Sequence[Tensor]:
        seen: list[list[Tensor]] = [[], [], []]

        def keep(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen[number].append(output[0] if isinstance(output, tuple) else output)

            return hook

        parts = [(0, b.attn) for b in subject.blocks] + [(1, b.mlp) for b in subject.blocks]
        parts += [(2, b) for b in subject.blocks]
        with registered([module.register_forward_hook(keep(number)) for number, module in parts]):
            total = measured(_logits(subject, subject.ids)).sum()
        return torch.autograd.grad(total, [x for found in seen for x in found])

    def ours() -> Sequence[Tensor]:
        wanted = [place.grad for place in places]
        run = subject.graph.run(subject.ids, save=wanted, metric=METRIC, logits=False)
        return [run[x] for x in wanted]

    yield Comparison(
        "W5 gradients at every attn.out, mlp.out and resid.post", plain, ours, limit=0.85, exact=False
    )


def nodes(subject: Subject) -> Iterator[Comparison]:
    """W6: attribution patching of every head and MLP."""
    clean, corrupt = subject.ids, subject.ids.flip(0)
    places = [*subject.graph.every(at.ATTN_Z), *subject.graph.every(at.MLP_OUT)]

    def plain() -> Sequence[Tensor]:
        first: Hooked = {}
        second: Hooked = {}
        with registered(_keeping(subject, first)):
            total = measured(_logits(subject, clean)).sum()
        grads = torch.autograd.grad(total, list(first.values()))
        with registered(_keeping(subject, second)), torch.no_grad():
            _logits(subject, corrupt)
        effects = {n: (second[n] - first[n].detach()) * g for n, g in zip(first, grads, strict=True)}
        names = [f"z{i}" for i in range(12)] + [f"mlp{i}" for i in range(12)]
        return [effects[name] for name in names]

    def ours() -> Sequence[Tensor]:
        found = hg.patching_effect(subject.graph, clean, corrupt, METRIC, places)
        return [found.effects[place].flatten(2) for place in places]

    yield Comparison("W6 attribution patching, every z and mlp.out", plain, ours, limit=0.85, exact=False)


def integral(subject: Subject, steps: int, limit: float) -> Iterator[Comparison]:
    """W7: integrated gradients at the heads of one layer."""
    clean, corrupt, place = subject.ids[:1], subject.ids[1:2], at.ATTN_Z[_LAYER]
    projection = subject.blocks[_LAYER].attn.c_proj
    points, weights = nodes_and_weights("gauss-legendre", steps)

    def read(ids: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = projection.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        with registered([hook]), torch.no_grad():
            _logits(subject, ids)
        return seen[0]

    def plain() -> Sequence[Tensor]:
        first, second = read(clean), read(corrupt)
        alpha = points.float().view(-1, 1, 1)
        moved = ((1 - alpha) * first + alpha * second).requires_grad_()
        with registered([projection.register_forward_pre_hook(lambda m, args: (moved,))]):
            total = measured(_logits(subject, clean.expand(steps, -1))).sum()
        (grads,) = torch.autograd.grad(total, [moved])
        return [(weights.float().view(-1, 1, 1) * grads).sum(0) * (second - first)[0]]

    def ours() -> Sequence[Tensor]:
        found = hg.patching_effect(subject.graph, clean, corrupt, METRIC, [place], "ig", steps=steps)
        return [found.effects[place][0].flatten(1)]

    yield Comparison(f"W7 ig at one layer's heads, {steps} steps", plain, ours, limit=limit, exact=False)


def exact(subject: Subject) -> Iterator[Comparison]:
    """W8: exact patching of every head at the last position."""
    clean, corrupt = subject.ids[:1], subject.ids[1:2]
    heads = subject.plain.config.n_head
    places = [at.ATTN_Z[i].at(head=h, pos=-1) for i in range(len(subject.blocks)) for h in range(heads)]

    def plain() -> Sequence[Tensor]:
        seen: Hooked = {}
        with torch.no_grad():
            with registered(_keeping(subject, seen)):
                _logits(subject, corrupt)
            base = measured(_logits(subject, clean))
            found: list[Tensor] = []
            for i, block in enumerate(subject.blocks):
                for h in range(heads):
                    with registered(
                        [block.attn.c_proj.register_forward_pre_hook(_one(seen[f"z{i}"], h, heads))]
                    ):
                        found.append(measured(_logits(subject, clean)) - base)
        return [torch.stack(found)]

    def ours() -> Sequence[Tensor]:
        return [exact_effects(subject.graph, clean, corrupt, METRIC, places, batch_size=40)]

    yield Comparison(
        "W8 exact, every head at the last position", plain, ours, limit=0.025, exact=False, effort=0.4
    )


def _one(corrupt: Tensor, head: int, heads: int) -> Callable[..., tuple[Tensor]]:
    """A hook that sets one head at the last position."""
    width = corrupt.shape[-1] // heads
    part = slice(head * width, (head + 1) * width)

    def patch(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        z = args[0].clone()
        z[:, -1, part] = corrupt[:, -1, part]
        return (z,)

    return patch


def latents(subject: Subject) -> Iterator[Comparison]:
    """W9: latents and errors of a dictionary at every mlp.out: attribution, integrated gradients, exact."""
    coders = dictionaries(subject)
    saes = injected(coders)
    graph = subject.graph.inject(*saes)
    clean, corrupt = subject.ids[:1], subject.ids[1:2]
    places = [x for sae in saes for x in (sae.latents, sae.error)]

    def read(ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        seen: list[tuple[Tensor, Tensor]] = []

        def hook(coder: Weights) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, x: Tensor) -> None:
                code = coder.encode(x)
                seen.append((code, x - coder.decode(code)))

            return keep

        hooks = [b.mlp.register_forward_hook(hook(c)) for b, c in zip(subject.blocks, coders, strict=True)]
        with registered(hooks), torch.no_grad():
            _logits(subject, ids)
        return seen

    def joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
        return [x for code, error in pairs for x in (code, error.sum(-1, keepdim=True))]

    def attrib_by_hand() -> Sequence[Tensor]:
        other = read(subject.ids.flip(0))
        leaves: list[Tensor] = []

        def splice(coder: Weights) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: Any, x: Tensor) -> Tensor:
                code = coder.encode(x.detach()).requires_grad_()
                error = (x.detach() - coder.decode(code.detach())).requires_grad_()
                leaves.extend((code, error))
                spliced = coder.decode(code) + error
                return spliced + (x - x.detach())  # the gradient of the model itself goes on to x

            return hook

        hooks = [b.mlp.register_forward_hook(splice(c)) for b, c in zip(subject.blocks, coders, strict=True)]
        with registered(hooks):
            total = measured(_logits(subject, subject.ids)).sum()
        grads = torch.autograd.grad(total, leaves)
        deltas = [new - old.detach() for new, old in zip([x for p in other for x in p], leaves, strict=True)]
        products = [d * g for d, g in zip(deltas, grads, strict=True)]
        return joined(list(zip(products[::2], products[1::2], strict=True)))

    def attrib() -> Sequence[Tensor]:
        found = hg.patching_effect(graph, subject.ids, subject.ids.flip(0), METRIC, places)
        return [found.effects[place] for place in places]

    yield Comparison(
        "W9 attribution, latents and errors of 12 dictionaries",
        attrib_by_hand,
        attrib,
        limit=0.85,
        exact=False,
    )

    def ig_by_hand() -> Sequence[Tensor]:
        points, weights = nodes_and_weights("gauss-legendre", 10)
        first, second = read(clean), read(corrupt)
        found: list[tuple[Tensor, Tensor]] = []
        for i, coder in enumerate(coders):
            alpha = points.float().view(-1, 1, 1)
            moved = [
                ((1 - alpha) * a + alpha * b).requires_grad_()
                for a, b in zip(first[i], second[i], strict=True)
            ]

            def put(
                module: nn.Module, args: Any, x: Tensor, coder: Weights = coder, z: Any = moved
            ) -> Tensor:
                return coder.decode(z[0]) + z[1]

            with registered([subject.blocks[i].mlp.register_forward_hook(put)]):
                total = measured(_logits(subject, clean.expand(10, -1))).sum()
            grads = torch.autograd.grad(total, moved)
            means = [(weights.float().view(-1, 1, 1) * g).sum(0) for g in grads]
            found.append(tuple(m * (b - a) for m, a, b in zip(means, first[i], second[i], strict=True)))  # pyright: ignore[reportArgumentType]
        return joined(found)

    def ig() -> Sequence[Tensor]:
        found = hg.patching_effect(graph, clean, corrupt, METRIC, places, "ig", steps=10)
        return [found.effects[place] for place in places]

    yield Comparison(
        "W9 ig, latents and errors of 12 dictionaries, 10 steps",
        ig_by_hand,
        ig,
        limit=0.55,
        exact=False,
        effort=0.4,
    )
    layer, count = _LAYER, 64
    nodes = [saes[layer].latents.at(latent=i, pos=-1) for i in range(count)]

    def exact_by_hand() -> Sequence[Tensor]:
        coder, second = coders[layer], read(corrupt)[layer][0]
        with torch.no_grad():
            base = measured(_logits(subject, clean))
            found: list[Tensor] = []
            for i in range(count):

                def patch(module: nn.Module, args: Any, x: Tensor, i: int = i) -> Tensor:
                    code = coder.encode(x)
                    error = x - coder.decode(code)
                    code[:, -1, i] = second[:, -1, i]
                    return coder.decode(code) + error

                with registered([subject.blocks[layer].mlp.register_forward_hook(patch)]):
                    found.append(measured(_logits(subject, clean)) - base)
        return [torch.stack(found)]

    def exact_ours() -> Sequence[Tensor]:
        return [exact_effects(subject.graph.inject(saes[layer]), clean, corrupt, METRIC, nodes)]

    yield Comparison(
        f"W9 exact, {count} latents at the last position",
        exact_by_hand,
        exact_ours,
        limit=0.05,
        exact=False,
        effort=0.4,
    )


def comparisons(only: str = "") -> Iterator[tuple[Subject, Comparison]]:
    """W5 to W9: those whose name contains `only`."""
    shapes = (
        ("small 2x64", 64, (gradients, nodes)),
        ("small 1x17", 17, (lambda s: integral(s, 10, 0.55), lambda s: integral(s, 50, 0.45))),
        ("small 1x15", 15, (exact,)),
        ("small 2x32", 32, (latents,)),
    )
    for name, length, groups in shapes:
        subject = subject_of(name, GPT2Config(), batch=2, length=length)
        yield from ((subject, c) for group in groups for c in group(subject) if only in c.name)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of a comparison.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    only: Annotated[str, typer.Option(help="Only comparisons whose name contains this.")] = "",
) -> None:
    """Compare attribution with plain code and print a table."""
    run(comparisons, rounds=rounds, threads=threads, json=json, only=only)


if __name__ == "__main__":
    typer.run(main)
