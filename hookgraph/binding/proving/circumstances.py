"""Prove that a location holds the same in other circumstances: with a cache, with padding, by another kernel.

Each takes one or two passes, for all locations at once. Where the model itself, without hooks, does not
compute the same, nothing is claimed of its locations: the report gives the model's own reason.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hookgraph.binding.proving.precision import tolerated
from hookgraph.binding.proving.twins import quietly
from hookgraph.binding.running.huggingface import HuggingFaceBinding
from hookgraph.binding.running.inputs import Accepted, embedding_of, vocabulary_size
from hookgraph.binding.running.kernels import InapplicableError, other_kernel
from hookgraph.graph.conformance import Gap, Proof
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.hooks.masking import masked_cells
from hookgraph.hooks.positions import KEYS_ELSEWHERE, Span
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import MAIN_STACK, Location
from hookgraph.ontology.transformer import LOGITS

_NEW: Final = 2
"""How many tokens are generated."""

_PADDING: Final = 2
"""How many columns of padding are put on the left."""

_TOLERANCE: Final = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Other kernels sum in another order, also in single precision inside a model in double precision."""

_KNOWN: Final = frozenset({"input_ids", "attention_mask", "decoder_input_ids"})
"""What is padded, or need not be."""

_TURNED: Final = frozenset({"attn.q", "attn.k"})
"""What rotary embedding turns by the number of the position."""

_FROM_FIRST: Final = "the model takes no numbers of positions: it counts padding too, and turns heads by that"

_OWN: Final = 0.1
"""The model's own logits must agree within this part of the tolerance."""

_COLUMNS: Final = "its columns are not those of the tokens, so it is not known which would be the same"

Pair: TypeAlias = tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]
"""What is expected at a location, and what was found."""


class Subject(NamedTuple):
    """What is checked, and on which example: keyword arguments of the model, a batch of one."""

    binding: HuggingFaceBinding
    example: Mapping[str, Any]


Pairs: TypeAlias = Sequence[Pair] | str
"""Pass by pass; or why the values cannot be compared."""

Compared: TypeAlias = Callable[[Subject, Sequence[Location]], Mapping[Location, Pairs]]
"""Two ways to run the model, and what each has at these locations."""


class Verdict(NamedTuple):
    """What was proven in other circumstances, and what could not be."""

    proofs: tuple[Proof, ...]
    gaps: tuple[Gap, ...]


def check_circumstances(
    subject: Subject, locations: Sequence[Location], single: Callable[[], Subject] | None = None
) -> Verdict:
    """The proofs of every location in every circumstance that the model knows.

    Args:
        subject: the binding, and the example, a batch of one.
        locations: those to check.
        single: makes the same in single precision. It is asked for where the model, though not its
            locations, is at fault in double precision, as with masks that overflow in a softmax.
    """
    parts: list[Verdict] = []
    for name, compared in (("cached", _cached), ("padded", _padded), ("fused", _fused)):
        found = _check(name, compared, subject, locations)
        if found is None and single is not None:
            found = _check(name, compared, single(), locations)
        parts.append(found or _nothing(name, locations, _own_reason(compared, subject)))
    return Verdict(tuple(p for x in parts for p in x.proofs), tuple(g for x in parts for g in x.gaps))


def _check(name: str, compared: Compared, subject: Subject, locations: Sequence[Location]) -> Verdict | None:
    """The proofs of one circumstance; None where the model itself is not the same in it."""
    errors, notes = dict[Location, float](), dict[Location, str]()
    reasons = dict.fromkeys(locations, "it has no value in the passes compared")
    tolerance = _tolerance(subject)
    try:
        errors, untold = _errors(compared(subject, locations))
        reasons |= untold
        fine = all(e <= tolerance for e in errors.values())
    except InapplicableError as reason:
        return _nothing(name, locations, str(reason))
    except Exception:
        fine = False
    if not fine and _own_reason(compared, subject):
        return None
    if not fine and not errors:
        errors, notes = _one_by_one(compared, subject, locations)
    proofs = [Proof(x, name, e <= tolerance, e, tolerance, notes.get(x, "")) for x, e in errors.items()]
    gaps = [Gap(x, name, reasons[x]) for x in locations if x not in errors]
    return Verdict(tuple(proofs), tuple(gaps))


def _tolerance(subject: Subject) -> float:
    dtype = next(p.dtype for p in subject.binding.model.parameters() if p.is_floating_point())
    return tolerated(dtype, _TOLERANCE)


def _nothing(name: str, locations: Sequence[Location], reason: str) -> Verdict:
    return Verdict((), tuple(Gap(x, name, reason) for x in locations))


