"""`Contributions`: shares of every sum of the stream, as tables, as a graph of tokens, and as a drawing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from jaxtyping import Bool, Int
from torch import Tensor

from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.flow import drawing
from hookgraph.algorithms.flow.dividing import Shares
from hookgraph.algorithms.flow.tokens import Flow, backwards, flows, to_networkx
from hookgraph.algorithms.proximity import Number
from hookgraph.errors import LocationError, UnknownLocationError
from hookgraph.graph import storage
from hookgraph.ontology.locations import Location, LocationType
from hookgraph.ontology.transformer import ATTN_OUT, MLP_OUT

if TYPE_CHECKING:
    import matplotlib.figure
    import networkx
    import pandas

_KIND = "contributions"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Contributions:
    """What each part of a sum of the residual stream contributes to it, in every layer.

    Args:
        layers: the sums of each layer, in causal order.
        norm: q of the norm that distances were measured by.
        cut: the threshold that was applied, if one was.
        real: which tokens are no padding; the others are in no graph.
        tokens: the token ids, if token ids were run.
        metadata: the model's name, revision and dtype.
    """

    layers: tuple[tuple[Shares, ...], ...]
    norm: Number
    cut: Number | None
    real: Bool[Tensor, "batch pos"]
    tokens: Int[Tensor, "batch pos"] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    _names: Mapping[int, str] = field(default_factory=dict[int, str])

    def attention(self, layer: int) -> Shares:
        """The sum to which the attention of a layer adds; of a parallel block the MLP adds to it too.

        Raises:
            UnknownLocationError: the model has no such layer, or the layer no attention.
        """
        return self._sum(ATTN_OUT, layer)

    def mlp(self, layer: int) -> Shares:
        """The sum to which the MLP of a layer adds.

        Raises:
            UnknownLocationError: the model has no such layer, or the layer no MLP.
        """
        return self._sum(MLP_OUT, layer)

    def _sum(self, kind: LocationType, layer: int) -> Shares:
        if not 0 <= layer < len(self.layers):
            raise UnknownLocationError(f"there is no layer {layer}: there are {len(self.layers)}, from 0 on")
        for shares in self.layers[layer]:
            if kind[layer] in shares.updates:
                return shares
        added = ", ".join(str(x) for shares in self.layers[layer] for x in shares.updates)
        raise UnknownLocationError(f"nothing of layer {layer} is {kind[layer]}: it adds {added}")

    @property
    def gap(self) -> float:
        """‖whole - Σ parts‖ / ‖whole‖, the largest of all sums: zero up to rounding."""
        return max(shares.gap for found in self.layers for shares in found)

    def threshold(self, threshold: Number) -> "Contributions":
        """Parts that contribute no more are dropped, and the others scaled to a sum of 1 again.

        The stream before gets 1 where nothing is left.
        """
        layers = tuple(tuple(x.threshold(threshold) for x in found) for found in self.layers)
        cut = threshold if self.cut is None else max(threshold, self.cut)
        return replace(self, layers=layers, cut=cut)

    def flows(self, example: int = 0, threshold: Number = 0, *, heads: bool = False) -> Iterator[Flow]:
        """The shares of one example above a threshold, as edges from token to token, in causal order.

        Args:
            example: which of the batch.
            threshold: what a share has to exceed.
            heads: whether what goes through each head is an edge of its own.

        Raises:
            LocationError: there is no such example.
        """
        self._check_example(example)
        return flows(self.layers, self.real[example], example, threshold, heads=heads)

    def graph(
        self, example: int = 0, threshold: Number = 0, *, heads: bool = False
    ) -> "networkx.MultiDiGraph[str]":
        """The graph of tokens of one example, with the shares above a threshold as edges.

        For the token at position t there are nodes `X0_t`, what is embedded; `A{layer}_t`, the stream after
        attention, where the layer has one between; `M{layer}_t`, the MLP; `I{layer}_t`, the stream after the
        layer; and one node `B{layer}` for biases. An edge has a `kind`, a `weight` and, if asked for, a
        `head`. What the stream keeps is an edge apart from what attention takes from the same token.

        Raises:
            LocationError: there is no such example.
            HookGraphError: networkx is not installed.
        """
        return to_networkx(self.flows(example, threshold, heads=heads), self._labels(example))

    def paths(
        self, token: int = -1, threshold: Number = 0.02, example: int = 0, *, heads: bool = False
    ) -> "networkx.MultiDiGraph[str]":
        """The part of the graph that leads to the last stream of a token, over edges above a threshold.

        Args:
            token: its position, of one that is no padding; negative ones count from the last.
            threshold: what a share has to exceed.
            example: which of the batch.
            heads: whether what goes through each head is an edge of its own.

        Raises:
            LocationError: there is no such example or position.
            HookGraphError: networkx is not installed.
        """
        found = self.leading_to(token, threshold, example, heads=heads)
        return to_networkx(found, self._labels(example))

    def leading_to(
        self, token: int = -1, threshold: Number = 0.02, example: int = 0, *, heads: bool = False
    ) -> list[Flow]:
        """The edges of `paths`, in causal order.

        Raises:
            LocationError: there is no such example or position.
        """
        place = self._check(example, token)
        every = self.flows(example, threshold, heads=heads)
        return backwards(every, f"I{len(self.layers) - 1}_{place}")

    def _check(self, example: int, token: int) -> int:
        """The position of a token that is no padding."""
        self._check_example(example)
        places = self.real[example].nonzero().flatten().tolist()
        if token < 0 and -token <= len(places):
            return places[token]
        if token not in places:
            raise LocationError(
                f"token={token} is no token of example {example}, whose tokens stand at {places[0]} to "
                f"{places[-1]}"
            )
        return token

    def _check_example(self, example: int) -> None:
        count = len(self.real)
        if not -count <= example < count:
            raise LocationError(f"example={example} is out of range, there are {count}")

    def _labels(self, example: int) -> list[str]:
        """What to call the tokens of an example."""
        ids = [] if self.tokens is None else self.tokens[example].tolist()
        return [self._names.get(i, str(i)) for i in ids] or [str(i) for i in range(self.real.shape[1])]

    def to_frame(self) -> "pandas.DataFrame":
        """One row per share that is not zero: example, layer, kind, from which position to which, share."""
        import pandas as pd

        rows = [
            {
                "batch": example,
                "layer": x.layer,
                "kind": x.kind,
                "key_pos": x.key,
                "pos": x.pos,
                "share": x.share,
            }
            for example in range(len(self.real))
            for x in self.flows(example)
            if x.enters
        ]
        return pd.DataFrame(rows, columns=["batch", "layer", "kind", "key_pos", "pos", "share"])

    def summary(self) -> "pandas.DataFrame":
        """One row per sum: the mean share of the stream before, of each update, and of biases."""
        import pandas as pd

        rows: dict[str, dict[str, float]] = {}
        for shares in (x for found in self.layers for x in found):
            row = {"residual": self._mean(shares.residual)}
            row.update({k.type.name: self._mean(v) for k, v in shares.updates.items()})
            if shares.biases:
                row["bias"] = sum(self._mean(v) for v in shares.biases.values())
            rows[str(shares.whole)] = row
        return pd.DataFrame(rows).T

    def _mean(self, share: Tensor) -> float:
        """Over the tokens that are no padding."""
        whole = share.flatten(2).sum(2) if share.ndim > 2 else share
        return float(whole[self.real.to(whole.device)].mean())

    def plot(self, token: int = -1, threshold: Number = 0.02, example: int = 0) -> "matplotlib.figure.Figure":
        """The paths to a token: positions on x, layers on y, lines as strong as their shares.

        Raises:
            LocationError: there is no such example or position.
            HookGraphError: matplotlib is not installed.
        """
        found = self.leading_to(token, threshold, example)
        places = self.real[example].nonzero().flatten().tolist()
        return drawing.draw(found, places, self._labels(example), len(self.layers))

    def __repr__(self) -> str:
        about = f"norm {self.norm}" if self.cut is None else f"norm {self.norm}, threshold {self.cut}"
        table = self.summary().to_string(float_format=lambda x: f"{x:.3f}", na_rep="")
        return f"Contributions, mean over tokens, {about}; Σ parts = whole within {self.gap:.0e}\n{table}"

    def _repr_html_(self) -> str:
        return self.summary().to_html(float_format=lambda x: f"{x:.3f}", na_rep="")

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file; what is mostly zero by its other entries."""
        tensors: dict[str, Tensor] = {"real": self.real}
        if self.tokens is not None:
            tensors["tokens"] = self.tokens
        layers: list[list[dict[str, Any]]] = []
        for found in self.layers:
            layers.append([])
            for shares in found:
                name = str(shares.whole)
                tensors[f"{name}/residual"] = shares.residual
                updates, order = Attribution(shares.updates).pack(f"{name}/updates")
                biases, others = Attribution(shares.biases).pack(f"{name}/biases")
                tensors.update({**updates, **biases})
                about = {"whole": name, "before": str(shares.before), "gap": shares.gap}
                layers[-1].append({**about, "updates": order, "biases": others})
        header = {"layers": layers, "norm": self.norm, "threshold": self.cut, "names": dict(self._names)}
        storage.write(path, _KIND, tensors, {**header, "metadata": dict(self.metadata)})

    @staticmethod
    def load(path: str | Path) -> "Contributions":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or not saved contributions.
        """
        tensors, header = storage.read(path, _KIND)
        layers = tuple(tuple(_shares(tensors, x) for x in found) for found in header["layers"])
        names = {int(k): v for k, v in header["names"].items()}
        real, tokens = tensors["real"], tensors.get("tokens")
        return Contributions(
            layers, header["norm"], header["threshold"], real, tokens, header["metadata"], names
        )


def _shares(tensors: storage.Tensors, about: Mapping[str, Any]) -> Shares:
    name = about["whole"]
    updates, biases = (
        Attribution.unpack(tensors, f"{name}/{kind}", about[kind], {}) for kind in ("updates", "biases")
    )
    whole, before = Location.parse(name), Location.parse(about["before"])
    return Shares(whole, before, tensors[f"{name}/residual"], dict(updates), dict(biases), about["gap"])
