"""`causal_tracing`: noise on the subject, and one place after another restored."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsIndex, TypeAlias, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.arguments import positive_number, whole_number
from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.copies import finite_metric, per_copy, run_copies
from hookgraph.algorithms.effects.examples import Examples, by_examples
from hookgraph.algorithms.effects.footprint import rows_at_once
from hookgraph.algorithms.interventions.packing import SetEntries
from hookgraph.algorithms.interventions.traces import CausalTrace, Noise
from hookgraph.algorithms.memory import in_pieces
from hookgraph.algorithms.padding import real_tokens
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.sites import chosen_places
from hookgraph.errors import HookGraphError, LocationError
from hookgraph.graph.abstract import Inputs, Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.measuring import Metric, Tiled
from hookgraph.graph.run import Run
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import EMBED

Subject: TypeAlias = Sequence[int] | Sequence[Sequence[int]]
"""Positions of the subject's tokens: of all examples, or a sequence for each."""

_STREAM = (Dimension.BATCH, Dimension.POS, Dimension.D_MODEL)


def causal_tracing(
    graph: HookGraph,
    inputs: Inputs,
    metric: Metric,
    subject: Subject,
    at: Sequence[Location],
    *,
    embedding: Location = EMBED,
    noise: float | int = 3.0,
    std: float | None = None,
    samples: int = 10,
    window: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    max_memory: int | None = None,
    progress: bool | None = None,
) -> CausalTrace:
    """Where a fact is recalled: noise hides the subject, and each place is restored in turn.

    1. Run the inputs; note the metric m(clean) and the locations.
    2. Run them with ε ~ N(0, (noise · std)²) added to the embeddings of the subject's tokens: m(noised).
    3. Run 2 again with one location at one position at its value of run 1. With a `window`, the same
       location of so many layers around it, from l - window // 2 on.

    effect = m(3) - m(noised), mean over `samples` draws of the noise. A draw is the same in 2 and 3, and
    for every place. Only the layers behind what is restored are executed.

    Args:
        graph: the hooked model.
        inputs: prompts whose answer the model knows.
        metric: logits -> one number per example, such as `prob(answer)`.
        subject: the columns of the subject's tokens, for all examples or for each; -1 is the last. A tensor
            of one axis is taken for all of them, one of two for each.
        at: whole locations of the stream's shape, such as `graph.every(MLP_OUT)`.
        embedding: what is noised; of a model with an encoder, perhaps `ENCODER.EMBED`.
        noise: the standard deviation of the noise, in units of `std`.
        std: that of the embeddings; by default that of all entries of `embedding` at the real tokens of the
            inputs. Measure it on a data set, and give it, to compare prompts.
        samples: how many draws.
        window: how many layers are restored together.
        seed: of the draws.
        batch_size: how many rows are run at once, at most. Where memory does not suffice, fewer are.
        max_memory: how many bytes the tensors of a pass may take; the memory of one is measured first.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        HookGraphError: `samples`, `window`, `noise` or `std` is not positive, or there is no subject.
        LocationError: a location is none of the stream, or a position of the subject is out of range.
        UnknownLocationError: the graph has no such location, or no token embedding.
        MetricError: the metric is not one finite number per example, in some run; or there are more examples
            than may be run at once, and it cannot be divided.

    Source: Meng et al., "Locating and editing factual associations in GPT", arXiv:2202.05262.
    """
    samples, window = whole_number("samples", samples), whole_number("window", window)
    noise = positive_number("noise", noise)
    places = chosen_places(graph, at)
    for place in places:
        if place.dims != _STREAM or place != place.whole or place.site is not None:
            raise LocationError(f"{place} is no whole location with axes batch pos d_model: {place.whole}")
    windows = {x: _window(graph, x, window) for x in places}
    examples = Examples.of(graph, inputs, None, metric)
    found_std = None if std is None else positive_number("std", std)
    embedded = torch.cat(
        by_examples(examples, batch_size, lambda x: graph.run(x.clean, save=[embedding])[embedding])
    )
    if found_std is None:
        real = real_tokens(examples.clean, embedded, embedding.type.stack)
        found_std = float(embedded[real].double().std())
    chosen = _columns(subject, *embedded.shape[:2])
    drawn = _draws(embedded, chosen, noise * found_std, samples, seed)
    first = min(places, key=lambda place: place.order)

    def largest(part: Examples) -> object:
        tracing = _Tracing.of(part, embedding, {first: windows[first]})
        with Progress("causal tracing", None, shown=False) as hidden:
            return tracing.all_draws(drawn[:1, list(part.rows)], 1, hidden)

    rows = rows_at_once(batch_size, max_memory, examples, largest)
    with Progress("causal tracing", samples * len(examples) * len(places), shown=progress) as bar:

        def trace(part: Examples) -> _Traced:
            tracing = _Tracing.of(part, embedding, windows)
            return tracing.all_draws(drawn[:, list(part.rows)], rows, bar)

        parts = by_examples(examples, rows, trace)
    effects = {x: torch.cat([part.effects[x] for part in parts], dim=2) for x in places}
    reduced = {Dimension.D_MODEL: "restored together"}
    return CausalTrace(
        Attribution({x: v.mean(1).mT for x, v in effects.items()}, reduced),
        Attribution({x: _standard_error(v).mT for x, v in effects.items()}, reduced),
        torch.cat([part.clean for part in parts]),
        torch.cat([part.corrupted for part in parts], dim=1).mean(0),
        Noise(tuple(map(tuple, chosen)), noise, found_std, samples, window, seed),
        _texts(graph, examples.clean),
        graph.binding.metadata,
    )


