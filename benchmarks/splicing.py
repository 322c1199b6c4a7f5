"""What splicing dictionaries costs, against the same encoding and decoding written by hand with raw hooks.

W9 of the specification, forward and attribution: 12 dictionaries, 16 times as wide as the stream, at every
mlp.out of a model of GPT-2 small's size. Run it with `python -m benchmarks.splicing`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from hookgraph import locations as at
from hookgraph.subgraphs import Autoencoder

EXPANSION = 16


@dataclass(frozen=True)
class Weights:
    """A dictionary, as the plain side uses it."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_enc + self.b_enc)

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.W_dec + self.b_dec

    @property
    def coder(self) -> Autoencoder:
        return Autoencoder(self.W_enc, self.W_dec, self.b_enc, self.b_dec)


def dictionaries(subject: Subject) -> list[Weights]:
    """One for each layer, random."""
    width = subject.plain.config.n_embd
    made = []
    for _ in subject.blocks:
        directions = torch.nn.functional.normalize(torch.randn(EXPANSION * width, width), dim=1)
        biases = torch.full((len(directions),), -0.05), torch.zeros(width)
        made.append(Weights(directions.T.contiguous(), directions, *biases))
    return made


def injected(coders: Sequence[Weights]) -> Sequence[hg.AutoencoderGraph]:
    """The same dictionaries, as ours."""
    return hg.AutoencoderGraph.every({i: c.coder for i, c in enumerate(coders)}, at=at.MLP_OUT)


def forward(subject: Subject, coders: Sequence[Weights]) -> Iterator[Comparison]:
    """Latents and errors of every layer, and logits."""
    saes = injected(coders)
    graph = subject.graph.inject(*saes)
    asked = [x for sae in saes for x in (sae.latents, sae.error)] + [at.LOGITS]

    def by_hand() -> Sequence[Tensor]:
        seen: list[Tensor] = []

        def splice(coder: Weights) -> Any:
            def hook(module: nn.Module, args: Any, x: Tensor) -> Tensor:
                latents = coder.encode(x)
                reconstruction = coder.decode(latents)
                error = x - reconstruction
                seen.extend((latents, error))
                return reconstruction + error

            return hook

        hooks = [b.mlp.register_forward_hook(splice(c)) for b, c in zip(subject.blocks, coders, strict=True)]
        with registered(hooks):
            logits = subject.run(subject.plain)
        return [*seen, logits]

    def ours() -> Sequence[Tensor]:
        return list(graph.run(subject.ids, save=asked).values())

    yield Comparison("W9 forward, latents and errors saved", by_hand, ours, limit=1.10, exact=False)
    idle = subject.graph.inject(*saes)
    yield Comparison(
        "W9 forward, injected and nothing asked, against no dictionaries",
        lambda: [subject.run(subject.plain)],
        lambda: [idle.run(subject.ids).logits],
    )


def one_latent(subject: Subject, coders: Sequence[Weights]) -> Iterator[Comparison]:
    """One latent set to zero in one layer: the rest of that dictionary is not needed."""
    layer, latent = len(coders) // 2, 123
    sae = hg.AutoencoderGraph(coders[layer].coder, at.MLP_OUT[layer])
    graph = subject.graph.inject(sae).hook(sae.latents.at(latent=latent), torch.zeros_like)

    def by_hand() -> Sequence[Tensor]:
        coder = coders[layer]

        def hook(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            latents = coder.encode(x)
            error = x - coder.decode(latents)
            latents[..., latent] = 0
            return coder.decode(latents) + error

        with registered([subject.blocks[layer].mlp.register_forward_hook(hook)]):
            return [subject.run(subject.plain)]

    def ours() -> Sequence[Tensor]:
        return [graph.run(subject.ids).logits]

    yield Comparison("one latent of one dictionary set to zero", by_hand, ours, exact=False)


def attribution(subject: Subject, coders: Sequence[Weights]) -> Iterator[Comparison]:
    """Gradients at latents and errors of every layer, as attribution patching needs them, one backward."""
    saes = injected(coders)
    graph = subject.graph.inject(*saes)
    places = [x for sae in saes for x in (sae.latents, sae.error)]

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 5] - logits[:, -1, 7]

    def by_hand() -> Sequence[Tensor]:
        leaves: list[Tensor] = []

        def splice(coder: Weights) -> Any:
            def hook(module: nn.Module, args: Any, x: Tensor) -> Tensor:
                with torch.no_grad():
                    latents = coder.encode(x)
                latents.requires_grad_()
                reconstruction = coder.decode(latents)
                error = (x - reconstruction).detach().requires_grad_()
                leaves.extend((latents, error))
                return reconstruction + error + x - x.detach()

            return hook

        hooks = [b.mlp.register_forward_hook(splice(c)) for b, c in zip(subject.blocks, coders, strict=True)]
        parameters = list(subject.plain.parameters())
        for parameter in parameters:
            parameter.requires_grad_(False)
        with registered(hooks):
            logits = subject.plain(input_ids=subject.ids, use_cache=False).logits
        gradients = torch.autograd.grad(metric(logits).sum(), leaves)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return [*(x.detach() for x in leaves), *gradients]

    def ours() -> Sequence[Tensor]:
        run = graph.run(subject.ids, save=[*places, *(x.grad for x in places)], metric=metric)
        return list(run.values())

    yield Comparison("W9 values and gradients of all latents and errors", by_hand, ours, exact=False)


def comparisons(only: str = "") -> Iterator[tuple[Subject, Comparison]]:
    """Everything that is measured: what has a name that contains `only`."""
    subject = subject_of("small", GPT2Config(), batch=2, length=32)
    coders = dictionaries(subject)
    for group in (forward, one_latent, attribution):
        yield from ((subject, c) for c in group(subject, coders) if only in c.name)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of a comparison.")] = 9,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    only: Annotated[str, typer.Option(help="Only comparisons whose name contains this.")] = "",
) -> None:
    """Compare spliced dictionaries with the same written by hand, and print a table."""
    run(comparisons, rounds=rounds, threads=threads, json=json, only=only)


if __name__ == "__main__":
    typer.run(main)
