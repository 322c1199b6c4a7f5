"""`Generation`: what the model generated, and what each of its passes saved."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast, final

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from hookgraph.errors import HookGraphError, MetricError, ShapeMismatchError, UnknownLocationError, nearest
from hookgraph.graph import storage
from hookgraph.graph.reaching import check_reached
from hookgraph.graph.run import Run
from hookgraph.hooks.editing import shares_memory
from hookgraph.hooks.masking import masked_score
from hookgraph.hooks.positions import Place, Span, read_at, read_by_row
from hookgraph.hooks.taps import Observer
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import MAIN_STACK, Location
from hookgraph.ontology.passes import PassType


@final
@dataclass(frozen=True, eq=False, repr=False)
class Generation:
    """What the model generated: `generation.tokens`, and what was saved, by location.

    `generation.steps[2][location]` is what the third pass saved. `generation[location]` joins the passes:
    along `pos` where the value has that axis, so that it is what one pass over the tokens would save;
    otherwise along a new first axis, one entry for each pass that saved something.

    Args:
        tokens: the sequences, as the model's `generate()` returned them.
        steps: what each pass saved; the first is the prefill.
        spans: which columns of the sequences each pass held.
        asked: the locations to save, in order.
    """

    tokens: Int[Tensor, "batch pos"]
    steps: tuple[Run, ...]
    spans: tuple[Span, ...]
    asked: tuple[Location, ...]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def __getitem__(self, location: Location) -> Shaped[Tensor, "..."]:
        """The saved values of all passes.

        Raises:
            UnknownLocationError: nothing was saved there; near names are given.
            ShapeMismatchError: keys have left a sliding window, so that passes have no keys in common.
        """
        found = [
            (run[location], span) for run, span in zip(self.steps, self.spans, strict=True) if location in run
        ]
        if not found:
            near = nearest(str(location), map(str, self))
            raise UnknownLocationError(f"nothing was saved at {location} in this generation: {near}")
        values = _keys_aligned(location, found)
        position = dict(location.index).get(Dimension.POS)
        repeated = all(span.past == 0 for _, span in found)  # without a cache the last pass holds everything
        if Dimension.POS in location.dims:
            return values[-1] if repeated else torch.cat(values, dim=location.dims.index(Dimension.POS))
        if isinstance(position, int) and position >= 0:
            return values[-1]
        return torch.stack(values)

    def __iter__(self) -> Iterator[Location]:
        """The locations at which some pass saved something, in the order of asking."""
        return (location for location in self.asked if any(location in run for run in self.steps))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        shape = tuple(self.tokens.shape)
        lines = [f"Generation of tokens {shape} in {len(self.steps)} passes, {len(self)} locations saved"]
        lines += [
            f"  {location}: in {sum(location in run for run in self.steps)} passes" for location in self
        ]
        return "\n".join(lines)

    def to(self, target: torch.device | str | torch.dtype) -> "Generation":
        """The same on another device, or with saves of another dtype."""
        tokens = self.tokens if isinstance(target, torch.dtype) else self.tokens.to(target)
        return replace(self, tokens=tokens, steps=tuple(run.to(target) for run in self.steps))

    def save(self, path: str | Path) -> None:
        """Write tokens and saves to a safetensors file."""
        tensors = {f"{i}/{k}": v for i, run in enumerate(self.steps) for k, v in run.items()}
        header = {
            "order": [[str(k) for k in run] for run in self.steps],
            "asked": [str(k) for k in self.asked],
            "spans": [(span.past, span.length, span.padding) for span in self.spans],
            "metadata": dict(self.metadata),
        }
        storage.write(path, "generation", {**tensors, "tokens": self.tokens}, header)

    @staticmethod
    def load(path: str | Path) -> "Generation":
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, not a saved generation, or one of locations that are not declared.
        """
        tensors, header = storage.read(path, "generation")
        about = cast("Mapping[str, str]", header["metadata"])
        steps: list[Run] = []
        for i, names in enumerate(cast("list[list[str]]", header["order"])):
            saved = {storage.parse(path, name): tensors[f"{i}/{name}"] for name in names}
            steps.append(Run(saved, metadata=about))
        numbers = cast("list[tuple[int, int, list[int]]]", header["spans"])
        spans = tuple(Span(past, length, tuple(padding)) for past, length, padding in numbers)
        asked = tuple(storage.parse(path, name) for name in cast("list[str]", header["asked"]))
        return Generation(tensors["tokens"], tuple(steps), spans, asked, about)


@final
@dataclass(slots=True)
class _Step:
    """What is noted of one pass."""

    span: Span = Span()  # noqa: RUF009 (frozen)
    saved: dict[Location, Tensor] = field(default_factory=dict[Location, Tensor])
    seen: set[Location] = field(default_factory=set[Location])


