"""`causal_tracing`: noise on the subject, and one place after another restored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.copies import finite_metric, per_copy, run_copies
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
        subject: the columns of the subject's tokens, for all examples or for each; -1 is the last.
        at: whole locations of the stream's shape, such as `graph.every(MLP_OUT)`.
        embedding: what is noised; of a model with an encoder, perhaps `ENCODER.EMBED`.
        noise: the standard deviation of the noise, in units of `std`.
        std: that of the embeddings; by default that of all entries of `embedding` at the real tokens of the
            inputs. Measure it on a data set, and give it, to compare prompts.
        samples: how many draws.
        window: how many layers are restored together.
        seed: of the draws.
        batch_size: how many rows are run at once, at most. Where memory does not suffice, fewer are.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        HookGraphError: `samples`, `window` or `noise` is not positive, or there is no subject.
        LocationError: a location is none of the stream, or a position of the subject is out of range.
        UnknownLocationError: the graph has no such location, or no token embedding.
        MetricError: the metric is not one finite number per example, in some run.

    Source: Meng et al., "Locating and editing factual associations in GPT", arXiv:2202.05262.
    """
    for name, value in {"samples": samples, "window": window, "noise": noise}.items():
        if value <= 0:
            raise HookGraphError(f"{name}={value}: it has to be positive")
    places = chosen_places(graph, at)
    for place in places:
        if place.dims != _STREAM or place != place.whole or place.site is not None:
            raise LocationError(f"{place} is no whole location with axes batch pos d_model: {place.whole}")
    windows = {x: _window(graph, x, window) for x in places}
    restored = list(dict.fromkeys(x for found in windows.values() for x in found))
    prepared = graph.binding.prepare(inputs)
    base = graph.run(prepared, save=[*restored, embedding], metric=metric, logits=False)
    clean, embedded = finite_metric(base), base[embedding]
    real = real_tokens(prepared, embedded, embedding.type.stack)
    found_std = float(embedded[real].double().std()) if std is None else std
    chosen = _columns(subject, *embedded.shape[:2])
    drawn = _draws(embedded, chosen, noise * found_std, samples, seed)
    tracing = _Tracing(graph, base, metric, embedding, windows)
    pieces: list[tuple[Tensor, dict[Location, Tensor]]] = []
    total = samples * sum(base[x].shape[1] for x in places)
    with Progress("causal tracing", total, shown=progress) as bar:
        for _, found in in_pieces(
            range(samples),
            max(1, batch_size // len(clean)),
            lambda part: tracing.effects(drawn[part[0] : part[-1] + 1], batch_size, bar),
        ):
            pieces.append(found)
    effects = {x: torch.cat([found[x] for _, found in pieces], dim=1) for x in places}
    reduced = {Dimension.D_MODEL: "restored together"}
    return CausalTrace(
        Attribution({x: v.mean(1).mT for x, v in effects.items()}, reduced),
        Attribution({x: _standard_error(v).mT for x, v in effects.items()}, reduced),
        clean,
        torch.cat([found for found, _ in pieces]).mean(0),
        Noise(tuple(map(tuple, chosen)), noise, found_std, samples, window, seed),
        _texts(graph, prepared),
        graph.binding.metadata,
    )


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
    shared = [x for x in subject if isinstance(x, int)]
    each = [list(x) for x in subject if not isinstance(x, int)]
    rows = each if each else [shared] * batch
    if len(rows) != batch or (shared and each) or not all(rows):
        raise HookGraphError(
            f"subject={subject!r} for a batch of {batch}: give the positions of its tokens, as in [2, 3], "
            "or such a list for each example"
        )
    for outside in (i for row in rows for i in row if not -length <= i < length):
        raise LocationError(f"subject: pos={outside} is out of range, the inputs have {length} positions")
    return [[i % length for i in row] for row in rows]


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
    windows: dict[Location, list[Location]]

    def effects(
        self, drawn: Float[Tensor, "... batch pos d_model"], batch_size: int, bar: Progress
    ) -> tuple[Float[Tensor, "... batch"], dict[Location, Float[Tensor, "pos ... batch"]]]:
        """The metric under each draw, and what restoring each place at each position adds to it."""
        samples, batch = drawn.shape[:2]
        added = drawn.flatten(0, 1)
        noised = per_copy(self.graph, batch).hook(self.embedding, lambda value: value + added)
        entries = {x: noised.entry(min(found, key=lambda x: x.order)) for x, found in self.windows.items()}
        boundaries = list(dict.fromkeys(x for x in entries.values() if x is not None))
        prepared = self.graph.binding.prepare(dict(self.base.inputs), copies=samples)
        metric = Tiled(self.metric, batch, samples)
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
                bar.advance(samples * len(columns))
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
