"""`HookGraph`: a model's locations together with what is to happen at them, as a frozen value."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hookgraph.errors import InputError, UnknownLocationError, nearest
from hookgraph.graph.abstract import AbstractBinding, AbstractSubgraph, Inputs, Prepared, Start
from hookgraph.graph.arguments import a_hook, a_location, a_weight, asked, chooses_steps
from hookgraph.graph.compiling import Registration, compile_taps
from hookgraph.graph.conformance import ConformanceReport
from hookgraph.graph.examples import batch_size
from hookgraph.graph.generating import Generation, StepRecorder
from hookgraph.graph.injecting import check_injectable
from hookgraph.graph.measuring import Metric, measure, positions_read, tokens_read
from hookgraph.graph.reaching import hooked_places
from hookgraph.graph.recording import EnoughSeen, Recorder
from hookgraph.graph.replay import can_start, check_entry, latest_entry, start_at, taps_from
from hookgraph.graph.run import Run
from hookgraph.hooks.editing import Hook
from hookgraph.hooks.positions import Place, is_placed
from hookgraph.hooks.taps import Taps
from hookgraph.ontology.locations import MAIN_STACK, Location, LocationType
from hookgraph.ontology.passes import PassType
from hookgraph.ontology.transformer import LOGITS, RESID_PRE, STREAMS_PRE
from hookgraph.ontology.weights import WeightType


@final
@dataclass(frozen=True, eq=False)
class HookGraph:
    """A model's locations, and the hooks and subgraphs at them. A value: methods return new graphs.

    The model is touched only inside `attached` and `run`, and is bit for bit itself afterwards.

    Args:
        binding: how the locations are reached in the model; `hookgraph.bind(model)` makes one.
        registrations: the hooks, in order.
        subgraphs: the injected subgraphs, in order.
    """

    binding: AbstractBinding
    registrations: tuple[Registration, ...] = ()
    subgraphs: tuple[AbstractSubgraph, ...] = ()

    def __repr__(self) -> str:
        layers = len({x.layer for x in self.binding.locations if x.type.stack == MAIN_STACK} - {None})
        counts = {
            "layer": layers,
            "location": len(self.locations),
            "hook": len(self.registrations),
            "subgraph": len(self.subgraphs),
        }
        told = ", ".join(f"{n} {name}{'' if n == 1 else 's'}" for name, n in counts.items())
        return f"HookGraph of {self.binding.metadata.get('class', type(self.binding).__name__)}: {told}"

    @property
    def locations(self) -> tuple[Location, ...]:
        """Every location of the model and of the injected subgraphs, in causal order."""
        own = self.binding.locations
        if not self.subgraphs:
            return own
        injected = [x for subgraph in self.subgraphs for x in subgraph.locations]
        return tuple(sorted((*own, *injected), key=lambda x: x.order))

    def every(self, kind: LocationType | Location) -> tuple[Location, ...]:
        """All locations of one type, in causal order; those of a layer that lacks it are left out.

        Raises:
            UnknownLocationError: no layer has it, with the reason.
        """
        wanted = kind if isinstance(kind, LocationType) else a_location(kind).type
        found = tuple(x for x in self.locations if x.type == wanted)
        if isinstance(kind, Location) and kind.site is not None:
            found = tuple(x for x in found if x.subgraph == kind.subgraph)
        if not found:
            self.check(wanted[0] if wanted.layered else wanted())
        return found

    def weight(
        self, kind: WeightType, layer: int | None = None, stack: str = MAIN_STACK
    ) -> Float[Tensor, "..."]:
        """A weight, or a bias, of the model in its normal form: `graph.weight(W_O, layer=3)`.

        Raises:
            UnknownLocationError: the model has no such weight; near names are given.
        """
        return self.binding.weight(a_weight(kind), layer, stack)

    @property
    def report(self) -> ConformanceReport:
        """What was proven of each location when the model was bound, and why others are absent."""
        return self.binding.report

    def check(self, location: Location) -> Location:
        """`location` itself if this graph has it, its index included.

        Raises:
            UnknownLocationError: it has not, with the reason and the nearest names.
        """
        whole = a_location(location).whole
        if whole in self._known:
            return location
        if whole.site is not None:
            raise UnknownLocationError(f"this graph has no location {whole}: {self._why_not_inside(whole)}")
        raise UnknownLocationError(f"this model has no location {whole}: {self.binding.why_absent(whole)}")

    def _why_not_inside(self, whole: Location) -> str:
        for subgraph in self.subgraphs:
            if subgraph.name == whole.subgraph and whole.site in subgraph.sites:
                near = nearest(str(whole), map(str, subgraph.locations))
                return f"subgraph {subgraph.name!r} brings none such into being; {near}"
        return f"inject its subgraph first; {nearest(str(whole), map(str, self._known))}"

    @property
    def _known(self) -> frozenset[Location]:
        cached = self.__dict__.get("_known_locations")
        if cached is None:
            cached = frozenset(self.locations)
            object.__setattr__(self, "_known_locations", cached)
        return cached

    def hook(self, location: Location, fn: Hook) -> "HookGraph":
        """A graph that also calls `fn` with the value at `location`, or with its gradient there.

        `fn` gets the tensor (the part that the location names) and returns a replacement of the same
        shape, dtype and device, or None to leave it.

        Raises:
            UnknownLocationError: this graph has no such location.
            HookGraphError: `fn` cannot be called with one tensor.
        """
        return replace(
            self, registrations=(*self.registrations, (self.check(location), a_hook(location, fn)))
        )

    def stop_gradient(self, location: Location) -> "HookGraph":
        """A graph in which `location` passes its value on, but no gradient back."""
        return self.hook(self.check(location).activation, Tensor.detach)

    def inject(self, *subgraphs: AbstractSubgraph) -> "HookGraph":
        """A graph with `subgraphs` at their sites, after what is there already.

        Raises:
            SubgraphError: a site is unknown, a name is taken, or locations overlap.
        """
        graph = self
        for subgraph in subgraphs:
            check_injectable(subgraph, graph.subgraphs, graph.check)
            graph = replace(graph, subgraphs=(*graph.subgraphs, subgraph))
        return graph

    @contextmanager
    def attached(self) -> Generator["HookGraph"]:
        """Within this context the model's own calls are hooked: `model(...)`, `model.generate(...)`.

        A hook on positions is called in the passes that hold some of them, wherever the sequence has got to.

        Raises:
            AlreadyAttachedError: a graph holds the model already.
        """
        placed = any(is_placed(location) for location, _ in self.registrations)
        place = Place() if placed or self._mixes else None
        taps = compile_taps(self.registrations, self.subgraphs, place=place)
        following = nullcontext() if place is None else self.binding.following(place)
        with self.binding.attached(taps), following:
            yield self
        taps.clear()

    def run(
        self,
        inputs: Inputs,
        *,
        save: Sequence[Location] | Location = (),
        metric: Metric | None = None,
        grad: bool | None = None,
        logits: bool = True,
    ) -> Run:
        """One forward pass, and one backward pass if a gradient is asked for.

        Without a metric the pass stops after the last location asked for; reading `run.logits` then
        completes it.

        Args:
            inputs: token ids, keyword arguments of the model, or text where there is a tokenizer.
            save: the locations to keep, parts and gradients among them.
            metric: logits -> one number per example.
            grad: True keeps the autograd graph of everything returned. By default there is one only
                while gradients are asked for, without those of the model's parameters.
            logits: False computes only the logits that the metric reads, if it says which; reading
                `run.logits` then takes one more pass.

        Raises:
            UnknownLocationError: this graph has no such location.
            MetricError: the metric is not one number per example, or has no gradient at a location.
            InputError: the inputs cannot be run.
            HookGraphError: the pass does not reach a hook, or what is to be saved.
        """
        return self._pass(self.binding.prepare(inputs), asked(save), metric, grad, whole=logits)

    def replay(
        self,
        run: Run,
        after: Location,
        *,
        value: Shaped[Tensor, "batch pos ..."] | None = None,
        save: Sequence[Location] | Location = (),
        metric: Metric | None = None,
        grad: bool | None = None,
        logits: bool = True,
    ) -> Run:
        """Like `run` on the inputs of an earlier run, executing only what lies after a location.

        The value enters at `after`, where hooks, saves and subgraphs apply to it as in a full pass; a hook
        there that the earlier run was made with does not apply to the value that this run saved once more.
        The blocks before it are not executed: hooks before it are those of the earlier run. Its batch may
        be several times that of the earlier run: row i belongs to example i modulo the earlier batch.

        Args:
            run: the earlier run, whose inputs are used.
            after: a whole `resid.pre` or `resid.post`.
            value: what enters there; by default what the earlier run saved.

        Raises:
            LocationError: `after` is no boundary between blocks, or something asked for precedes it.
            ShapeMismatchError: the value is of another shape or dtype than what the earlier run saved there,
                or its batch is no multiple of the earlier one.
            SubgraphError: a subgraph has sites before `after` and others behind it.
            InputError: the earlier run holds no inputs.
        """
        check_entry(self.check(after), self.subgraphs)
        if value is None:
            done = [r for r in self.registrations if r[0].activation.whole == after and run.is_hooked_by(r)]
            left = tuple(
                r for r in self.registrations if r not in done or r[0].pass_type is PassType.BACKWARD
            )
            graph, entering = replace(self, registrations=left), run[after]
        else:
            graph, entering = self, value
        if not entering.requires_grad:  # a tensor of its own, since gradients may be asked for there
            entering = entering.detach()
        start, copies = start_at(after, entering, batch_size(run.inputs), run.saved.get(after))
        save = asked(save)
        for location in save:
            if self.check(location).root.precedes(after):
                raise UnknownLocationError(f"{location} comes before {after}, where this replay starts")
        inputs = self.binding.prepare(dict(run.inputs), copies=copies)
        return graph._pass(inputs, save, metric, grad, start=start, after=after, whole=logits)

    def entry(self, location: Location) -> Location | None:
        """The last `resid.pre` from which a replay reaches `location`, and whole every subgraph that it
        reaches; None if there is none.

        One with a hook of this graph is none: what a run saves there is hooked already.
        """
        self.check(location)
        hooked = {x.whole for x, _ in self.registrations if x.pass_type is PassType.FORWARD}
        entries = (x for x in self.locations if x.type in (RESID_PRE, STREAMS_PRE) and x not in hooked)
        possible = (x for x in entries if can_start(self.binding, x))
        return latest_entry(location, possible, self.subgraphs)

    def remember(self, inputs: Inputs, length: int) -> Prepared | None:
        """Inputs for the positions from `length` on: run, they give what the whole inputs give there.

        The first positions are run once, and every pass over the rest uses what the model remembers of them.
        None where that is not known to be right: there are hooks or subgraphs that may look at several
        positions, padding, or a model without a cache of keys and values. That later positions do not
        change earlier ones is for the caller to see: compare one run with that of the whole inputs.
        """
        if self.registrations or self._mixes:
            return None
        taps = compile_taps((), self.subgraphs)
        with torch.no_grad(), self.binding.attached(taps):
            rest = self.binding.remember(self.binding.prepare(inputs), length)
        taps.clear()
        return rest

    def retaining(self, inputs: Inputs, rows: int | None = None) -> Prepared | None:
        """These inputs, so given that one run of them spares `remember` the first positions.

        With `rows`, only the first so many examples are remembered, and what `remember` gives is for these.

        None where `remember` has to see how these come out alone: there are hooks or subgraphs that may look
        at several positions, padding, or it is not proven that later positions leave earlier ones alone.
        """
        if self.registrations or self._mixes:
            return None
        return self.binding.retaining(self.binding.prepare(inputs), rows)

    def generate(
        self, inputs: Inputs, *, save: Sequence[Location] | Location = (), **options: object
    ) -> Generation:
        """The model's own `generate()` under this graph, with what each of its passes is to save.

        Args:
            inputs: as for `run`.
            save: activations to keep, parts among them: `.at(pos=...)` those of the sequence, `.at(step=...)`
                those of some passes.
            options: what the model's `generate()` takes, such as `max_new_tokens` and `do_sample`.

        Raises:
            UnknownLocationError: this graph has no such location.
            MetricError: a gradient is asked for.
            InputError: the inputs cannot be run, or the model does not generate.
            HookGraphError: no pass reaches a hook.
        """
        place = Place()
        hooked = hooked_places(self.registrations)
        recorder = StepRecorder([self.check(x) for x in asked(save)], place, hooked)
        observers, held = recorder.observers(), recorder.holds if asked(save) else None
        taps = compile_taps(self.registrations, self.subgraphs, observers, place=place, held=held)
        with torch.no_grad(), self.binding.attached(taps), self.binding.following(place):
            tokens = self.binding.generate(self.binding.prepare(inputs), options)
        taps.clear()
        return recorder.generation(tokens, self.binding.metadata)

    @property
    def _mixes(self) -> bool:
        """Whether a subgraph may look at several positions: it is told which ones the pass holds."""
        return not all(subgraph.pointwise for subgraph in self.subgraphs)

    def _place(self, inputs: Prepared, save: Sequence[Location]) -> Place | None:
        """Where a pass lies in its sequences; None where every part is what its index says of the tensor."""
        placed = [x for x in (*save, *(x for x, _ in self.registrations)) if is_placed(x)]
        if not (placed or self._mixes):
            return None
        place = self.binding.place(inputs)
        return Place(alone=True) if place is None and any(map(chooses_steps, placed)) else place

    @contextmanager
    def _recomputing(self, taps: Taps, start: Start | None) -> Generator[None]:
        """What a backward pass runs again is run as before: attached."""
        with self.binding.attached(taps, start) if self.binding.recomputes else nullcontext():
            yield

    def _pass(
        self,
        inputs: Prepared,
        save: Sequence[Location],
        metric: Metric | None,
        grad: bool | None,
        start: Start | None = None,
        after: Location | None = None,
        *,
        whole: bool = True,
    ) -> Run:
        for location in save:
            self.check(location)
        place = self._place(inputs, save)
        stop, hooked = bool(save) and metric is None, hooked_places(self.registrations, after)
        recorder = Recorder(save, stop=stop, keep_graph=bool(grad), place=place, hooked=hooked)
        needs_graph = bool(grad) or bool(recorder.differentiated)
        observers, held = recorder.observers(), recorder.holds if save else None
        taps = compile_taps(self.registrations, self.subgraphs, observers, recorder.tracked, place, held)
        reached = taps if after is None else taps_from(after, taps)[0]
        logits: Tensor | None = None
        reads = positions_read(metric)
        if reads is not None:
            self.binding.check_read(inputs, reads)
        reads = None if whole or LOGITS in taps else reads
        reading = nullcontext(False) if reads is None else self.binding.reading(reads, tokens_read(metric))
        frozen = self.binding.frozen() if needs_graph and not grad else nullcontext()
        attached = self.binding.attached(reached, start)
        # What a backward pass runs again must find the parameters frozen as they were.
        with frozen, torch.set_grad_enabled(needs_graph):
            with attached, reading as taken, suppress(EnoughSeen):
                logits = self.binding.forward(inputs)
            if grad and self.binding.recomputes:
                raise InputError(
                    "with gradient checkpointing a backward pass runs the model again, without the hooks of "
                    "a run that is over: name the gradients in `save`, or call the model within "
                    "`graph.attached()`"
                )
            measured = None
            if metric is not None and logits is not None:
                measured = measure(metric, logits, taken=taken)
            with self._recomputing(reached, start) if recorder.differentiated else nullcontext():
                values = recorder.values(measured)
        taps.clear()
        if not grad:
            measured = None if measured is None else measured.detach()
            logits = None if logits is None else logits.detach()

        def complete() -> Tensor:
            return self._pass(inputs, (), None, False, start, after).logits

        known = None if taken else logits
        about, found = self.binding.metadata, complete if known is None else known
        where = partial(self.binding.place, inputs)
        return Run(values, measured, inputs, about, found, self.registrations, where)
