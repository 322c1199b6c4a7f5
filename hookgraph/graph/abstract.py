"""The two classes a user may subclass: a binding of some model, and a subgraph to inject."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, final, runtime_checkable

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hookgraph.errors import InputError, LocationError, SubgraphError, UnknownLocationError
from hookgraph.graph.conformance import ConformanceReport
from hookgraph.graph.measuring import Reads, check_real
from hookgraph.hooks.positions import Place
from hookgraph.hooks.taps import Taps
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import MAIN_STACK, Location
from hookgraph.ontology.weights import WeightType

Inputs: TypeAlias = Tensor | Mapping[str, object] | str | list[str]
"""What can be run: token ids (batch, pos), keyword arguments of the model, or text where there is a
tokenizer."""

Prepared: TypeAlias = Mapping[str, object]
"""Inputs as keyword arguments of the model, on its device."""


@runtime_checkable
class OfExamples(Protocol):
    """Something among prepared inputs, such as what a cache holds, that has a part for each example."""

    def rows(self, chosen: slice | Int[Tensor, " batch"]) -> "OfExamples":
        """The same for some examples.

        Raises:
            InputError: it cannot be divided.
        """
        ...


@final
@dataclass(frozen=True, slots=True)
class Start:
    """Where a replay starts: `value` enters block `block` of `stack`; earlier blocks do not run.

    A block number equal to the number of blocks means what comes after the last of them. `location` is
    where the value was read: hooks of others may lie between the end of one block and the next.
    """

    stack: str
    block: int
    value: Shaped[Tensor, "batch pos ..."]
    location: Location


class AbstractBinding(ABC):
    """A model seen as locations. Everything above this class knows nothing else of a model."""

    @property
    @abstractmethod
    def locations(self) -> tuple[Location, ...]:
        """Every location of the model, in causal order. Each fires exactly once per forward pass."""

    @abstractmethod
    def why_absent(self, location: Location) -> str:
        """Why the model does not have this location: a clause such as "no sum exists there"."""

    @abstractmethod
    def prepare(self, inputs: Inputs, *, copies: int = 1) -> Prepared:
        """Inputs as the model takes them, the whole batch repeated `copies` times.

        Raises:
            InputError: the inputs cannot be run, with the reason.
        """

    @abstractmethod
    def forward(self, inputs: Prepared) -> Float[Tensor, "batch ..."]:
        """One forward pass of the model as it is now, taps included if it is attached.

        It returns the logits; of a model that has none, what it has instead.
        """

    @abstractmethod
    def attached(self, taps: Taps, start: Start | None = None) -> AbstractContextManager[None]:
        """Within this context every forward pass of the model calls the taps.

        Raises:
            AlreadyAttachedError: another graph holds the model.
        """

    @abstractmethod
    def frozen(self) -> AbstractContextManager[None]:
        """Within this context no parameter of the model asks for a gradient."""

    def why_closed(self, stack: str, block: int, after: Location | None = None) -> str:
        """Why `attached` cannot start before a layer of a stack, or after the last one; empty if it can.

        With `after`: as the model is now, and with a value of that location.
        """
        return ""

    def reading(self, reads: Reads, tokens: Int[Tensor, "..."] | None = None) -> AbstractContextManager[bool]:
        """Within this context `forward` returns the logits at these positions only, if the context says so.

        A binding that cannot leave logits out returns all of them, and says False. Of tokens that are not
        among `tokens`, where these are given, logits may be 0.
        """
        return nullcontext(False)

    def remember(self, inputs: Prepared, length: int) -> Prepared | None:
        """Inputs for the positions from `length` on, with what the model remembers of those before.

        Runs the model over the first positions, taps included if it is attached. None where the model
        remembers nothing, or where it is not known whether that is all that those positions do.
        """
        return None

    def retaining(self, inputs: Prepared, rows: int | None = None) -> Prepared | None:
        """These inputs, so given that a pass over them retains what it remembers of each position, of the
        first `rows` examples if that is given: then `remember` takes no pass of its own.

        None where it has to.
        """
        return None

    @property
    def recomputes(self) -> bool:
        """Whether a backward pass of the last pass runs parts of the model again, as with checkpointing."""
        return False

    def draws(self, inputs: Prepared) -> str:
        """What is drawn at random in a pass over these inputs, such as dropout while a model trains; empty if
        nothing is known to be.
        """
        return ""

    def place(self, inputs: Prepared) -> Place | None:
        """Where one pass over these inputs lies in its sequences; None: at their start, without padding."""
        return None

    def check_read(self, inputs: Prepared, reads: Reads) -> None:
        """See that none of the positions whose logits are read is padding, where it can be told what is.

        Raises:
            MetricError: one is.
        """
        try:
            place = self.place(inputs)
        except LocationError:  # a mask does not show it
            return
        span = None if place is None else place.spans.get(MAIN_STACK)
        if span is not None and span.length:
            check_real(reads, span)

    def following(self, place: Place) -> AbstractContextManager[None]:
        """Within this context `place` is brought up to date when a pass of the model begins."""
        return nullcontext()

    def generate(self, inputs: Prepared, options: Mapping[str, object]) -> Int[Tensor, "batch pos"]:
        """The sequences that the model generates from these inputs, taps included if it is attached.

        Raises:
            InputError: this model does not generate.
        """
        raise InputError(f"{type(self).__name__} does not generate: use run")

    def weight(
        self, kind: WeightType, layer: int | None = None, stack: str = MAIN_STACK
    ) -> Float[Tensor, "..."]:
        """A weight, or a bias, in the normal form that `WeightType` states.

        Raises:
            UnknownLocationError: this binding has no such weight.
        """
        raise UnknownLocationError(f"{type(self).__name__} has no weights by name, so no {kind}")

    def token_texts(self, tokens: Sequence[int]) -> Mapping[int, str]:
        """Tokens as text; none where there is no tokenizer."""
        return {}

    @property
    def report(self) -> ConformanceReport:
        """What was proven of the locations when the model was bound; empty if nothing was."""
        return ConformanceReport()

    @property
    def metadata(self) -> Mapping[str, str]:
        """What results should remember of the model: its name, revision, dtype."""
        return {}

    @property
    def fingerprint(self) -> str:
        """A short name of what tells the model from others of its name, such as of its weights."""
        return ""


@final
@dataclass(frozen=True, slots=True)
class Frame:
    """What a subgraph sees of the pass it takes part in.

    Args:
        taps: the taps of every location, this subgraph's included.
        memory: the subgraph's own notes, for what is read at one site and written at another.
        place: where the pass lies in its sequences; None: at their start.
    """

    taps: Taps
    memory: dict[str, Any] = field(default_factory=dict[str, Any])
    place: Place | None = None

    def past(self, location: Location) -> int:
        """How many positions of its sequences earlier passes held, padding included."""
        span = None if self.place is None else self.place.spans.get(location.root.type.stack)
        return 0 if span is None else span.past

    def wanted(self, *locations: Location) -> bool:
        """Whether anyone hooks, saves or splices at one of these: if not, none need be computed."""
        return any(location in self.taps for location in locations)

    def edited(self, location: Location) -> bool:
        """Whether the value at this location may be replaced."""
        tap = self.taps.get(location)
        return tap is not None and tap.edits

    def is_given(self, location: Location) -> bool:
        """Whether the value at this location is the same whatever is handed over: it need not be computed."""
        tap = self.taps.get(location)
        return tap is not None and tap.given is not None

    def asked(self, location: Location, dim: Dimension) -> tuple[int, ...] | None:
        """The indices along one axis of which anything is asked; None where that may be all of them.

        It is enough to compute these, and to hand them over: `frame.tap(location.at(latent=[3, 5]), part)`.
        """
        tap = self.taps.get(location)
        return () if tap is None else tap.asked(dim)

    def tap(self, location: Location, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Let everything happen that is asked for at this location; returns the value to go on with.

        What is handed over stays as it is: hooks see a copy, and the gradient at the location is that of
        what is returned, whatever else `value` is used for. `value` itself comes back if it was not
        replaced and no gradient goes through it.
        """
        tap = self.taps.get(location.whole)
        if tap is None:
            return value
        if tap.edits and tap.given is None:
            apart = value.clone()
        else:
            apart = value.view_as(value) if value.is_floating_point() else value
        new = tap(apart, location if location.index else None)
        return value if new is apart and not new.requires_grad else new


