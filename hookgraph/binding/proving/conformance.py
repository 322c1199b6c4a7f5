"""Prove a binding: check on values, and on edited values, what must hold of every location.

All locations are checked in a few batched passes: row i of the batch edits location i, so that one
pass carries out one edit per location, and an identity evaluated on the batch is evaluated under
every edit.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.binding.proving.circumstances import Subject, check_circumstances
from hookgraph.binding.proving.comparison import check_comparison
from hookgraph.binding.proving.draws import HeldDraws
from hookgraph.binding.proving.edits import inside_kernel, live, replace_rows, rows_of, unmasked
from hookgraph.binding.proving.equations import Identity, Unapplied
from hookgraph.binding.proving.identities import identities, watching
from hookgraph.binding.proving.mixtures import mixture_identities, rerouted
from hookgraph.binding.proving.narrowed import check_narrowed
from hookgraph.binding.proving.precision import rounding, tolerated
from hookgraph.binding.proving.replays import check_replays
from hookgraph.binding.proving.screening import check_screened
from hookgraph.binding.proving.shared import check_shared
from hookgraph.binding.proving.slopes import Slopes, check_gradients
from hookgraph.binding.proving.state import model_state
from hookgraph.binding.running.huggingface import HuggingFaceBinding
from hookgraph.graph.conformance import ConformanceReport, Gap, Proof
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import TRANSFORMER_STACKS

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Of identities, by dtype. Coarser dtypes are checked like single precision."""

DRAWN = ", with its {} random draws a pass held still"
"""What is told of a model that draws random numbers in evaluation."""

_KEYS_OF: Final = {types.q: types.k for s in TRANSFORMER_STACKS for types in (s.attention, s.cross_attention)}
"""Which keys queries are multiplied with."""

Values = Mapping[Location, Float[Tensor, "..."]]
_Shared: TypeAlias = tuple[object, ...]
"""Which axes have one size: the stack, what else is shared, the dimension."""


def check(
    binding: HuggingFaceBinding,
    example: Mapping[str, Any],
    chosen: Sequence[Location] | None = None,
    single: Callable[[], Subject] | None = None,
) -> ConformanceReport:
    """Check every invariant of the chosen locations (by default all) on one example.

    Args:
        binding: the binding to prove; its model is left as it was.
        example: keyword arguments of the model, a batch of one.
        chosen: locations to check.
        single: makes the same in single precision, for what the model itself cannot do in double.
    """
    graph = HookGraph(binding)
    with HeldDraws() as draws:
        graph.run(example)
    if not draws.count:
        return _check(graph, binding, example, chosen, single)
    with HeldDraws():
        report = _check(graph, binding, example, chosen, single)
    told = f"{report.metadata['proven on']}{DRAWN.format(draws.count)}"
    return replace(report, metadata={**report.metadata, "proven on": told, "draws": str(draws.count)})


def _check(
    graph: HookGraph,
    binding: HuggingFaceBinding,
    example: Mapping[str, Any],
    chosen: Sequence[Location] | None,
    single: Callable[[], Subject] | None,
) -> ConformanceReport:
    locations = tuple(binding.locations if chosen is None else chosen)
    before = model_state(binding.model)
    graph.run(example)
    own = before.difference(model_state(binding.model))  # what a plain pass of this model changes by itself
    proofs: list[Proof] = []
    clean, firing = _check_firing(graph, example, locations)
    proofs += firing
    locations = tuple(x for x in locations if x in clean)
    shapes = _check_shapes(graph, example, clean, binding.findings.stage)
    proofs += shapes
    fitting = tuple(p.location for p in shapes if p.holds)
    if fitting != locations:
        locations, clean = fitting, graph.run(example, save=fitting)
    unapplied, slopes = list[Gap](), Slopes([], [])
    if locations:
        proofs += _check_transparent(graph, example, locations)
        conserved, unapplied = _check_conserved(binding, graph, example, clean)
        proofs += conserved
        slopes = check_gradients(graph, example, clean)
        proofs += slopes.proofs
    replays = check_replays(graph, example, clean, locations)
    narrow, wide = check_narrowed(binding, example, locations)
    alike, apart = check_shared(binding, example, locations)
    proofs += [*replays.proofs, *narrow, *alike]
    changed = before.difference(model_state(binding.model))
    note = "" if changed == own else changed
    proofs += [Proof(x, "removed", not note, float(bool(note)), 0.0, note) for x in locations]
    other = check_circumstances(Subject(binding, example), locations, single)
    proofs += other.proofs
    return ConformanceReport(
        tuple(proofs),
        {k: str(a) for k, a in sorted(binding.findings.anchors.items(), key=lambda p: p[0].order)},
        dict(sorted(binding.findings.reasons.items(), key=lambda p: p[0].order)),
        {**binding.metadata, "proven on": f"the model itself, in {binding.metadata['dtype']}"},
        gaps=(
            *other.gaps,
            *replays.gaps,
            *wide,
            *apart,
            *unapplied,
            *slopes.gaps,
            *_unequal((*proofs, *unapplied), clean),
        ),
    )


