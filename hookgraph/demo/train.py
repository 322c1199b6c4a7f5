"""Train the demo model and write its folder: `python -m hookgraph.demo.train`.

In order: the tokenizer is built from the words of the grammar, a small GPT-2 is trained on fresh
documents, measured on what was withheld, and saved with a model card that states the figures.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hookgraph.demo import model_path
from hookgraph.demo.card import model_card
from hookgraph.demo.evaluation import Figures, documents, loss, measure
from hookgraph.demo.grammar import words

# The first tokens of the vocabulary, in this order.
PAD, UNK, BOS, EOS = SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
POSITIONS: Final = 128


@dataclass(frozen=True)
class Recipe:
    """What determines the weights, on one kind of machine."""

    seed: int = 0
    steps: int = 3000
    batch: int = 64
    learning_rate: float = 2e-3
    warmup: int = 150
    weight_decay: float = 0.01

    def rate(self, step: int) -> float:
        """The share of the learning rate: linear up over `warmup`, then half a cosine to 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done)).item())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or mark, `<bos>` before each text, and text again when decoded."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # No word has the prefix: this decoder is wanted for "store , Mary" -> "store, Mary".
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=POSITIONS,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A GPT-2 of 4 layers, 8 heads and 128 dimensions, without dropout: no text is seen twice."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=POSITIONS,
            n_embd=128,
            n_layer=4,
            n_head=8,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=SPECIAL.index(PAD),
            bos_token_id=SPECIAL.index(BOS),
            eos_token_id=SPECIAL.index(EOS),
        )
    )


def train(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
    """Minimise the next-word loss over fresh documents, the same ones for the same seed."""
    rng = Random(recipe.seed)
    optimizer = AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    schedule = LambdaLR(optimizer, recipe.rate)
    model.train()
    for step in range(recipe.steps):
        value = loss(model, documents(tokenizer, rng, recipe.batch))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {value.item():.4f}", flush=True)
    model.eval()


def run(recipe: Recipe, out: Path) -> Figures:
    """Train, measure, write."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, recipe)
    figures = measure(model, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    card = model_card(model.num_parameters(), recipe.seed, recipe.steps, recipe.batch, figures)
    (out / "README.md").write_text(card, encoding="utf-8")
    return figures


def main() -> None:
    """Train the demo model on two CPU cores, and write its folder and model card."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=model_path(), help="the folder to write")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    arguments = parser.parse_args()
    # The order of sums, and so the last digits of the weights, depends on the number of threads.
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    print(run(Recipe(seed=arguments.seed, steps=arguments.steps), arguments.out))


if __name__ == "__main__":
    main()
