"""A small model and its dictionaries that ship with the library, with texts on which it is known to be right.

It is a real `transformers` GPT-2 with a real word-level tokenizer, trained by `train.py` in this
folder on the grammar of `grammar.py`; `model/README.md` states how well it does, and
`dictionaries/README.md` how well its dictionaries do.

>>> model, tokenizer = load()
>>> pair = ioi_pairs(1)[0]
>>> logits = model(**tokenizer(pair.text, return_tensors="pt")).logits[0, -1]
>>> tokenizer.decode(logits.argmax()) == pair.answer
True
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from hookgraph.demo.grammar import Pair, agreement_pairs, induction_pairs, ioi_pairs
from hookgraph.ontology.locations import Location
from hookgraph.subgraphs import Autoencoder, load_autoencoder

__all__ = [
    "Pair",
    "agreement_pairs",
    "dictionaries_path",
    "induction_pairs",
    "ioi_pairs",
    "load",
    "load_dictionaries",
    "model_path",
]


def model_path() -> Path:
    """The folder of weights, configuration, tokenizer and model card, for `from_pretrained`."""
    return Path(__file__).parent / "model"


def load() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The model, ready to evaluate, and its tokenizer. Nothing is downloaded."""
    model = GPT2LMHeadModel.from_pretrained(model_path(), local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path(), local_files_only=True)
    model.config.name_or_path = "hookgraph.demo"  # results remember a name, not a folder of this machine
    return model.eval(), tokenizer


def dictionaries_path() -> Path:
    """The folder of the model's dictionaries and of their card."""
    return Path(__file__).parent / "dictionaries"


def load_dictionaries() -> Mapping[Location, Autoencoder]:
    """The model's dictionaries, by site: `mlp.out` and `resid.post` of each layer."""
    folders = sorted(path.parent for path in dictionaries_path().glob("*/cfg.json"))
    loaded = [load_autoencoder(folder, dtype=torch.float32) for folder in folders]
    return {coder.origin.reads: coder for coder in loaded if coder.origin.reads is not None}
