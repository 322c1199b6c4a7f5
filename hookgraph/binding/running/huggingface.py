"""A HuggingFace model seen as locations."""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hookgraph.binding.data.anchors import Anchor, Mechanism, Role
from hookgraph.binding.data.findings import Findings
from hookgraph.binding.running.attention import Interior, TapsByCall, sharing
from hookgraph.binding.running.compiled import as_written
from hookgraph.binding.running.draws import drawn_by
from hookgraph.binding.running.experts import ExpertsInterior
from hookgraph.binding.running.identity import fingerprint, identity
from hookgraph.binding.running.inputs import Accepted, device_of, embedding_of, prepare, vocabulary_size
from hookgraph.binding.running.mechanisms import give_copies, install, needs_state, notice_recomputing
from hookgraph.binding.running.modules import Modules
from hookgraph.binding.running.narrowing import NARROWED, is_one_each, last_mlp, modules_behind, narrowing
from hookgraph.binding.running.others import is_hooked
from hookgraph.binding.running.outputs import read_output
from hookgraph.binding.running.own_code import OwnCode
from hookgraph.binding.running.passes import PassState
from hookgraph.binding.running.positions import Following, spans_of
from hookgraph.binding.running.products import OwnProduct
from hookgraph.binding.running.reading import reading
from hookgraph.binding.running.recalling import recalled, several
from hookgraph.binding.running.remembering import Memory
from hookgraph.binding.running.sharing import SHARED, SharedPast, attending
from hookgraph.binding.running.skipping import enter_first, miscounted, skipping, why_closed
from hookgraph.binding.running.weights import normal_form
from hookgraph.errors import AlreadyAttachedError, InputError, UnknownLocationError, nearest
from hookgraph.graph.abstract import AbstractBinding, Inputs, Prepared, Start
from hookgraph.graph.conformance import ConformanceReport
from hookgraph.graph.measuring import Reads
from hookgraph.hooks.handles import Handle, installed
from hookgraph.hooks.positions import Place
from hookgraph.hooks.taps import Tap, Taps
from hookgraph.ontology.locations import MAIN_STACK, Location
from hookgraph.ontology.transformer import FINAL_LN_OUT, LOGITS, RESID_POST, STREAMS_POST
from hookgraph.ontology.weights import WeightType

_INSIDE = frozenset[Mechanism]({"interior", "own code", "experts", "product"})
"""Mechanisms that reach several tensors inside one module at once."""

_attached: set[nn.Module] = set()
"""The models that some graph holds, each by its identity. Whoever enters one takes it out again."""
_attaching = threading.Lock()


