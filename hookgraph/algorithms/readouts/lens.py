"""`logit_lens`: what the model would say if it ended after each layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.algorithms.padding import check_finite
from hookgraph.algorithms.streams import last_residual
from hookgraph.errors import HookGraphError, LocationError, nearest
from hookgraph.graph import storage
from hookgraph.graph.abstract import Inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import LOGITS, RESID_POST

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

Translator: TypeAlias = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]
"""A residual -> what it is in the basis of the last one, such as a tuned lens' affine map."""

_KIND = "logit lens"
_HALF = (torch.float16, torch.bfloat16)
_STREAM = (Dimension.BATCH, Dimension.POS, Dimension.D_MODEL)


@final
@dataclass(frozen=True, eq=False, repr=False)
class LogitLens:
    """The most likely tokens after each layer.

    Args:
        locations: the residuals that were read, in causal order.
        positions: the positions that were read.
        tokens: the k most likely tokens, the likeliest first.
        log_probs: their log-probabilities, in nats.
        entropy: of the whole distribution, in nats.
        metadata: the model's name, revision and dtype.
    """

    locations: tuple[Location, ...]
    positions: tuple[int, ...]
    tokens: Int[Tensor, "layer batch pos rank"]
    log_probs: Float[Tensor, "layer batch pos rank"]
    entropy: Float[Tensor, "layer batch pos"]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    _names: Mapping[int, str] = field(default_factory=dict[int, str])

    def name(self, token: int) -> str:
        """A token as text, where the graph was bound with a tokenizer; else its number."""
        return self._names.get(token, str(token))

    def to_frame(self) -> "pandas.DataFrame":
        """One row per location, example, position and rank."""
        import pandas as pd

        rows: list[dict[str, object]] = []
        for where in torch.cartesian_prod(*map(torch.arange, self.tokens.shape)).view(-1, 4).tolist():
            layer, example, pos, rank = where
            token = int(self.tokens[layer, example, pos, rank])
            rows.append(
                {
                    "location": str(self.locations[layer]),
                    "batch": example,
                    "pos": self.positions[pos],
                    "rank": rank,
                    "token": self.name(token),
                    "log_prob": float(self.log_probs[layer, example, pos, rank]),
                }
            )
        return pd.DataFrame(rows)

    def table(self, example: int = 0) -> "pandas.DataFrame":
        """The likeliest token of one example: a row per location, a column per position."""
        import pandas as pd

        likeliest = self.tokens[:, example, :, 0].tolist()
        rows = [[self.name(token) for token in row] for row in likeliest]
        return pd.DataFrame(rows, index=[str(x) for x in self.locations], columns=list(self.positions))

    def plot(self, example: int = 0) -> "matplotlib.figure.Figure":
        """The log-probability of the likeliest token of one example, by layer and position.

        Raises:
            HookGraphError: matplotlib is not installed.
        """
        values = self.log_probs[:, example, :, 0].float().cpu()
        rows = tuple(str(x.layer) for x in self.locations)
        columns = tuple(map(str, self.positions))
        grid = plotting.Grid("log p of the likeliest token", values, rows, columns, "layer", "pos")
        return plotting.draw([grid], figure=plotting.new_figure())

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        tensors = {"tokens": self.tokens, "log_probs": self.log_probs, "entropy": self.entropy}
        header = {
            "locations": [str(x) for x in self.locations],
            "positions": self.positions,
            "names": {str(token): text for token, text in self._names.items()},
            "metadata": dict(self.metadata),
        }
        storage.write(path, _KIND, tensors, header)

    @staticmethod
    def load(path: str | Path) -> "LogitLens":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, not a saved lens, or of locations that are not declared.
        """
        tensors, header = storage.read(path, _KIND)
        return LogitLens(
            tuple(storage.parse(path, text) for text in header["locations"]),
            tuple(header["positions"]),
            tensors["tokens"],
            tensors["log_probs"],
            tensors["entropy"],
            header["metadata"],
            {int(token): text for token, text in header["names"].items()},
        )

    def __repr__(self) -> str:
        return self.table().to_string()

    def _repr_html_(self) -> str:
        return self.table().to_html()


def logit_lens(
    graph: HookGraph,
    inputs: Inputs,
    at: Sequence[Location] | None = None,
    *,
    pos: int | Sequence[int] | None = None,
    k: int = 5,
    translators: Mapping[Location, Translator] | None = None,
) -> LogitLens:
    """softmax(unembedding(norm(x))) for the residual x after each layer: its k most likely tokens.

    Everything after the last layer, soft-caps and all, is the model's own, run with x in the place of the
    last residual. After the last layer the lens is what the model says. With translators it is a tuned
    lens: x is translated first.

    Args:
        graph: the hooked model; its hooks apply to the pass that is read, not to the lens.
        inputs: what is run.
        at: the residuals to read; by default `resid.post` of every layer, or those with a translator and
            the last one.
        pos: the positions to read; by default all.
        k: how many tokens.
        translators: of a tuned lens, by the residual that each translates; all that is read needs one,
            but the last residual.

    Raises:
        LocationError: a location is no whole residual or lacks a translator, or a position is out of range.
        MetricError: a residual is not finite.
        HookGraphError: k is less than 1, or there are fewer tokens.
        UnknownLocationError: the graph has no such location.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); Belrose et al.,
    arXiv:2303.08112 (tuned lens).
    """
    last = last_residual(graph)
    everywhere = graph.every(RESID_POST) if translators is None else (*translators, last)
    places = tuple(dict.fromkeys(everywhere if at is None else at))
    for place in places:
        graph.check(place)
        if translators is not None and place not in translators and place != last:
            near = nearest(str(place), map(str, translators))
            raise LocationError(f"there is no translator of {place}: {near}")
        if place.dims != _STREAM or place != place.whole or place.site is not None:
            raise LocationError(f"{place} is not the stream at all positions: read resid.pre, mid or post")
    prepared = graph.binding.prepare(inputs)
    run = graph.run(prepared, save=list(places))
    check_finite(run)
    chosen = _positions(pos, run[places[0]].shape[1])
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for place in places:
        translate = (translators or {}).get(place)
        value = run[place] if translate is None else translate(run[place]).detach()
        logits = _decoded(HookGraph(graph.binding), prepared, last, value, chosen)
        if not 1 <= k <= logits.shape[-1]:
            raise HookGraphError(f"k={k}: there are {logits.shape[-1]} tokens to rank")
        precise = logits.float() if logits.dtype in _HALF else logits
        log_probs = precise.log_softmax(-1)
        best = log_probs.topk(k)
        found.append((best.indices, best.values, -(log_probs.exp() * log_probs).sum(-1)))
    tokens, values, entropy = (torch.stack(part) for part in zip(*found, strict=True))
    names = graph.binding.token_texts(tokens.unique().tolist())
    return LogitLens(places, tuple(chosen), tokens, values, entropy, graph.binding.metadata, names)


def _positions(pos: int | Sequence[int] | None, length: int) -> list[int]:
    wanted = range(length) if pos is None else [pos] if isinstance(pos, int) else pos
    for place in wanted:
        if not -length <= place < length:
            raise LocationError(f"pos={place} is out of range, the inputs have {length} positions")
    return [place % length for place in wanted]


def _decoded(
    graph: HookGraph,
    inputs: Mapping[str, object],
    last: Location,
    value: Float[Tensor, "batch pos d_model"],
    positions: Sequence[int],
) -> Float[Tensor, "batch ..."]:
    """The logits with `value` in the place of the last residual; no layer is executed if that is possible."""
    here = LOGITS.at(pos=list(positions))
    if graph.binding.enterable:
        return graph.replay(Run({}, inputs=inputs), last, value=value, save=[here])[here]
    return graph.hook(last, lambda _: value).run(inputs, save=[here])[here]
