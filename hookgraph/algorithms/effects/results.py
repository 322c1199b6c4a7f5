"""`PatchingEffect`: how much each node matters, with named axes and the conventions it rests on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, final

from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms import plotting
from hookgraph.algorithms.attribution import Attribution
from hookgraph.algorithms.ranking import Node, Ranking
from hookgraph.errors import HookGraphError, LoadError, LocationError
from hookgraph.graph import storage
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_KIND = "patching effect"

Remeasure = Callable[[Sequence[Location]], Float[Tensor, "... batch"]]
"""Exact effects of nodes, each a part of a location; where there are none, a text says why."""


@final
@dataclass(frozen=True, slots=True)
class Convention:
    """What was computed, so that numbers of different origin are not compared by mistake.

    Args:
        method: how the effects were found.
        sign: what is subtracted from what.
        ablation: what stands in for a node: its `corrupt` value, or `zero`.
        quadrature: the rule of the path integral, if there is one.
        steps: its number of points; with a tolerance, the most that any site took.
        splice_gradient: what the gradient of an injected dictionary is.
        tolerance: the share of a site's change that its residual may have, if steps were adapted to it.
    """

    method: str
    sign: str = "corrupt - clean"
    ablation: str = "corrupt"
    quadrature: str = ""
    steps: int = 0
    splice_gradient: str = "identity"
    tolerance: float | None = None

    @property
    def signed(self) -> bool:
        """Whether effects have a sign; those of AtP* are means of absolute values."""
        return self.method != "atp_star"


@final
@dataclass(frozen=True, eq=False, repr=False)
class PatchingEffect:
    """How much each node matters for a metric.

    Args:
        effects: by location, over its axes less those that were reduced.
        deltas: corrupt - clean, by location.
        grads: the gradients that were used, by location; empty for exact patching.
        total_effect: m(corrupt) - m(clean) per example; None without a corrupt input.
        convention: what was computed, and how.
        residuals: per location and example, Σ effects of its site - [m(clean | site := corrupt) - m(clean)].
        incomplete: the locations whose residual is larger than the tolerance asked for.
        metadata: the model's name, revision and dtype.
        standard_errors: of effects that are means over a stream of examples; none after `.sum` and `.mean`,
            since what nodes have in common does not show in them. Give the axes as `joint`, or add up
            positions with `positions="summed"`, to have those of the sums.
    """

    effects: Attribution
    deltas: Attribution
    grads: Attribution
    total_effect: Float[Tensor, " ..."] | None
    convention: Convention
    residuals: Mapping[Location, Float[Tensor, "..."]] = field(default_factory=dict[Location, Tensor])
    incomplete: tuple[Location, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    standard_errors: Attribution = field(default_factory=lambda: Attribution({}))
    _remeasure: Remeasure | str = "it does not hold the model"

    @property
    def reduced(self) -> Mapping[Dimension, str]:
        """What was done to an axis of the effects that is gone: `sum` or `mean`."""
        return self.effects.reduced

    def __getstate__(self) -> dict[str, object]:
        """Everything but the model, which `check` needs."""
        return {
            **self.__dict__,
            "_remeasure": "it was copied elsewhere, and does not hold the model",
        }

    def __getitem__(self, location: Location) -> Float[Tensor, "..."]:
        """The effects at a location, as in `.effects[location]`.

        Raises:
            LocationError: there are none.
        """
        return self.effects[location]

    def dims(self, location: Location) -> tuple[Dimension, ...]:
        """The axes that the effects at a location still have."""
        return self.effects.dims(location)

    def sum(self, *dims: str) -> "PatchingEffect":
        """Effects summed over axes, by name: `.sum("pos", "d_head")`."""
        return replace(self, effects=self.effects.sum(*dims), standard_errors=Attribution({}))

    def mean(self, *dims: str) -> "PatchingEffect":
        """Effects averaged over axes, by name: `.mean("batch")`."""
        return replace(self, effects=self.effects.mean(*dims), standard_errors=Attribution({}))

    def nodes(self) -> Iterator[Node]:
        """Every node: each location, indexed along the axes that the effects still have."""
        return self.effects.nodes()

    def top(self, k: int = 10) -> Ranking:
        """The k nodes with the largest |effect|. Reduce axes first to say what a node is."""
        return self.effects.top(k)

    def check(self, top: int = 10) -> Ranking:
        """The top nodes, each measured exactly as well: patched alone into the clean run.

        Estimates without a sign stand beside the absolute value of what each example changes.

        Raises:
            HookGraphError: the result was loaded from a file, is of pairs that are gone, or is exact already;
                or an axis other than the batch was averaged.
        """
        if isinstance(self._remeasure, str):
            raise HookGraphError(f"this result cannot be checked: {self._remeasure}")
        averaged = [d.value for d, how in self.reduced.items() if how == "mean" and d != Dimension.BATCH]
        if averaged:
            raise HookGraphError(
                f"a mean over {', '.join(averaged)} is no node that can be patched: use .sum"
            )
        ranking = self.top(top)
        measured = self._remeasure([_without_batch(n.location) for n in ranking])
        how = self.reduced.get(Dimension.BATCH)
        nodes: list[Node] = []
        for node, per_example in zip(ranking, measured, strict=True):
            example = dict(node.location.index).get(Dimension.BATCH)
            per_example = per_example if self.convention.signed else per_example.abs()
            if isinstance(example, int):
                exact = per_example[example]
            else:
                exact = per_example.mean() if how == "mean" else per_example.sum()
            nodes.append(replace(node, exact=float(exact)))
        return Ranking(tuple(nodes))

    def to_frame(self) -> "pandas.DataFrame":
        """One row per node: location, its indices, and the effect."""
        return self.effects.to_frame()

    def plot(self, labels: Mapping[str, Sequence[str]] | None = None) -> "matplotlib.figure.Figure":
        """A map per kind of location: layers on y, the one axis that is left on x, colours centred at 0.

        `effect.mean("batch").sum("pos", "d_head").plot()` is the head x layer map; after
        `.sum("d_model")` instead, `labels={"pos": tokens}` names the positions.

        Raises:
            HookGraphError: more than one axis is left, labels are missing, or matplotlib is.
        """
        axes = {location: self.dims(location) for location in self.effects}
        return plotting.draw(plotting.layer_maps(self.effects, axes, labels), figure=plotting.new_figure())

    def _told(self) -> list[str]:
        """What is said of all nodes: how they were found, the total effect, and what is not trusted."""
        total = "" if self.total_effect is None else f", total effect {float(self.total_effect.mean()):+.4f}"
        lines = [f"{self.convention.method} over {len(self.effects)} locations{total}"]
        if self.incomplete:
            places = ", ".join(map(str, self.incomplete))
            lines.append(f"not within the tolerance of {self.convention.tolerance}: {places}")
        return lines

    def __repr__(self) -> str:
        return "\n".join([*self._told(), repr(self.top(8))])

    def _repr_html_(self) -> str:
        told = "".join(f"<p>{escape(line)}</p>" for line in self._told())
        return told + self.top(20).to_html()

    def save(self, path: str | Path) -> None:
        """Write effects, deltas, gradients, residuals and conventions to a safetensors file.

        Tensors that are mostly zero, as those of latents are, are stored by their other entries.
        """
        groups = {
            "effects": self.effects,
            "deltas": self.deltas,
            "grads": self.grads,
            "standard_errors": self.standard_errors,
        }
        tensors: dict[str, Tensor] = {f"residuals/{place}": v for place, v in self.residuals.items()}
        order = {"residuals": [str(x) for x in self.residuals]}
        for name, group in groups.items():
            packed, order[name] = group.pack(name)
            tensors.update(packed)
        if self.total_effect is not None:
            tensors["total_effect"] = self.total_effect
        header = {
            "order": order,
            "convention": asdict(self.convention),
            "reduced": {name: dict(group.reduced) for name, group in groups.items()},
            "incomplete": [str(x) for x in self.incomplete],
            "metadata": dict(self.metadata),
        }
        storage.write(path, _KIND, tensors, header)

    @staticmethod
    def load(path: str | Path) -> "PatchingEffect":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, not a saved effect, or of locations that are not declared.
        """
        tensors, header = storage.read(path, _KIND)
        order: Mapping[str, Sequence[str]] = header["order"]

        def group(name: str) -> Attribution:
            reduced = {Dimension(d): how for d, how in header["reduced"][name].items()}
            return Attribution.unpack(tensors, name, order[name], reduced)

        try:
            return PatchingEffect(
                group("effects"),
                group("deltas"),
                group("grads"),
                tensors.get("total_effect"),
                Convention(**header["convention"]),
                {Location.parse(text): tensors[f"residuals/{text}"] for text in order["residuals"]},
                tuple(map(Location.parse, header["incomplete"])),
                header["metadata"],
                group("standard_errors"),
                "it was loaded from a file, and does not hold the model",
            )
        except LocationError as error:
            raise LoadError(
                f"{path} holds effects at a location that is not declared; import what declares it: {error}"
            ) from error


def _without_batch(location: Location) -> Location:
    return replace(location, index=tuple(p for p in location.index if p[0] != Dimension.BATCH))