def _told(error: Exception) -> str:
    """An error in one short line."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:120]}"


def _own_reason(compared: Compared, subject: Subject) -> str:
    """Why the model itself, unhooked but for its logits, is not the same; empty if it is."""
    if LOGITS not in subject.binding.findings.anchors:
        return "there are no logits to tell whether the model itself is the same"
    try:
        errors, untold = _errors(compared(subject, [LOGITS]))
    except InapplicableError as reason:
        return str(reason)
    except Exception as error:
        return f"it cannot be run like this: {_told(error)}"
    if LOGITS in untold:
        return untold[LOGITS]
    error = errors[LOGITS]
    if error <= _OWN * _tolerance(subject):
        return ""
    if not math.isfinite(error):
        return "the model's own logits are no numbers there"
    return f"the model's own logits differ by {error:.1g} of their size"


def _one_by_one(
    compared: Compared, subject: Subject, locations: Sequence[Location]
) -> tuple[dict[Location, float], dict[Location, str]]:
    """The error of each location looked at alone, and what was raised there."""
    errors: dict[Location, float] = {}
    notes: dict[Location, str] = {}
    for location in locations:
        try:
            errors |= _errors(compared(subject, [location]))[0]
        except Exception as error:
            errors[location], notes[location] = float("inf"), _told(error)
    return errors, notes


def _errors(found: Mapping[Location, Pairs]) -> tuple[dict[Location, float], dict[Location, str]]:
    """By how much values differ at most, infinity where they are no numbers; why others are not compared."""
    errors: dict[Location, float] = {}
    for location, pairs in found.items():
        if not isinstance(pairs, str):
            differences = [_difference(location, *pair) for pair in pairs]
            errors[location] = max(x if math.isfinite(x) else math.inf for x in differences)
    return errors, {x: reason for x, reason in found.items() if isinstance(reason, str)}


@torch.no_grad()
def _difference(location: Location, expected: Tensor, found: Tensor) -> float:
    """By how much two values differ, relative to their size; what is masked in both is left out."""
    if expected.shape != found.shape:
        return float("inf")
    if not expected.is_floating_point():
        return float(not torch.equal(expected, found))
    expected, found = expected.double(), found.double()
    if location.type.name.endswith("scores"):
        expected, found = _live(expected), _live(found)
    same = expected == found  # infinities among them
    gap = torch.where(same, 0.0, expected - found).norm()
    return float(gap / torch.where(same & expected.isinf(), 0.0, expected).norm().clamp_min(1e-6))


def _live(scores: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Scores without what is masked, and without a number added to a row, which no softmax notices."""
    masked = masked_cells(scores)
    live = torch.where(masked, 0.0, scores)
    mean = live.sum(-1, keepdim=True) / (~masked).sum(-1, keepdim=True).clamp_min(1)
    return torch.where(masked, 0.0, live - mean)


# --- with a cache -----------------------------------------------------------------------------


def _cached(subject: Subject, locations: Sequence[Location]) -> dict[Location, Pairs]:
    """Generate a few tokens with a cache, then run over all of them at once."""
    binding, example = subject
    if not binding.model.can_generate():
        raise InapplicableError(f"{type(binding.model).__name__} does not generate")
    ids = "decoder_input_ids" if "decoder_input_ids" in example else "input_ids"
    if not isinstance(example.get(ids), Tensor):
        raise InapplicableError("the example has no tokens to go on from")
    graph = HookGraph(binding)
    options: dict[str, object] = {"use_cache": True, "do_sample": False, "num_beams": 1}
    options |= {"max_new_tokens": _NEW + 1, "min_new_tokens": _NEW + 1, "max_length": None}
    if ids.startswith("decoder"):
        options["decoder_start_token_id"] = int(example[ids][0, 0])  # which the example begins with
    with quietly():
        found = graph.generate(dict(example), save=locations, **options)
    past = [span.past for span in found.spans]
    if len(past) != _NEW + 1 or not all(past[1:]):
        raise InapplicableError("it keeps no cache of the kind whose length can be told")
    tokens = found.tokens[:, : past[-1] + 1]
    inputs = {**example, ids: tokens}
    mask = "decoder_attention_mask" if ids.startswith("decoder") else "attention_mask"
    if mask in inputs:
        inputs[mask] = torch.ones_like(tokens)
    whole = graph.run(inputs, save=locations)
    pairs: dict[Location, Pairs] = {}
    for location in locations:
        parts = [
            _part_of_pass(location, whole[location], run[location], span, tokens.shape[1])
            for run, span in zip(found.steps, found.spans, strict=True)
            if location in run
        ]
        comparable = [pair for pair in parts if pair is not None]
        if parts:
            pairs[location] = comparable if len(comparable) == len(parts) else _COLUMNS
    return pairs