def _unequal(proofs: Sequence[Proof | Gap], clean: Run) -> list[Gap]:
    """The locations that no equation is about, and those that have no gradient."""
    equal = {p.location for p in proofs if p.invariant == "conserved"}
    gaps = [Gap(x, "conserved", "no equation is known that it stands in") for x in clean if x not in equal]
    integers = [x for x in clean if not clean[x].is_floating_point()]
    return gaps + [Gap(x, "edit = gradient", "integers have no gradient") for x in integers]


def _check_firing(
    graph: HookGraph, example: Mapping[str, Any], locations: Sequence[Location]
) -> tuple[Run, list[Proof]]:
    """Save everything at once; where that fails, find out which location did not fire exactly once."""
    try:
        run = graph.run(example, save=locations, metric=_sum)
        return run, [Proof(x, "fires once", True, 0.0, 0.0) for x in locations]
    except Exception:
        proofs: list[Proof] = []
        for location in locations:
            try:
                graph.run(example, save=[location], metric=_sum)  # with a metric the pass runs to its end
                proofs.append(Proof(location, "fires once", True, 0.0, 0.0))
            except Exception as error:
                note = f"{type(error).__name__}: {error}"
                proofs.append(Proof(location, "fires once", False, 1.0, 0.0, note))
        fine = [p.location for p in proofs if p.holds]
        return graph.run(example, save=fine), proofs


def _sum(logits: Tensor) -> Tensor:
    return logits.flatten(1).sum(1)


def _check_shapes(
    graph: HookGraph, example: Mapping[str, Any], clean: Run, stage: Callable[[Location], int]
) -> list[Proof]:
    """As many axes as dimensions, the batch first, and one size per dimension as far as it is shared."""
    proofs: list[Proof] = []
    wrong = _unbatched(graph, rows_of(graph, example, 2), list(clean))
    seen: dict[_Shared, Counter[int]] = {}
    for location, value in clean.items():
        for key, size in _shared_sizes(location, value, stage):
            seen.setdefault(key, Counter())[size] += 1
    wrong.update(_unpaired(clean))
    usual = {key: sizes.most_common(1)[0][0] for key, sizes in seen.items()}
    for location, value in clean.items():
        note = _shape_note(location, value, usual, stage) or wrong.get(location, "")
        proofs.append(Proof(location, "shape", not note, float(bool(note)), 0.0, note))
    return proofs


def _unpaired(clean: Values) -> dict[Location, str]:
    """Queries and keys of one attention that cannot be multiplied, with their widths."""
    found: dict[Location, str] = {}
    for location, queries in clean.items():
        kind = _KEYS_OF.get(location.type)
        place = None if kind is None else Location(kind, location.layer)
        if place is not None and place in clean and clean[place].shape[-1] != queries.shape[-1]:
            note = f"queries have width {queries.shape[-1]}, keys {clean[place].shape[-1]}"
            found |= {location: note, place: note}
    return found


def _unbatched(
    graph: HookGraph, two: Mapping[str, Any], locations: Sequence[Location]
) -> dict[Location, str]:
    """The locations that have no row for each of two examples, with what they have instead."""
    try:
        run = graph.run(two, save=locations, metric=_sum)
    except Exception as error:
        if len(locations) == 1:
            return {locations[0]: f"two examples cannot be read: {type(error).__name__}: {error}"}
        half = len(locations) // 2
        parts = (locations[:half], locations[half:])
        return {k: v for part in parts if part for k, v in _unbatched(graph, two, part).items()}
    sizes = {x: value.shape[0] for x, value in run.items()}
    return {x: f"the first axis has size {n}, but there are two examples" for x, n in sizes.items() if n != 2}


def _shape_note(
    location: Location, value: Tensor, usual: Mapping[_Shared, int], stage: Callable[[Location], int]
) -> str:
    """What is wrong with a shape, given the sizes that most locations agree on."""
    dims = location.type.dims
    if value.ndim != len(dims):
        return f"{value.ndim} axes, of sizes {' '.join(map(str, value.shape))}, for {' '.join(dims)}"
    if value.shape[0] != 1:
        return f"the first axis has size {value.shape[0]}, but there is one example"
    for key, size in _shared_sizes(location, value, stage):
        if usual[key] != size:
            return f"{key[-1]} has size {size} here, {usual[key]} elsewhere"
    return ""


_OWN: Final = (Dimension.BATCH, Dimension.D_HEAD, Dimension.POS, Dimension.KEY_POS)
"""Axes whose sizes are not put to the vote: known, as that of the batch, or each location's own."""