@final
@dataclass(frozen=True, eq=False)
class _Traced:
    """The metric with and without noise, and what restoring each place at each position adds to it."""

    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, "... batch"]
    effects: Mapping[Location, Float[Tensor, "pos ... batch"]]


def _standard_error(values: Float[Tensor, "pos ... batch"]) -> Float[Tensor, "pos batch"]:
    """Of the mean over draws."""
    draws = values.shape[1]
    return values.std(1) / draws**0.5 if draws > 1 else torch.zeros_like(values[:, 0])


def _window(graph: HookGraph, place: Location, size: int) -> list[Location]:
    """The locations that are restored with one: its type, in the layers around its own."""
    if place.layer is None:
        return [place]
    first = place.layer - size // 2
    return [x for x in graph.every(place.type) if first <= (x.layer or 0) < first + size and x.site is None]


def _columns(subject: Subject, batch: int, length: int) -> list[list[int]]:
    """The subject's columns in each example.

    Raises:
        HookGraphError: there are none, or there is not one sequence per example.
        LocationError: one is out of range.
    """
    rows = _told(subject, batch)
    if len(rows) != batch or not all(rows):
        raise HookGraphError(
            f"subject={subject!r} for a batch of {batch}: give the positions of its tokens, as in [2, 3], "
            "or such a list for each example"
        )
    for outside in (i for row in rows for i in row if not -length <= i < length):
        raise LocationError(f"subject: pos={outside} is out of range, the inputs have {length} positions")
    return [[i % length for i in row] for row in rows]


def _told(subject: Subject, batch: int) -> list[list[int]]:
    """The numbers of a subject, for each example; none where there are other things among them."""
    try:
        told = [_integers(x) for x in subject]
    except TypeError:
        return []
    shared = [x for x in told if isinstance(x, int)]
    each = [x for x in told if not isinstance(x, int)]
    return [] if shared and each else each or [shared] * batch


def _integers(value: SupportsIndex | Iterable[SupportsIndex]) -> int | list[int]:
    """One position or several, a tensor or an array of them too."""
    plain = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    return operator.index(plain) if isinstance(plain, SupportsIndex) else [*map(operator.index, plain)]


def _draws(
    embedded: Float[Tensor, "batch pos d_model"],
    columns: Sequence[Sequence[int]],
    std: float,
    samples: int,
    seed: int,
) -> Float[Tensor, "... batch pos d_model"]:
    """Noise at the subject's tokens, 0 elsewhere: `samples` draws, the first of them alike for any number."""
    generator = torch.Generator().manual_seed(seed)
    here = torch.zeros(embedded.shape[:2], dtype=torch.bool)
    for row, chosen in enumerate(columns):
        here[row, chosen] = True
    drawn = [torch.randn(embedded.shape, generator=generator, dtype=torch.float64) for _ in range(samples)]
    return (std * torch.stack(drawn) * here[..., None]).to(embedded)