def _part_of_pass(location: Location, whole: Tensor, value: Tensor, span: Span, tokens: int) -> Pair | None:
    """What a pass over everything has in the columns that one pass held, and what that pass has there.

    None where they have other columns: keys that stand for several positions are not there in every pass.
    Another stack runs over all that it is given, or over the tokens too.
    """
    if location.type.stack != MAIN_STACK and whole.shape == value.shape:
        return whole, value
    end = span.past + span.length
    if end > tokens:
        return None
    for axis, dim in enumerate(location.type.dims):
        if axis >= value.ndim or whole.ndim != value.ndim:
            break
        size = value.shape[axis]
        if dim is Dimension.POS:
            if whole.shape[axis] > tokens:
                return None
            whole = whole.narrow(axis, max(0, end - size), size)  # the last ones, as for logits
        elif dim is Dimension.KEY_POS and location.type not in KEYS_ELSEWHERE:
            # Sinks stand behind the keys; of those only the last are left in a window.
            sinks = max(0, whole.shape[axis] - tokens)
            if size - sinks < span.length:
                return None
            columns = [*range(max(0, end - size + sinks), end), *range(tokens, tokens + sinks)]
            whole = whole.index_select(axis, torch.tensor(columns, device=whole.device))
        elif dim is Dimension.KEY_POS and whole.shape[axis] != size:
            return None  # own keys beside those of the other stack
    return whole, value


# --- with padding -----------------------------------------------------------------------------


def _padded(subject: Subject, locations: Sequence[Location]) -> dict[Location, Pairs]:
    """Put padding on the left, then run over both."""
    binding, example = subject
    ids, mask = example.get("input_ids"), example.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise InapplicableError("the example has no tokens with a mask to be padded")
    others = [k for k, v in example.items() if isinstance(v, Tensor) and k not in _KNOWN]
    if others:
        raise InapplicableError(f"it is not known how {', '.join(others)} would be padded")
    graph = HookGraph(binding)
    longer = {
        **example,
        "input_ids": torch.cat([torch.full_like(ids[:, :_PADDING], _padding_token(binding)), ids], dim=1),
        "attention_mask": torch.cat([torch.zeros_like(mask[:, :_PADDING]), mask], dim=1),
    }
    plain, found = graph.run(example, save=locations), graph.run(longer, save=locations)
    turned = "position_ids" not in Accepted.by(binding.model).names
    pairs: dict[Location, Pairs] = {}
    for x in locations:
        pair = plain[x], _unpadded(x, plain[x], found[x])
        same = _difference(x, *pair) <= _tolerance(subject)
        if same or _has_columns(x, plain[x], ids.shape[1]):
            pairs[x] = [pair] if same or not (turned and x.type.name in _TURNED) else _FROM_FIRST
        else:
            pairs[x] = _COLUMNS
    return pairs


def _has_columns(location: Location, value: Tensor, tokens: int) -> bool:
    """Whether positions and keys are those of the tokens, and none stands in front of them, or behind."""
    sizes = zip(location.type.dims, value.shape, strict=False)
    return all(size == tokens for dim, size in sizes if dim in (Dimension.POS, Dimension.KEY_POS))


def _padding_token(binding: HuggingFaceBinding) -> int:
    """What the configuration says; any token if it says nothing, as padding is not to be read."""
    token: object = getattr(binding.model.config, "pad_token_id", None)
    if not isinstance(token, int):
        return 0
    return token if 0 <= token < vocabulary_size(binding.model, embedding_of(binding.model)) else 0


def _unpadded(location: Location, plain: Tensor, found: Tensor) -> Tensor:
    """The columns that are not padding: those of positions and keys, as far as there are more of them."""
    for axis, dim in enumerate(location.type.dims):
        more = dim in (Dimension.POS, Dimension.KEY_POS) and found.shape[axis] == plain.shape[axis] + _PADDING
        if more:
            found = found.narrow(axis, _PADDING, plain.shape[axis])
    return found


# --- by another kernel --------------------------------------------------------------------------


def _fused(subject: Subject, locations: Sequence[Location]) -> dict[Location, Pairs]:
    """Run with the attention function that the model was not given: eager instead of fused, or the reverse.

    Where scores or the pattern are asked for, attention is eager anyhow: those are asked for apart.
    """
    binding, example = subject
    graph = HookGraph(binding)
    outside = [x for x in locations if not _in_softmax(x)]
    inside = [x for x in locations if _in_softmax(x)]
    pairs: dict[Location, Pairs] = {}
    for group in (outside, inside):
        if group:
            plain = graph.run(example, save=group)
            with other_kernel(binding.model):
                found = graph.run(example, save=group)
            pairs |= {x: [(plain[x], found[x])] for x in group}
    return pairs


def _in_softmax(location: Location) -> bool:
    return location.type.name.split(".")[-1] in ("scores", "pattern")
