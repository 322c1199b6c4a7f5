"""The arguments that commands share, and how they are read."""

import re
from collections.abc import Sequence
from typing import Annotated, TypeVar

import typer
from transformers import PreTrainedTokenizerBase

from hookgraph.demo import model_path
from hookgraph.errors import HookGraphError, InputError, LocationError, nearest
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location, declared

Name = TypeVar("Name", bound=str)

Model = Annotated[
    str, typer.Argument(help="A local folder, a name on the hub, or `demo`.", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Clean = Annotated[str, typer.Option(help="The prompt with the behaviour.", show_default=False)]
Corrupt = Annotated[str, typer.Option(help="As many tokens, without it.", show_default=False)]
Answer = Annotated[str, typer.Option(help="What follows the clean prompt, one token.", show_default=False)]
Wrong = Annotated[str, typer.Option(help="What follows the corrupt one, one token.", show_default=False)]


def place(model: str) -> str:
    """Where the model is: the embedded one has a word of its own."""
    return str(model_path()) if model == "demo" else model


def chosen_layers(text: str) -> frozenset[int]:
    """The layers that "0-3,5" names; none for an empty text.

    Raises:
        LocationError: it is not written like that.
    """
    if not re.fullmatch(r"(\d+(-\d+)?(,\d+(-\d+)?)*)?", text):
        raise LocationError(f"--layers {text!r}: write 0-3, or 0,5, or 0-3,5")
    spans = [[int(n) for n in part.split("-")] for part in text.split(",") if part]
    for span in spans:
        if span[0] > span[-1]:
            raise LocationError(
                f"--layers {text!r}: {span[0]}-{span[-1]} counts down, write {span[-1]}-{span[0]}"
            )
    return frozenset(layer for span in spans for layer in range(span[0], span[-1] + 1))


def chosen_locations(graph: HookGraph, text: str) -> list[Location]:
    """The locations that a list such as "attn.z,mlp.out[3]@pos=-1" names; a type stands for every layer.

    Raises:
        LocationError: a name is unknown, or the model lacks the location; near names are given.
    """
    types = {x.qualified_name: x for x in declared()}
    found: list[Location] = []
    for name in re.split(r",(?=\s*[A-Za-z])", text):
        kind = types.get(name.strip())
        found += graph.every(kind) if kind is not None else [graph.check(Location.parse(name))]
    return found


def one_of(what: str, name: str, known: Sequence[Name]) -> Name:
    """One of several names.

    Raises:
        HookGraphError: it is none of them; near ones are given.
    """
    for one in known:
        if one == name:
            return one
    raise HookGraphError(f"unknown {what} {name!r}: {nearest(name, known)}")


def answer_token(tokenizer: PreTrainedTokenizerBase, word: str, prompt: str) -> int:
    """The token id of an answer, as it follows a prompt: with a space before it, else without.

    Raises:
        InputError: it is no single token, with how the tokenizer splits it; or one it does not know.
    """
    bare = word.removeprefix(" ")
    forms = [bare, f" {bare}"] if prompt.endswith((" ", "\n")) else [f" {bare}", bare]
    split = {form: tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms}
    for ids in split.values():
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
    if any(tokenizer.unk_token_id in ids for ids in split.values()):
        raise InputError(f"the tokenizer does not know {bare!r}")
    pieces = "; ".join(f"{k!r} is {' | '.join(tokenizer.convert_ids_to_tokens(v))}" for k, v in split.items())
    raise InputError(f"an answer is one token, {bare!r} is several: {pieces}")


def token_texts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The tokens of a prompt, as they are read."""
    return [token_text(tokenizer, i) for i in tokenizer(text)["input_ids"]]


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as it is read, or its name where nothing is to be read."""
    return str(tokenizer.decode([token])).strip() or str(tokenizer.convert_ids_to_tokens(token))