def _texts(graph: HookGraph, inputs: Prepared) -> tuple[str, ...]:
    """The tokens as text, of a single example and where there is a tokenizer."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
        return ()
    names = graph.binding.token_texts(ids[0].tolist())
    return tuple(names[i] for i in ids[0].tolist()) if names else ()


@final
@dataclass(frozen=True, eq=False)
class _Tracing:
    """The clean run, and what is restored together with each place."""

    graph: HookGraph
    base: Run
    metric: Metric
    embedding: Location
    windows: Mapping[Location, Sequence[Location]]

    @staticmethod
    def of(
        examples: Examples, embedding: Location, windows: Mapping[Location, Sequence[Location]]
    ) -> "_Tracing":
        """Run without noise."""
        graph, metric = examples.graph, examples.metric
        restored = list(dict.fromkeys(x for found in windows.values() for x in found))
        base = graph.run(examples.clean, save=restored, metric=metric, logits=False)
        return _Tracing(graph, base, metric, embedding, windows)

    def all_draws(
        self, drawn: Float[Tensor, "... batch pos d_model"], batch_size: int, bar: Progress
    ) -> _Traced:
        """What restoring does under each draw, as many draws at once as rows are allowed."""
        clean = finite_metric(self.base)
        pieces = in_pieces(
            range(len(drawn)),
            max(1, batch_size // len(clean)),
            lambda part: self._effects(drawn[part[0] : part[-1] + 1], batch_size, bar),
        )
        found = [effects for _, effects in pieces]
        effects = {x: torch.cat([effects[x] for _, effects in found], dim=1) for x in self.windows}
        return _Traced(clean, torch.cat([corrupted for corrupted, _ in found]), effects)

    def _effects(
        self, drawn: Float[Tensor, "... batch pos d_model"], batch_size: int, bar: Progress
    ) -> tuple[Float[Tensor, "... batch"], dict[Location, Float[Tensor, "pos ... batch"]]]:
        """The metric under each draw, and what restoring each place at each position adds to it."""
        samples, batch = drawn.shape[:2]
        added = drawn.flatten(0, 1)
        noised = per_copy(self.graph, batch).hook(self.embedding, lambda value: value + added)
        entries = {x: noised.entry(min(found, key=lambda x: x.order)) for x, found in self.windows.items()}
        boundaries = list(dict.fromkeys(x for x in entries.values() if x is not None))
        prepared = self.graph.binding.prepare(dict(self.base.inputs), copies=samples)
        metric = Tiled(self.metric, batch, samples, self.base.columns)
        base = noised.run(prepared, save=boundaries, metric=metric, logits=False)
        corrupted = finite_metric(base)
        noised = per_copy(noised, samples * batch)
        effects: dict[Location, Tensor] = {}
        for place, restored in self.windows.items():
            found: list[Tensor] = []
            for columns, measured in in_pieces(
                range(self.base[place].shape[1]),
                max(1, batch_size // (samples * batch)),
                lambda part, x=place, r=restored: self._restored(noised, base, metric, entries[x], r, part),
            ):
                found.append(measured.view(len(columns), -1) - corrupted)
            bar.advance(samples * batch)
            effects[place] = torch.cat(found).view(-1, samples, batch)
        return corrupted.view(samples, batch), effects

    def _restored(
        self,
        noised: HookGraph,
        base: Run,
        metric: Metric,
        entry: Location | None,
        restored: Sequence[Location],
        columns: Sequence[int],
    ) -> Float[Tensor, " batch"]:
        """The metric with locations restored at one column in each copy of the noised batch."""
        copies = len(finite_metric(base)) // len(finite_metric(self.base))
        placed = [(i, (column, None)) for i, column in enumerate(columns)]
        for location in restored:
            noised = noised.hook(location, SetEntries(placed, self.base[location].repeat(copies, 1, 1)))
        return finite_metric(run_copies(noised, base, entry, len(columns), metric=metric))
