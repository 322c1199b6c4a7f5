"""Prove a binding: check on values, and on edited values, what must hold of every location.

All locations are checked in a few batched passes: row i of the batch edits location i, so that one
pass carries out one edit per location, and an identity evaluated on the batch is evaluated under
every edit.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hookgraph.binding.huggingface import HuggingFaceBinding
from hookgraph.binding.identities import identities
from hookgraph.binding.state import model_state
from hookgraph.errors import HookGraphError
from hookgraph.graph.conformance import ConformanceReport, Proof
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

_STEPS = (1e-5, 1e-3, 1e-2, 3e-2)
"""Sizes of the finite differences, relative to the value: small ones for models that compute in double
precision throughout, larger ones for those that go through single precision inside."""

_TOLERANCE = {torch.float64: (1e-6, 2e-3), torch.float32: (1e-4, 5e-2)}
"""By dtype: of identities, and of finite differences. Coarser dtypes are checked like single precision."""

Values = Mapping[Location, Float[Tensor, "..."]]


def check(
    binding: HuggingFaceBinding, tokens: Tensor, chosen: Sequence[Location] | None = None
) -> ConformanceReport:
    """Check every invariant of the chosen locations (by default all) on one row of token ids.

    Args:
        binding: the binding to prove; its model is left as it was.
        tokens: token ids of shape (1, pos).
        chosen: locations to check.
    """
    graph = HookGraph(binding)
    locations = tuple(binding.locations if chosen is None else chosen)
    before = model_state(binding.model)
    proofs: list[Proof] = []
    clean, firing = _check_firing(graph, tokens, locations)
    proofs += firing
    locations = tuple(x for x in locations if x in clean)
    proofs += _check_shapes(clean)
    proofs += _check_transparent(graph, tokens, locations)
    proofs += _check_conserved(graph, tokens, clean)
    proofs += _check_gradients(graph, tokens, clean)
    changed = before.difference(model_state(binding.model))
    proofs += [Proof(x, "removed", not changed, float(bool(changed)), 0.0, changed) for x in locations]
    return ConformanceReport(
        tuple(proofs),
        {k: str(a) for k, a in sorted(binding.findings.anchors.items(), key=lambda p: p[0].order)},
        dict(sorted(binding.findings.reasons.items(), key=lambda p: p[0].order)),
        binding.metadata,
    )


def _check_firing(graph: HookGraph, tokens: Tensor, locations: Sequence[Location]) -> tuple[Run, list[Proof]]:
    """Save everything at once; where that fails, find out which location did not fire exactly once."""
    try:
        return graph.run(tokens, save=locations), [Proof(x, "fires once", True, 0.0, 0.0) for x in locations]
    except (HookGraphError, RuntimeError, TypeError, KeyError, IndexError, AttributeError):
        proofs: list[Proof] = []
        for location in locations:
            try:
                graph.run(tokens, save=[location])
                proofs.append(Proof(location, "fires once", True, 0.0, 0.0))
            except Exception as error:
                note = f"{type(error).__name__}: {error}"
                proofs.append(Proof(location, "fires once", False, 1.0, 0.0, note))
        fine = [p.location for p in proofs if p.holds]
        return graph.run(tokens, save=fine), proofs


def _check_shapes(clean: Run) -> list[Proof]:
    """One size per dimension within a layer, as far as the tensors share dimensions."""
    sizes: dict[tuple[int | None, Dimension], int] = {}
    proofs: list[Proof] = []
    for location, value in clean.items():
        dims = location.type.dims
        note = "" if value.ndim == len(dims) else f"{value.ndim} axes for {' '.join(dims)}"
        per_layer = (Dimension.HEAD, Dimension.KV_HEAD, Dimension.D_MLP)
        for dim, size in zip(dims, value.shape, strict=False):
            known = sizes.setdefault((location.layer if dim in per_layer else None, dim), size)
            varies = dim in (Dimension.D_HEAD, Dimension.KEY_POS)
            if known != size and not varies:
                note = f"{dim} has size {size} here, {known} elsewhere"
        proofs.append(Proof(location, "shape", not note, float(bool(note)), 0.0, note))
    return proofs


def _check_transparent(graph: HookGraph, tokens: Tensor, locations: Sequence[Location]) -> list[Proof]:
    """Identity hooks everywhere leave the logits as they are: bit for bit unless the inside of a fused
    kernel is looked at.
    """
    plain = graph.run(tokens).logits
    outside = [x for x in locations if x.type.name not in ("attn.scores", "attn.pattern")]
    inside = [x for x in locations if x not in outside]
    proofs: list[Proof] = []
    for group, tolerance in ((outside, 0.0), (inside, 1e-5)):
        hooked = graph
        for location in group:
            hooked = hooked.hook(location, lambda x: x.clone())
        error = float((hooked.run(tokens).logits - plain).abs().max() / plain.abs().max().clamp_min(1e-9))
        proofs += [Proof(x, "transparent", error <= tolerance, error, tolerance) for x in group]
    return proofs


def _check_conserved(graph: HookGraph, tokens: Tensor, clean: Run) -> list[Proof]:
    """The algebra of each location, with every other location edited in a row of its own."""
    locations = list(clean)
    generator = torch.Generator().manual_seed(1)
    hooked = graph
    for row, location in enumerate(locations):
        moved = _moved(clean[location], generator)
        hooked = hooked.hook(location, _replace_rows({row: moved}))
    edited = hooked.run(tokens.repeat(len(locations), 1), save=locations)
    tolerance = _tolerances(clean)[0]
    proofs: list[Proof] = []
    for identity in identities(graph.binding, clean):
        expected, got = identity.sides(edited)
        size = got.flatten(1).norm(dim=1).clamp_min(1e-6)
        errors = ((expected - got).flatten(1).norm(dim=1) / size).tolist()
        for row, location in enumerate(locations):
            if location in identity.about:
                error = errors[row]
                proofs.append(
                    Proof(location, "conserved", error <= tolerance, error, tolerance, identity.text)
                )
    return proofs


def _check_gradients(graph: HookGraph, tokens: Tensor, clean: Run) -> list[Proof]:
    """Finite difference = gradient, along a direction that is half gradient, half random."""
    locations = list(clean)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(clean.logits.shape[1:], generator=generator).to(clean.logits)

    def metric(logits: Tensor) -> Tensor:
        finite = torch.where(torch.isfinite(logits), logits, 0.0)
        return (finite * weights).flatten(1).sum(1)

    gradients = graph.run(tokens, save=[x.grad for x in locations], metric=metric)
    rows_of = 2 * len(_STEPS)
    hooked = graph
    slopes: dict[Location, float] = {}
    sizes: dict[Location, float] = {}
    for number, location in enumerate(locations):
        gradient, value = gradients[location.grad], clean[location]
        direction = _direction(gradient, value, generator)
        slopes[location] = float((gradient.double() * direction.double()).sum())
        sizes[location] = float(torch.where(_live(value), value, 0).double().norm().clamp_min(1e-3))
        edits = {
            number * rows_of + 2 * i + j: value + sign * step * sizes[location] * direction
            for i, step in enumerate(_STEPS)
            for j, sign in enumerate((1.0, -1.0))
        }
        hooked = hooked.hook(location, _replace_rows(edits))
    rows = tokens.repeat(len(locations) * rows_of, 1)
    measured = metric(hooked.run(rows).logits).double().view(len(locations), len(_STEPS), 2)
    tolerance = _tolerances(clean)[1]
    proofs: list[Proof] = []
    for number, location in enumerate(locations):
        steps = torch.tensor(_STEPS, dtype=torch.float64) * sizes[location]
        found = (measured[number, :, 0] - measured[number, :, 1]).cpu() / (2 * steps)
        slope = slopes[location]
        error = float((found - slope).abs().min() / max(abs(slope), 1e-9))
        note = "" if error <= tolerance else f"finite difference {float(found[1]):.4g}, gradient {slope:.4g}"
        proofs.append(Proof(location, "edit = gradient", error <= tolerance, error, tolerance, note))
    return proofs


def _direction(gradient: Tensor, value: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    noise = torch.where(_live(value), noise, 0)
    mixed = gradient / gradient.norm().clamp_min(1e-30) + noise / noise.norm().clamp_min(1e-30)
    return (mixed / mixed.norm().clamp_min(1e-30)).to(value.dtype)


def _live(value: Tensor) -> Bool[Tensor, "..."]:
    """Cells that are not masked: masked scores stay as they are."""
    return value > torch.finfo(value.dtype).min / 2


def _moved(value: Tensor, generator: torch.Generator) -> Tensor:
    """A value of similar size that is not the clean one; still positive where the clean one is."""
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value)
    return torch.where(_live(value), value * (0.5 + noise), value)


def _replace_rows(rows: Mapping[int, Tensor]) -> Callable[[Tensor], Tensor]:
    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        for row, new in rows.items():
            value[row] = new[0]
        return value

    return edit


def _tolerances(clean: Run) -> tuple[float, float]:
    return _TOLERANCE.get(clean.logits.dtype, _TOLERANCE[torch.float32])