@final
class HuggingFaceBinding(AbstractBinding):
    """Reaches each location of a model by its anchor."""

    def __init__(
        self,
        model: PreTrainedModel,
        findings: Findings,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        modules = Modules(model)
        self.findings = replace(findings, closed={**miscounted(modules, findings), **findings.closed})
        self.tokenizer = tokenizer
        self.example = dict(example or {})
        self._report = ConformanceReport()
        self._modules = modules
        self._checkpointed = [m for m in modules.every() if hasattr(m, "gradient_checkpointing")]
        self._embedding = embedding_of(model)
        self._identity = identity(model)
        self._accepted = Accepted.by(model, self.example)
        self._locations = tuple(sorted(findings.anchors, key=lambda x: x.order))
        self._place = {x: i for i, x in enumerate(self._locations)}
        self._state = PassState()
        self._attending = attending(findings)
        self._last_mlp = last_mlp(findings)
        self._behind = modules_behind(self._modules, findings)
        self._unseen = False
        """Whether nobody looks at what the last MLP is given or returns, in the passes to come."""

    @property
    def locations(self) -> tuple[Location, ...]:
        """Every location of the model, in causal order."""
        return self._locations

    @property
    def report(self) -> ConformanceReport:
        """What was proven when the model was bound."""
        return self._report

    def proven(self, findings: Findings, report: ConformanceReport) -> "HuggingFaceBinding":
        """A binding of the same model to what is left of the findings after a proof."""
        binding = HuggingFaceBinding(self.model, findings, self.tokenizer, example=self.example)
        binding._report = report
        return binding

    def __repr__(self) -> str:
        layers = ", ".join(f"{len(x)} layers of its {stack}" for stack, x in self.findings.layers.items())
        return (
            f"HuggingFaceBinding of {type(self.model).__name__}: {layers}, {len(self._locations)} locations"
        )

    def layers(self, stack: str) -> int:
        """How many layers a stack has."""
        return len(self.findings.layers.get(stack, ()))

    def why_absent(self, location: Location) -> str:
        """The reason found when the model was bound, or the nearest names."""
        reason = self.findings.reasons.get(location)
        if reason is not None:
            return reason
        layers = self.layers(location.type.stack)
        if location.layer is not None and location.layer >= layers > 0:
            return f"its {location.type.stack} has {layers} layers, 0 to {layers - 1}"
        missing = self.findings.missing(location.type, self._accepted.unfed(self.example))
        near = nearest(str(location), map(str, self._locations))
        return f"{missing}; {near}" if missing else near

    def prepare(self, inputs: Inputs, *, copies: int = 1) -> Prepared:
        """Inputs as keyword arguments of the model, on its device."""
        return prepare(
            inputs,
            tokenizer=self.tokenizer,
            accepted=self._accepted,
            vocabulary=vocabulary_size(self.model, self._embedding),
            device=self._device,
            copies=copies,
        )

    def token_texts(self, tokens: Sequence[int]) -> Mapping[int, str]:
        """Tokens as text; none without a tokenizer."""
        tokenizer = self.tokenizer
        return {} if tokenizer is None else {token: str(tokenizer.decode([token])) for token in tokens}

    def forward(self, inputs: Prepared) -> Float[Tensor, "batch ..."]:
        """One forward pass of the model: its logits; without a head, its last hidden state."""
        past = self._past(inputs)
        with nullcontext() if past is None else sharing(self._modules, self._attending, past, self._state):
            return read_output(self.model(**recalled(inputs, past)))

    def _past(self, inputs: Prepared) -> SharedPast | None:
        """What gives copies of a batch their past, where it is proven that they may share it."""
        copies = 1 if torch.is_grad_enabled() else several(inputs, len(self._attending))
        proven = copies > 1 and all(self._report.proves(x.location, SHARED) for x in self._attending)
        return SharedPast(copies) if proven else None

    def remember(self, inputs: Prepared, length: int) -> Prepared | None:
        """Inputs for the positions from `length` on, with the cache that the model makes of those before."""
        return None if self._memory is None else self._memory.remember(inputs, length)

    def retaining(self, inputs: Prepared, rows: int | None = None) -> Prepared | None:
        """Inputs whose pass fills a cache. Only where it is proven that a pass with a cache gives the same,
        which says that later positions leave earlier ones alone.
        """
        ends = [x for x in self._locations if x.type in (RESID_POST, STREAMS_POST)]
        proven = all(self._report.proves(x, "cached") for x in ends)
        return self._memory.retaining(inputs, rows) if self._memory and ends and proven else None

    @cached_property
    def _memory(self) -> Memory | None:
        """What remembers first positions, if the model may take a cache of what its layers have seen."""
        layers = self.findings.layers.get(MAIN_STACK)
        known = (
            layers
            and "past_key_values" in self._accepted.names
            and not self.findings.why_closed(MAIN_STACK, 0)
        )
        return Memory(self.model, self._modules[layers[-1].module]) if layers and known else None

    @contextmanager
    def attached(self, taps: Taps, start: Start | None = None) -> Generator[None]:
        """Within this context every forward pass of the model calls the taps."""
        with _attaching:
            if self.model in _attached:
                raise AlreadyAttachedError(
                    f"this {type(self.model).__name__} is attached already: leave the other `with` first, or "
                    "put all hooks into one graph"
                )
            _attached.add(self.model)
        try:
            self._modules.check_kernels()
            self._unseen = self._is_unseen(taps)  # before there are hooks of our own
            with (
                as_written(self._modules.every()),
                skipping(self._modules, self.findings, start),
                installed(*self._installers(taps, start)),
            ):
                yield
        finally:
            _attached.discard(self.model)

    def _installers(self, taps: Taps, start: Start | None) -> list[Callable[[], Handle]]:
        """What to install, the last location first: each new hook goes before those on its module."""
        # What runs again in a backward pass belongs to the pass before.
        looks = torch.is_grad_enabled()
        packed = any(x.type.stack in self.findings.packed for x in taps if x.site is None)
        self._state = PassState(packed=packed, batch=self._state.last_batch, looks=looks)
        installers = [*self._keeping_apart()]
        if looks and start is not None:
            layers = self.findings.layers[start.stack]
            entered = layers[min(start.block, len(layers) - 1)]
            installers.append(self._noticing(entered.module))
        state = self._state
        state.counts = any(self.findings.anchors[x].calls > 1 for x in taps if x.site is None)
        state.watches = any(self.findings.anchors[x].mechanism == "own code" for x in taps if x.site is None)
        interiors: dict[tuple[Mechanism, str], dict[int, dict[Role, Tap]]] = {}
        reached: dict[tuple[Mechanism, str], dict[Role, Anchor]] = {}
        native = sorted((k for k in taps if k.site is None), key=self._place.__getitem__, reverse=True)
        for location in native:
            tap = taps[location]
            anchor = self.findings.anchors[location]
            if anchor.mechanism in _INSIDE:
                place = (anchor.mechanism, anchor.module)
                interiors.setdefault(place, {}).setdefault(anchor.call, {})[anchor.role] = tap
                reached.setdefault(place, {})[anchor.role] = anchor
            else:
                installers.append(self._installer(anchor, tap, state))
        for (kind, path), inside in interiors.items():
            if looks:
                edited = any(tap.edits for taps in inside.values() for tap in taps.values())
                several = any(anchor.calls > 1 for anchor in reached[kind, path].values())
                installers.append(self._noticing(path, shared=edited and several))
            installers.append(self._interior(kind, path, inside, reached[kind, path], state))
        if packed or any(needs_state(self.findings.anchors[location]) for location in native):
            installers.append(lambda: self.model.register_forward_hook(state.leave, always_call=True))
            installers.append(
                lambda: self.model.register_forward_pre_hook(state.enter, with_kwargs=True, prepend=True)
            )
        if start is not None and not start.block:
            layer = self.findings.layers[start.stack][0]
            installers.append(partial(enter_first, self._modules[layer.module], layer, start.value))
        return installers

    def _keeping_apart(self) -> Iterator[Callable[[], Handle]]:
        """With gradients: no module keeps a tensor that the model changes before the backward pass."""
        for path, slots in self.findings.overtaken.items() if torch.is_grad_enabled() else ():
            if path in self._modules:
                yield partial(give_copies, self._modules[path], slots)

    def _noticing(self, path: str, *, shared: bool = False) -> Callable[[], Handle]:
        """See whether a module is one that a backward pass runs again."""
        hook = partial(notice_recomputing, self._state, path if shared else "")
        return lambda: self._modules[path].register_forward_pre_hook(hook)

    def _installer(self, anchor: Anchor, tap: Tap, state: PassState) -> Callable[[], Handle]:
        return lambda: install(self._modules[anchor.module], anchor, tap, state)

    def _interior(
        self,
        kind: Mechanism,
        path: str,
        taps: TapsByCall,
        anchors: Mapping[Role, Anchor],
        state: PassState,
    ) -> Callable[[], Handle]:
        module = self._modules[path]
        if kind == "interior":
            return lambda: Interior(module, taps, anchors, state)
        if kind == "own code":
            return lambda: OwnCode(module, taps, anchors, state)
        own = {"experts": ExpertsInterior, "product": OwnProduct}[kind]
        return lambda: own(module, taps, state)

    def why_closed(self, stack: str, block: int, after: Location | None = None) -> str:
        """Why no pass can begin before a layer of a stack: what was found, or seen in the proof."""
        return why_closed(self._modules, self.findings, stack, block, after)

    @contextmanager
    def reading(self, reads: Reads, tokens: Int[Tensor, "..."] | None = None) -> Generator[bool]:
        """Within this context the unembedding sees these positions only, if one module is known to be it."""
        anchor = self.findings.anchors.get(FINAL_LN_OUT)
        if anchor is None or anchor.mechanism != "input" or anchor.calls > 1 or LOGITS not in self._place:
            yield False
            return
        with reading(self._modules[anchor.module], anchor, reads, tokens), self._narrowing(reads):
            yield True

    def _narrowing(self, reads: Reads) -> AbstractContextManager[None]:
        """Within this context the last MLP is computed at these positions, if nobody looks at the others."""
        place = self._last_mlp
        if place is None or not self._unseen or not is_one_each(reads):
            return nullcontext()
        if not all(self._report.proves(x, NARROWED) for x in (place, FINAL_LN_OUT)):
            return nullcontext()
        anchor = self.findings.anchors[place]
        module = self._modules[anchor.module]
        return nullcontext() if module.training else narrowing(module, anchor, reads)

    def _is_unseen(self, taps: Taps) -> bool:
        """Whether neither taps nor hooks of others see what the last MLP is given or returns."""
        place = self._last_mlp
        if place is None or any(map(is_hooked, self._behind)):
            return False
        return all(self._place[x] < self._place[place] for x in taps if x.site is None)

    @property
    def recomputes(self) -> bool:
        """Whether some layer is checkpointed, as transformers does while a model trains, or was seen to be in
        the last pass.
        """
        return self._state.recomputed or any(
            m.training and getattr(m, "gradient_checkpointing", False) for m in self._checkpointed
        )

    def draws(self, inputs: Prepared) -> str:
        """What is drawn, if the model trains or was seen to draw when it was proven: then it takes a pass."""
        drawing = self.model.training or bool(self._report.metadata.get("draws"))
        return drawn_by(self.model, lambda: self.forward(inputs), self._device) if drawing else ""

    def place(self, inputs: Prepared) -> Place | None:
        """Where one pass over these inputs lies in its sequences, if there is padding or a past."""
        spans = spans_of(inputs)
        plain = all(not span.past and not any(span.padding) and not span.ends for span in spans.values())
        return None if plain else Place(spans, alone=True)

    def following(self, place: Place) -> AbstractContextManager[None]:
        """Within this context `place` is brought up to date when a pass of the model begins."""
        return installed(lambda: Following(self.model, place))

    def generate(self, inputs: Prepared, options: Mapping[str, object]) -> Int[Tensor, "batch pos"]:
        """The sequences that the model's own `generate()` returns; it uses a cache unless told not to."""
        if not self.model.can_generate():
            raise InputError(f"{type(self.model).__name__} does not generate: use run")
        model: Any = self.model
        given = {k: v for k, v in recalled(inputs, lasting=True).items() if k != "use_cache"}
        self._state.begin(given)
        output = model.generate(**{**given, **options})
        return output if isinstance(output, Tensor) else output.sequences

    @contextmanager
    def frozen(self) -> Generator[None]:
        """Within this context no parameter asks for a gradient: none is computed that nobody reads."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def weight(
        self, kind: WeightType, layer: int | None = None, stack: str = MAIN_STACK
    ) -> Float[Tensor, "..."]:
        """A weight, or a bias, in the normal form that `WeightType` states.

        Raises:
            UnknownLocationError: the model has no such weight, or stores it in no single projection.
        """
        bias = kind.value.startswith("b_")
        name = f"W_{kind.value[2:]}"
        source = self.findings.weights.get((stack, name, layer))
        if source is None:
            kept = [(n, i) for s, n, i in self.findings.weights if s == stack]
            known = {f"{n}[{i}]" if i is not None else n for n, i in kept}
            wanted = name if layer is None else f"{name}[{layer}]"
            raise UnknownLocationError(f"this model has no weight {wanted}: {nearest(wanted, known)}")
        with torch.no_grad():
            return normal_form(self._modules[source.module], source, bias=bias).detach()

    @property
    def _device(self) -> torch.device:
        """Where inputs go: where the model is now, or where its weights are brought."""
        device = self._parameter.device
        return device_of(self.model) if device.type == "meta" else device

    @property
    def _parameter(self) -> Tensor:
        """The first parameter, which tells device and dtype.

        `model.device` and `model.dtype` find it too, but through a generator for each level of the model:
        in a small one that is a hundredth of a pass.
        """
        return next(
            p
            for m in self._modules.every()
            for p in m._parameters.values()
            if p is not None and p.is_floating_point()
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """Name, revision, class and dtype of the model."""
        return {**self._identity, "dtype": str(self._parameter.dtype).removeprefix("torch.")}

    @property
    def fingerprint(self) -> str:
        """A short name of the configuration, and of some entries of every weight as they are now."""
        return fingerprint(self.model)