def _shared_sizes(
    location: Location, value: Tensor, stage: Callable[[Location], int]
) -> Iterator[tuple[_Shared, int]]:
    """The sizes of axes that other locations have too, with what tells which these are."""
    dims = location.type.dims
    for dim, size in zip(dims, value.shape, strict=True) if value.ndim == len(dims) else ():
        if dim in _OWN:
            continue
        group: tuple[object, ...] = ()
        if dim in (Dimension.HEAD, Dimension.KV_HEAD, Dimension.D_MLP, Dimension.D_MIXER):
            # Latent and shared heads are made into others after the projection.
            before = location.type.name.endswith("_pre")
            alone = before or location.type.name.startswith(("moe.", "mixer."))
            group = (location,) if alone else (location.type.name.split(".")[0], location.layer)
        elif dim in (Dimension.EXPERT, Dimension.CHOICE):
            group = (location.layer,)
        elif dim is Dimension.D_MODEL:
            group = (stage(location),)
        yield (location.type.stack, *group, dim), size


def _check_transparent(
    graph: HookGraph, example: Mapping[str, Any], locations: Sequence[Location]
) -> list[Proof]:
    """Identity hooks everywhere leave the logits as they are: bit for bit unless the inside of a fused
    kernel is looked at.
    """
    plain = graph.run(example).logits
    proofs: list[Proof] = []
    outside = [x for x in locations if not inside_kernel(x)]
    inside = [x for x in locations if inside_kernel(x)]
    for group, tolerance in ((outside, 0.0), (inside, max(1e-5, rounding(plain.dtype)))):
        error = _change(graph, example, group, plain)
        if error <= tolerance:
            proofs += [Proof(x, "transparent", True, error, tolerance) for x in group]
            continue
        for location in group:
            error = _change(graph, example, [location], plain)
            proofs.append(Proof(location, "transparent", error <= tolerance, error, tolerance))
    return proofs


def _change(
    graph: HookGraph, example: Mapping[str, Any], locations: Sequence[Location], plain: Tensor
) -> float:
    """By how much identity hooks change the logits, relative to their size."""
    for location in locations:
        graph = graph.hook(location, lambda x: x.clone())
    gap = (unmasked(graph.run(example).logits) - unmasked(plain)).abs().max()
    return float(gap / unmasked(plain).abs().max().clamp_min(1e-9))


def _check_conserved(
    binding: HuggingFaceBinding, graph: HookGraph, example: Mapping[str, Any], clean: Run
) -> tuple[list[Proof], list[Gap]]:
    """The algebra of each location, with every other location edited in a row of its own; and equations
    that are not claimed.
    """
    locations = list(clean)
    generator = torch.Generator().manual_seed(1)
    hooked = graph
    for row, location in enumerate(locations):
        moved = _moved(location, clean[location], generator)
        hooked = hooked.hook(location, replace_rows(row, moved))
    with watching(binding) as plain:
        graph.run(example)
    with watching(binding) as seen, torch.no_grad():
        edited = hooked.run(rows_of(graph, example, len(locations)), save=locations, metric=_sum)
    tolerance = tolerated(clean.logits.dtype, _TOLERANCE)
    proofs, gaps = list[Proof](), list[Gap]()
    row_of = {location: row for row, location in enumerate(locations)}
    algebra = (*identities(binding, clean, plain, seen), *mixture_identities(binding, clean, seen))
    for identity in algebra:
        if isinstance(identity, Unapplied):
            gaps += [Gap(x, "conserved", f"{identity.text}: {identity.why}") for x in identity.about]
            continue
        errors = _errors(identity, edited)
        for location in identity.about:
            error = errors[row_of[location]]
            proofs.append(Proof(location, "conserved", error <= tolerance, error, tolerance, identity.text))
        for location in identity.also:
            error = _errors(identity, clean)[0]
            proofs.append(Proof(location, "conserved", error <= tolerance, error, tolerance, identity.text))
    proofs += check_screened(binding, graph, example, clean, tolerance)
    return proofs + check_comparison(graph, example, clean, tolerance), gaps


@torch.no_grad()
def _errors(identity: Identity, values: Values) -> list[float]:
    """By how much the sides of an equation differ in each row, relative to their size."""
    expected, got = identity.sides(values)
    size = got.flatten(1).norm(dim=1).clamp_min(1e-6)
    return ((expected - got).flatten(1).norm(dim=1) / size).tolist()


def _moved(location: Location, value: Tensor, generator: torch.Generator) -> Tensor:
    """A value of similar size that is not the clean one; still positive where the clean one is."""
    if not value.is_floating_point():
        return rerouted(value)
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value)
    return torch.where(live(location, value), value * (0.5 + noise), value)
