"""Train the dictionaries of the demo model and write their folder: `python -m hookgraph.demo.dictionaries`.

One TopK dictionary, 8 times as wide as the stream, at `mlp.out` and `resid.post` of each layer, trained on
documents like those of the model and stored as SAELens stores them, in half precision.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import trange
from transformers import PreTrainedTokenizerFast

from hookgraph.binding import bind
from hookgraph.demo import dictionaries_path, load
from hookgraph.demo.evaluation import documents
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.aliases import to_transformer_lens
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import MLP_OUT, RESID_POST
from hookgraph.subgraphs import Autoencoder, TopK

SEED_OF_FIGURES: Final = 20_000
"""Figures are measured on documents of another seed than those of training."""

CARD = """# Dictionaries of the demo model

TopK autoencoders of {latents} latents, {k} active, at `mlp.out` and `resid.post` of each layer of the
model in `../model`, in SAELens' format and half precision. Position 0, the mark at the beginning, was
left out of training and figures: it is the same in every text, and far from everything else.

FVE is the fraction of variance explained, L0 the mean number of active latents, both over {documents}
documents of another seed; `dead` counts latents that are active on none of them.

| site | FVE | L0 | dead |
|---|---|---|---|
{table}

`python -m hookgraph.demo.dictionaries`, seed {seed}: {steps} steps of {batch} tokens, Adam.
"""


@dataclass(frozen=True)
class Recipe:
    """What determines the dictionaries, on one kind of machine."""

    seed: int = 1
    steps: int = 300
    batch: int = 512
    expansion: int = 8
    k: int = 16
    learning_rate: float = 3e-3
    documents: int = 400
    """Documents that the figures are measured on."""


@dataclass(frozen=True)
class Quality:
    """How good a dictionary is."""

    fve: float
    l0: float
    dead: int


def sites(graph: HookGraph) -> tuple[Location, ...]:
    """Where there is a dictionary."""
    return (*graph.every(MLP_OUT), *graph.every(RESID_POST))


def activations(
    graph: HookGraph, ids: Int[Tensor, "batch pos"], at: Sequence[Location], padding: int
) -> Mapping[Location, Float[Tensor, "... d_model"]]:
    """What the model computes at every token of some documents, the first and padding left out."""
    mask = ids != padding
    run = graph.run({"input_ids": ids, "attention_mask": mask.long()}, save=at)
    wanted = mask.clone()
    wanted[:, 0] = False
    return {place: run[place][wanted] for place in at}


def start(x: Float[Tensor, "... d_model"], recipe: Recipe) -> Autoencoder:
    """Directions are those of activations, the encoder is their transpose: few latents are dead at first."""
    mean = x.mean(0)
    width = x.shape[1]
    drawn = x[torch.randint(len(x), (width * recipe.expansion,))] - mean
    noise = drawn.norm(dim=1).mean() * torch.randn_like(drawn) / width**0.5
    directions = F.normalize(drawn + 0.5 * noise, dim=1)
    zeros = torch.zeros(len(directions))
    coder = Autoencoder(
        directions.T.clone(), directions, zeros, mean, b_in=mean.clone(), activation=TopK(recipe.k)
    )
    made = coder(x) - mean
    # So many directions that point the same way would overshoot.
    coder.W_enc.data *= (made * (x - mean)).sum() / made.square().sum()
    return coder.requires_grad_()


def train(
    graph: HookGraph, tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> dict[Location, Autoencoder]:
    """Minimise the squared error of every dictionary, on the same fresh documents."""
    torch.manual_seed(recipe.seed)
    rng, at, padding = Random(recipe.seed), sites(graph), _padding(tokenizer)
    first = activations(graph, documents(tokenizer, rng, 400), at, padding)
    coders = {place: start(x, recipe) for place, x in first.items()}
    scales = {place: (x - x.mean(0)).square().sum(1).mean() for place, x in first.items()}
    parameters = [p for coder in coders.values() for p in coder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    for _ in trange(recipe.steps, desc="dictionaries"):
        batch = activations(graph, documents(tokenizer, rng, recipe.batch // 14), at, padding)
        loss = torch.tensor(0.0)
        for place, coder in coders.items():
            x = batch[place][: recipe.batch]
            loss = loss + (coder(x) - x).square().sum(1).mean() / scales[place]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        for coder in coders.values():
            coder.W_dec.data = F.normalize(coder.W_dec.data, dim=1)
            # One bias on both sides, as the format has it.
            tie(coder)
    return {place: coder.requires_grad_(False) for place, coder in coders.items()}


def _padding(tokenizer: PreTrainedTokenizerFast) -> int:
    return tokenizer.get_vocab()[str(tokenizer.pad_token)]


def tie(coder: Autoencoder) -> None:
    """Let what is taken from the input be the bias of the decoder."""
    if coder.b_in is not None and coder.b_dec is not None:
        coder.b_in.data.copy_(coder.b_dec.data)


@torch.no_grad()
def measure(
    graph: HookGraph,
    tokenizer: PreTrainedTokenizerFast,
    coders: Mapping[Location, Autoencoder],
    count: int = Recipe.documents,
) -> dict[Location, Quality]:
    """The quality of each dictionary, from a fixed seed."""
    padding = _padding(tokenizer)
    ids = documents(tokenizer, Random(SEED_OF_FIGURES), count)
    found: dict[Location, Quality] = {}
    for place, x in activations(graph, ids, list(coders), padding).items():
        coder = coders[place]
        f = coder.encode(x)
        missed = (coder.decode(f, x) - x).square().sum()
        found[place] = Quality(
            fve=float(1 - missed / (x - x.mean(0)).square().sum()),
            l0=float((f > 0).sum(-1).float().mean()),
            dead=int((~(f > 0).any(0)).sum()),
        )
    return found


def save(coder: Autoencoder, at: Location, folder: Path) -> None:
    """Write a dictionary as SAELens does, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    content = {name: coder.get_parameter(name).half().contiguous() for name in names}
    save_file(content, folder / "sae_weights.safetensors")
    activation = coder.activation
    config = {
        "architecture": "topk",
        "k": activation.k if isinstance(activation, TopK) else 0,
        "d_in": coder.d_in,
        "d_sae": coder.n_latents,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "hook_name": to_transformer_lens(at),
            "model_name": "hookgraph demo model",
            "sae_lens_version": "6.0.0",
        },
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def card(recipe: Recipe, width: int, figures: Mapping[Location, Quality]) -> str:
    """The text of the card."""
    rows = [f"| `{at}` | {q.fve:.4f} | {q.l0:.1f} | {q.dead} |" for at, q in figures.items()]
    return CARD.format(
        latents=width * recipe.expansion,
        k=recipe.k,
        documents=recipe.documents,
        seed=recipe.seed,
        steps=recipe.steps,
        batch=recipe.batch,
        table="\n".join(rows),
    )


def stated(text: str) -> dict[Location, Quality]:
    """The figures that a card states."""
    rows = re.findall(r"^\| `(\S+)` \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", text, flags=re.MULTILINE)
    return {Location.parse(at): Quality(float(fve), float(l0), int(dead)) for at, fve, l0, dead in rows}


def main() -> None:
    """Train the dictionaries of the demo model, and write their folder and card."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=dictionaries_path(), help="the folder to write")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe(steps=arguments.steps)
    model, tokenizer = load()
    graph = bind(model)
    coders = train(graph, tokenizer, recipe)
    figures = measure(graph, tokenizer, coders, recipe.documents)
    for at, coder in coders.items():
        save(coder, at, arguments.out / f"{at.type}.{at.layer}")
    text = card(recipe, model.config.hidden_size, figures)
    (arguments.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
