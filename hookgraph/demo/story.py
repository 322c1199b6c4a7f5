"""The story of the demo: two names, the heads that carry the answer, and a vector that changes it.

Each function is one step, on any model that knows the sentences of `grammar.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.effects.results import PatchingEffect
from hookgraph.algorithms.metrics import LogitDifference, logit_diff
from hookgraph.demo.grammar import Pair, ioi_pairs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import ATTN_Z, MLP_OUT, RESID_POST
from hookgraph.report.prompts import Prompt, PromptPair

STORY: Final = Pair(
    text="After John and Mary went to the store, Mary gave a bottle of milk to",
    corrupt="After John and Mary went to the store, John gave a bottle of milk to",
    answer="John",
    wrong="Mary",
    template=0,
)
HELD_OUT: Final = 48
"""How many pairs the head map averages over; the model never saw their names in that order."""
SEED: Final = 7
STEERED_LAYER: Final = 2
"""After it the last position knows the answer, and later layers still read it."""


@dataclass(frozen=True)
class Speaker:
    """A hooked model and what turns texts into its tokens and back."""

    graph: HookGraph
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def ids(self, words: Sequence[str]) -> list[int]:
        """The token of each word."""
        return cast("list[int]", self.tokenizer.convert_tokens_to_ids(list(words)))

    def prompt(self, text: str, pair: Pair, graph: HookGraph | None = None) -> Prompt:
        """How likely the answers of a pair are after a text, in this graph or another one."""
        tokens = self.tokenizer.convert_ids_to_tokens(self.tokenizer(text)["input_ids"])
        logits = (graph or self.graph).run(text).logits[0]
        return Prompt.read(text, tokens, logits, *self.ids([pair.answer, pair.wrong]))

    def say(self, text: str, words: int = 3) -> str:
        """What the model itself goes on to say."""
        batch = self.tokenizer(text, return_tensors="pt")
        model: Any = self.model
        said = model.generate(**batch, max_new_tokens=words, do_sample=False)
        new = said[0, batch["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))


def prompts(speaker: Speaker, pair: Pair = STORY) -> PromptPair:
    """Both prompts of a pair with the model's answers."""
    clean, corrupt = (speaker.prompt(text, pair) for text in (pair.text, pair.corrupt))
    return PromptPair(clean, corrupt, pair.answer, pair.wrong)


def effect_of_nodes(speaker: Speaker, pairs: Sequence[Pair]) -> PatchingEffect:
    """The effect of every head and MLP, for each of many pairs."""
    graph = speaker.graph
    return _effect(speaker, pairs, [*graph.every(ATTN_Z), *graph.every(MLP_OUT)])


def effect_of_places(speaker: Speaker, pair: Pair = STORY) -> PatchingEffect:
    """The effect of the residual stream after every layer, for one pair."""
    return _effect(speaker, [pair], speaker.graph.every(RESID_POST))


def held_out(count: int = HELD_OUT) -> list[Pair]:
    """Pairs of all templates."""
    return ioi_pairs(count, seed=SEED)


@dataclass(frozen=True)
class Steering:
    """What the model says with and without a vector added to the residual stream."""

    at: Location
    strength: float
    plain: Prompt
    steered: Prompt
    plain_words: str
    steered_words: str
    flipped: float
    """Share of other sentences about the same two people whose answer changes to the other name."""
    others: int


def steer(
    speaker: Speaker, pair: Pair = STORY, *, layer: int = STEERED_LAYER, strength: float = 1.0
) -> Steering:
    """Turn the answer into the other name by one vector at the last position of `resid.post[layer]`.

    The vector is the mean of x(answer is the other name) - x(answer is the name) over sentences of
    other templates. It is added to the prompt of the pair, and to sentences that it was not made from.
    """
    at = RESID_POST[layer]
    sentences = [p for p in retold(pair, HELD_OUT, SEED + 1) if p.template != pair.template]
    vector = _mean_difference(speaker.graph, at, sentences)

    def add(x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return x + strength * vector

    steered = speaker.graph.hook(at.at(pos=slice(-1, None)), add)
    with steered.attached():
        steered_words = speaker.say(pair.text)
    others = retold(pair, HELD_OUT, SEED + 2)
    metric = logit_diff(*speaker.ids([pair.answer, pair.wrong]))
    after = metric(steered.run([p.text for p in others]).logits)
    return Steering(
        at=at,
        strength=strength,
        plain=speaker.prompt(pair.text, pair),
        steered=speaker.prompt(pair.text, pair, steered),
        plain_words=speaker.say(pair.text),
        steered_words=steered_words,
        flipped=float((after < 0).double().mean()),
        others=len(others),
    )


def retold(pair: Pair, count: int, seed: int) -> list[Pair]:
    """Held-out pairs in which the two people are those of `pair`."""
    return [_renamed(p, {p.answer: pair.answer, p.wrong: pair.wrong}) for p in ioi_pairs(count, seed)]


def _renamed(pair: Pair, names: dict[str, str]) -> Pair:
    def rename(text: str) -> str:
        return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), text)

    parts: dict[str, Any] = {k: rename(getattr(pair, k)) for k in ("text", "corrupt", "answer", "wrong")}
    return Pair(**parts, template=pair.template)


def _mean_difference(graph: HookGraph, at: Location, pairs: Sequence[Pair]) -> Float[Tensor, " d_model"]:
    """mean x(corrupt) - mean x(clean) at the last position."""
    last = at.at(pos=-1)
    clean, corrupt = (
        graph.run(texts, save=[last])[last].mean(0)
        for texts in ([p.text for p in pairs], [p.corrupt for p in pairs])
    )
    return corrupt - clean


def _effect(speaker: Speaker, pairs: Sequence[Pair], at: Sequence[Location]) -> PatchingEffect:
    clean, corrupt = [p.text for p in pairs], [p.corrupt for p in pairs]
    return patching_effect(speaker.graph, clean, corrupt, _metric(speaker, pairs), at)


def _metric(speaker: Speaker, pairs: Sequence[Pair]) -> LogitDifference:
    answers, wrong = ([getattr(p, name) for p in pairs] for name in ("answer", "wrong"))
    return logit_diff(torch.tensor(speaker.ids(answers)), torch.tensor(speaker.ids(wrong)))