@final
class _Name:
    """`name`, which a subclass gives as a field, a property or a class attribute."""

    def __get__(self, subgraph: "AbstractSubgraph | None", kind: type) -> str:
        if subgraph is None:
            raise AttributeError("no default for a field of a dataclass")
        raise SubgraphError(f"{kind.__name__} has no name: give it a field or a property `name`")


@final
class _Sites:
    """`sites`, unless a subclass has a field, a property or a class attribute of that name."""

    def __get__(self, subgraph: "AbstractSubgraph | None", kind: type) -> tuple[Location, ...]:
        if subgraph is None:
            raise AttributeError("no default for a field of a dataclass")
        return tuple(dict.fromkeys(x.site for x in subgraph.locations if x.site is not None))


class AbstractSubgraph(ABC):
    """Something injected into a model that brings locations of its own into being.

    A subclass is usually a frozen dataclass (with `eq=False` if it holds tensors).
    """

    # Neither annotated nor abstract, so that a subclass may have fields of these names.
    name = _Name()
    """Its name, unique among the subgraphs of one site; a part of its locations' names."""

    sites = _Sites()
    """The whole locations that it reads or writes, of the model or of another subgraph: unless stated
    otherwise, those at which its locations stand."""

    @property
    def pointwise(self) -> bool:
        """Whether it treats each position by itself, so that a pass may leave out some."""
        return False

    @property
    def acts(self) -> bool:
        """Whether it changes a value or a gradient, or looks at one, though nothing is asked at its own
        locations: where it does not, passes in which nothing is asked there go without it.
        """
        return True

    @property
    def splice_gradient(self) -> str:
        """How a gradient goes through its sites, where that is not what its computation says; or empty."""
        return ""

    @property
    @abstractmethod
    def locations(self) -> tuple[Location, ...]:
        """The locations it brings into being, each made by `TYPE().within(site, self.name)`."""

    @abstractmethod
    def visit(self, site: Location, value: Shaped[Tensor, "..."], frame: Frame) -> Shaped[Tensor, "..."]:
        """Called when the pass reaches a site; returns what goes on (`value` itself if unchanged).

        Call `frame.tap(location, value)` once for each own location, in causal order, and go on
        with what it returns: that is how hooks, saves and nested subgraphs reach it.
        """

    def is_linear(self, location: Location) -> bool:
        """Whether what goes on at its one site is linear in the values at an own location, and the gradient
        there is that of what goes on: then `push` tells of changes of any size.
        """
        return False

    def pull(
        self,
        location: Location,
        x: Shaped[Tensor, "..."],
        left: Shaped[Tensor, "..."],
        chosen: Int[Tensor, "..."] | None = None,
    ) -> Shaped[Tensor, "..."]:
        """The gradient with respect to x of Σ left · (the values at an own location), row by row.

        x is what the site holds at some positions, one per row. The values are read as functions of x,
        whatever the gradient of what goes on is. Give it where each position is read on its own.

        Args:
            location: an own one.
            x: the rows.
            left: one number per row and value; with `chosen`, one per row.
            chosen: of each row the one value that counts.

        Raises:
            SubgraphError: this subgraph does not tell.
        """
        raise SubgraphError(_untold(self, "pull"))

    def push(
        self,
        location: Location,
        x: Shaped[Tensor, "..."],
        delta: Shaped[Tensor, "..."],
        chosen: Int[Tensor, "..."] | None = None,
    ) -> Shaped[Tensor, "..."]:
        """By how much what goes on changes, to first order, if the values at an own location change by delta.

        Args:
            location: an own one.
            x: what the site holds at some positions, one per row.
            delta: one number per row and value; with `chosen`, one per row.
            chosen: of each row the one value that changes.

        Raises:
            SubgraphError: this subgraph does not tell.
        """
        raise SubgraphError(_untold(self, "push"))


def _untold(subgraph: AbstractSubgraph, method: str) -> str:
    kind = type(subgraph).__name__
    return (
        f"subgraph {subgraph.name!r} does not say how its nodes change with its site: edges to and from them "
        f"need the methods `pull` and `push`, and {kind} has no `{method}`"
    )
