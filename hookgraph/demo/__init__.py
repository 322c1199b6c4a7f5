"""A small model that ships with the library, with texts on which it is known to be right.

It is a real `transformers` GPT-2 with a real word-level tokenizer, trained by `train.py` in this
folder on the grammar of `grammar.py`; `model/README.md` states how well it does.

>>> model, tokenizer = load()
>>> pair = ioi_pairs(1)[0]
>>> logits = model(**tokenizer(pair.text, return_tensors="pt")).logits[0, -1]
>>> tokenizer.decode(logits.argmax()) == pair.answer
True
"""

from pathlib import Path

from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from hookgraph.demo.grammar import Pair, agreement_pairs, induction_pairs, ioi_pairs

__all__ = ["Pair", "agreement_pairs", "induction_pairs", "ioi_pairs", "load", "model_path"]


def model_path() -> Path:
    """The folder of weights, configuration, tokenizer and model card, for `from_pretrained`."""
    return Path(__file__).parent / "model"


def load() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The model, ready to evaluate, and its tokenizer. Nothing is downloaded."""
    model = GPT2LMHeadModel.from_pretrained(model_path(), local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path(), local_files_only=True)
    return model.eval(), tokenizer
