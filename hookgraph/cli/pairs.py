"""Pairs of prompts for commands that take many, and the batches that they make."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, final

import typer
from transformers import PreTrainedTokenizerBase

from hookgraph.algorithms.batches import Batch
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.cli.arguments import answer_token, token_texts
from hookgraph.demo import ioi_pairs
from hookgraph.demo.story import SEED
from hookgraph.errors import InputError

File = Annotated[
    Path | None,
    typer.Option("--pairs", help="JSON lines with clean, corrupt, answer and wrong.", show_default=False),
]
Count = Annotated[int, typer.Option(min=1, help="How many pairs, at most; of `demo`, so many are made.")]
Clean = Annotated[str, typer.Option(help="Without a file: a prompt with the behaviour.", show_default=False)]
Corrupt = Annotated[str, typer.Option(help="As many tokens, without it.", show_default=False)]
Answer = Annotated[str, typer.Option(help="What follows the clean prompt, one token.", show_default=False)]
Wrong = Annotated[str, typer.Option(help="What follows the corrupt one, one token.", show_default=False)]

COUNT: Final = 32
_BATCH: Final = 32
_FIELDS: Final = ("clean", "corrupt", "answer", "wrong")


@final
@dataclass(frozen=True, slots=True)
class TextPair:
    """Two prompts, and what follows each."""

    clean: str
    corrupt: str
    answer: str
    wrong: str


def chosen_pairs(model: str, file: Path | None, count: int, texts: Sequence[str]) -> list[TextPair]:
    """The pairs of a file, or one of four texts, or those of the embedded model.

    Raises:
        InputError: there are none, or a line of the file is none.
    """
    if file is not None:
        return _read(file)[:count]
    if all(texts):
        return [TextPair(*texts)]
    if model == "demo" and not any(texts):
        made = ioi_pairs(count, SEED, template=0)
        return [TextPair(p.text, p.corrupt, p.answer, p.wrong) for p in made]
    raise InputError("nothing to compare: give --pairs FILE, or --clean, --corrupt, --answer and --wrong")


def _read(file: Path) -> list[TextPair]:
    found: list[TextPair] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                found.append(TextPair(*(str(row[name]) for name in _FIELDS)))
            except (ValueError, KeyError, TypeError) as error:
                fields = ", ".join(f'"{name}": "..."' for name in _FIELDS)
                raise InputError(f"{file}, line {number} is no pair: write {{{fields}}}") from error
    if not found:
        raise InputError(f"{file} is empty: write a pair on each line")
    return found


def batches_of(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[TextPair]) -> list[Batch]:
    """Batches of pairs of one length, so that nothing is padded, each with its metric.

    Raises:
        InputError: the prompts of a pair differ in length, or an answer is no single token.
    """
    by_length: dict[int, list[TextPair]] = {}
    for pair in pairs:
        first, second = token_texts(tokenizer, pair.clean), token_texts(tokenizer, pair.corrupt)
        if len(first) != len(second):
            raise unequal(first, second)
        by_length.setdefault(len(first), []).append(pair)
    return [
        _batch(tokenizer, same[start : start + _BATCH])
        for same in by_length.values()
        for start in range(0, len(same), _BATCH)
    ]


def unequal(first: Sequence[str], second: Sequence[str]) -> InputError:
    """The error of two prompts that cannot be compared."""
    return InputError(
        f"the clean prompt has {len(first)} tokens, the corrupt one {len(second)}; positions are "
        f"compared one by one: {' | '.join(first)} and {' | '.join(second)}"
    )


def _batch(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[TextPair]) -> Batch:
    answers = [answer_token(tokenizer, p.answer, p.clean) for p in pairs]
    wrong = [answer_token(tokenizer, p.wrong, p.clean) for p in pairs]
    return [p.clean for p in pairs], [p.corrupt for p in pairs], logit_diff(answers, wrong)
