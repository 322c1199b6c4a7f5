"""Texts are measured exactly: each is run, and its nodes are put into the run of the start."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hookgraph.algorithms.copies import finite_metric, per_copy, run_copies
from hookgraph.algorithms.memory import in_pieces
from hookgraph.algorithms.metrics import cross_entropy
from hookgraph.algorithms.padding import real_tokens
from hookgraph.algorithms.search.measured import Measured
from hookgraph.algorithms.sites import chosen_places
from hookgraph.errors import InputError, MetricError
from hookgraph.graph.abstract import Inputs, Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric, Tiled, take
from hookgraph.graph.run import Run
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import EMBED
from hookgraph.ontology.weights import W_E


@final
@dataclass(frozen=True, eq=False)
class Examiner:
    """A text x, and what other texts of its length are measured by.

    Args:
        graph: the hooked model.
        metric: logits -> one number per example.
        target: the nodes that are taken from other texts into x's run.
        name: the argument of the model that holds the tokens.
        base: x's run.
        entry: the last boundary before the target.
        embeddings: of every token.
        batch_size: how many texts are run at once, at most.
    """

    graph: HookGraph
    metric: Metric
    target: tuple[Location, ...]
    name: str
    base: Run
    entry: Location | None
    embeddings: Float[Tensor, "vocab d_model"]
    batch_size: int

    @staticmethod
    def of(
        graph: HookGraph, text: Inputs, metric: Metric, target: Sequence[Location], batch_size: int
    ) -> "Examiner":
        """Run x.

        Raises:
            UnknownLocationError: the graph lacks a node of the target, or token embeddings.
            InputError: it is not one text of tokens.
            MetricError: the metric is not a finite number, or does not depend on the target.
        """
        places = tuple(chosen_places(graph, target))
        graph.check(EMBED)
        inputs = graph.binding.prepare(text)
        name = _edited(inputs)
        entries = [graph.entry(place) for place in places]
        known = [x for x in entries if x is not None]
        entry = min(known, key=lambda x: x.order) if len(known) == len(entries) else None
        wanted = [*([] if entry is None else [entry]), *places, *(place.grad for place in places)]
        base = graph.run(inputs, save=wanted, metric=metric)
        finite_metric(base)
        embeddings = graph.weight(W_E).detach()
        return Examiner(graph, metric, places, name, base, entry, embeddings, batch_size)

    @cached_property
    def tokens(self) -> Int[Tensor, " pos"]:
        """The tokens of x."""
        found = self.base.inputs[self.name]
        if not isinstance(found, Tensor):
            raise TypeError(type(found))
        return found[0]

    @cached_property
    def real(self) -> Float[Tensor, " pos"]:
        """1 at tokens of x, 0 at padding."""
        return real_tokens(self.base.inputs, self.tokens[None])[0].to(self.embeddings)

    @cached_property
    def start(self) -> Measured:
        """x itself, as a text."""
        return self.measure(self.tokens[None])

    def measure(self, tokens: Int[Tensor, "batch pos"]) -> Measured:
        """Everything of some texts, each by a pass over it and one over what lies behind the target.

        Raises:
            MetricError: the metric of one is not a finite number.
        """
        pieces = in_pieces(list(tokens), self.batch_size, lambda piece: self._measure(torch.stack([*piece])))
        return Measured.joined([measured for _, measured in pieces])

    def _measure(self, tokens: Int[Tensor, "batch pos"]) -> Measured:
        tiled = Tiled(self.metric, 1, len(tokens))
        graph = per_copy(self.graph, 1)
        run = graph.run(self._inputs(tokens), save=self.target, metric=tiled)
        patched = self._patched([run[place] for place in self.target])
        here = int(self.real.nonzero()[-1])
        answers = take(run.logits, here if tiled.reads is None else tiled.reads).argmax(-1)
        reads = Tiled(self.metric, 1, 1).reads
        own = take(self.base.logits, here if reads is None else reads).argmax(-1)
        mask = self.real.bool().expand_as(tokens)
        start, end = (self._norm(x, n) for x, n in ((self.base, 1), (patched, len(tokens))))
        cosines = F.cosine_similarity(self.embeddings[tokens], self.embeddings[self.tokens], dim=-1)
        return Measured(
            tokens=tokens,
            metric=finite_metric(run),
            effect=finite_metric(patched) - finite_metric(self.base),
            gradient=torch.minimum(start, end),
            edits=(tokens != self.tokens).sum(1),
            similarity=(cosines * self.real).sum(1) / self.real.sum(),
            loss=cross_entropy(tokens, mask)(run.logits.to(self.embeddings)),
            answers=answers[:, 0],
            differs=(answers != own).any(1),
        )

    def slopes(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """d effect / d token embeddings of each text: through the target's nodes, and on from there.

        Raises:
            MetricError: the target does not depend on the embeddings.
        """
        return self._in_pieces(self._slopes, tokens)

    def _slopes(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        leaf = _Leaf()
        with self.graph.binding.frozen():
            run = self._with(leaf).run(self._inputs(tokens), save=self.target, grad=True)
            nodes = [run[place] for place in self.target]
            patched = self._patched([node.detach() for node in nodes])
            gradients = [patched[place.grad] for place in self.target]
            return self._pulled(leaf, nodes, gradients, "the target")

    def loss_slopes(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """d loss / d token embeddings of each text, as what is read; the tokens predicted stay."""
        return self._in_pieces(self._loss_slopes, tokens)

    def _loss_slopes(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        leaf = _Leaf()
        mask = self.real.bool().expand_as(tokens)
        with self.graph.binding.frozen():
            run = self._with(leaf).run(self._inputs(tokens), metric=cross_entropy(tokens, mask), grad=True)
            loss = finite_metric(run)
            return self._pulled(leaf, [loss], [torch.ones_like(loss)], "the loss")

    def _in_pieces(
        self, work: Callable[[Tensor], Tensor], tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        pieces = in_pieces(list(tokens), self.batch_size, lambda piece: work(torch.stack([*piece])))
        return torch.cat([found for _, found in pieces])

    def _with(self, leaf: "_Leaf") -> HookGraph:
        """The graph, with a leaf before the hooks: slopes are those of the embeddings of tokens."""
        hooked = per_copy(self.graph, 1)
        return replace(hooked, registrations=((EMBED, leaf), *hooked.registrations))

    def _pulled(
        self, leaf: "_Leaf", values: Sequence[Tensor], gradients: Sequence[Tensor], what: str
    ) -> Float[Tensor, "batch pos d_model"]:
        found: Tensor | None = None
        dependent = [(v, g) for v, g in zip(values, gradients, strict=True) if v.requires_grad]
        if dependent and leaf.value is not None:
            outputs, pulls = zip(*dependent, strict=True)
            found = torch.autograd.grad(outputs, [leaf.value], pulls, allow_unused=True)[0]
        if found is None:
            raise MetricError(f"{what} does not depend on {EMBED}: no path leads from there to it")
        return found

    def _inputs(self, tokens: Int[Tensor, "batch pos"]) -> Prepared:
        inputs = self.graph.binding.prepare(dict(self.base.inputs), copies=len(tokens))
        return {**inputs, self.name: tokens}

    def _patched(self, values: Sequence[Float[Tensor, "batch ..."]]) -> Run:
        """x's run, once for each text, with the nodes of the text; measured, with the gradient there."""
        graph, copies = per_copy(self.graph, 1), len(values[0])
        for place, value in zip(self.target, values, strict=True):
            graph = graph.hook(place, SetTo(value))
        wanted = [place.grad for place in self.target]
        return run_copies(graph, self.base, self.entry, copies, metric=self.metric, save=wanted)

    def _norm(self, run: Run, copies: int) -> Float[Tensor, " batch"]:
        squares = [run[place.grad].reshape(copies, -1).square().sum(1) for place in self.target]
        return torch.stack(squares).sum(0).sqrt()


@final
class _Leaf:
    """A hook: what it is called with goes on as a leaf of the autograd graph."""

    value: Tensor | None = None

    def __call__(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        self.value = value.detach().requires_grad_()
        return self.value


def _edited(inputs: Prepared) -> str:
    """The name of the tokens that are edited: of a model with an encoder, those of the decoder.

    Raises:
        InputError: there are none, or not those of one text.
    """
    name = next((x for x in ("decoder_input_ids", "input_ids") if x in inputs), None)
    tokens = None if name is None else inputs[name]
    if name is None or not isinstance(tokens, Tensor):
        raise InputError(
            f"counterfactuals edit tokens, and these inputs hold none, only {', '.join(inputs)}: give token "
            "ids, or text where there is a tokenizer"
        )
    if tokens.shape[0] != 1:
        raise InputError(
            f"counterfactuals are searched for one text, these are {tokens.shape[0]}: call it for each"
        )
    if tokens.shape[1] < 2:
        raise InputError("a text of one token has no fluency to keep: give a longer one")
    return name