@final
class StepRecorder:
    """Keeps what the passes of a generation are to save.

    Args:
        asked: the locations to save, parts among them.
        place: where the present pass lies.
        hooked: the whole locations that some pass has to reach, with the parts that hooks get.

    Raises:
        MetricError: a gradient is asked for.
    """

    def __init__(
        self,
        asked: Sequence[Location],
        place: Place,
        hooked: Mapping[Location, tuple[Location, ...]] | None = None,
    ) -> None:
        self._hooked = hooked or {}
        self._unreached = set(self._hooked)
        self._wholes: dict[Location, list[Location]] = {}
        self._asked = tuple(dict.fromkeys(asked))
        self._place = place
        self._steps: list[_Step] = []
        self._waiting: dict[Location, tuple[Tensor, Tensor]] = {}
        """Single positions that rows reach in different passes: values so far, and whether a row has one."""
        for location in self._asked:
            if location.pass_type is PassType.BACKWARD:
                raise MetricError(f"{location} is the gradient of a metric: a generation has none, use run")
            self._wholes.setdefault(location.whole, []).append(location)

    def observers(self) -> Mapping[Location, Observer]:
        """What is to see the value at each whole location."""
        hooked = {w: Observer(partial(self._reach, w), parts) for w, parts in self._hooked.items()}
        return {**hooked, **{whole: Observer(partial(self._see, whole)) for whole in self._wholes}}

    def holds(self, value: Shaped[Tensor, "..."]) -> bool:
        """Whether something that the present pass saved lies in the memory of a tensor."""
        return shares_memory(value, self._step().saved.values())

    def _reach(self, whole: Location, value: Tensor, given: Location | None) -> None:
        self._unreached.discard(whole)

    def _see(self, whole: Location, value: Tensor, given: Location | None) -> None:
        self._unreached.discard(whole)
        step = self._step()
        if whole in step.seen:
            raise HookGraphError(f"{whole} fired twice in one pass; please report this model")
        step.seen.add(whole)
        for part in self._wholes[whole]:
            found = self._read(part, value)
            if found is not None:
                step.saved[part] = found.clone() if part.index else found.detach()

    def _read(self, part: Location, value: Tensor) -> Tensor | None:
        """What the pass holds of a part; of a single position once every row has reached it."""
        single = isinstance(dict(part.index).get(Dimension.POS), int)
        if not single or dict(part.index).get(Dimension.BATCH) is not None:
            return read_at(part, value, self._place)
        found = read_by_row(part, value, self._place)
        if found is None:
            return None
        new, held = found
        if part in self._waiting:
            before, had = self._waiting.pop(part)
            kept = had.view(-1, *[1] * (new.ndim - 1))
            new, held = torch.where(kept, before, new), held | had
        if bool(held.all()):
            return new
        self._waiting[part] = new.clone(), held
        return None

    def _step(self) -> "_Step":
        """The notes of the present pass."""
        while len(self._steps) <= self._place.step:
            self._steps.append(_Step())
        step = self._steps[self._place.step]
        step.span = self._place.spans.get(MAIN_STACK, Span())
        return step

    def generation(self, tokens: Int[Tensor, "batch pos"], about: Mapping[str, str]) -> Generation:
        """Everything kept, with the tokens that came of it.

        Raises:
            HookGraphError: no pass reached a hook.
        """
        check_reached(self._unreached, "any pass of this generation")
        self._step()
        runs = [
            Run({k: step.saved[k] for k in self._asked if k in step.saved}, metadata=about)
            for step in self._steps
        ]
        spans = tuple(step.span for step in self._steps)
        return Generation(tokens, tuple(runs), spans, self._asked, about)


def _keys_aligned(location: Location, found: Sequence[tuple[Tensor, Span]]) -> list[Tensor]:
    """The values with as many keys in each pass: later keys, which a pass does not hold yet, are masked."""
    values = [value for value, _ in found]
    if Dimension.KEY_POS not in location.dims or dict(location.index).get(Dimension.KEY_POS) is not None:
        return values
    axis = location.dims.index(Dimension.KEY_POS)
    widest = max(value.shape[axis] for value in values)
    if all(value.shape[axis] == widest for value in values):
        return values
    if any(value.shape[axis] < span.past + span.length for value, span in found):
        raise ShapeMismatchError(
            f"{location}: keys have left a sliding window, so that passes do not hold the same ones: read "
            "generation.steps"
        )
    scores = location.type.name.endswith("scores")
    blank = masked_score(values[0].dtype) if scores else 0.0
    padded: list[Tensor] = []
    for value in values:
        shape = list(value.shape)
        shape[axis] = widest - shape[axis]
        padded.append(torch.cat((value, value.new_full(shape, blank)), axis))
    return padded
