"""Effects in a padded batch and behind a past against those of each example alone, without a past."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.effects.patching import patching_effect
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.binding.running.outputs import read_output
from hookgraph.graph.measuring import Metric
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import MAIN_STACK, Location
from hookgraph.ontology.transformer import ENCODER
from hookgraph_tests.sweep.effects.findings import TOLERANCE, Finding, compared, told
from hookgraph_tests.sweep.effects.trials import Trial

_SHORTER: Final = 2
"""By how many tokens one of the examples is shorter."""
_PAST: Final = 3
"""How many tokens lie in the past."""
_SEEN: Final = 1e-7
"""By how much padding may change what a model returns: positions may be stored in single precision."""
_TEXT: Final = frozenset({"input_ids", "attention_mask", "decoder_input_ids", "use_cache"})


def padded(trial: Trial, nodes: Sequence[Location], side: str) -> Iterator[Finding]:
    """Two examples, of which one is shorter, in one batch and each alone."""
    check = f"{side} padding"
    reason = _not_text(trial)
    if reason:
        yield Finding(check, "not applicable", reason)
        return
    together = [_padded(x, side) for x in (trial.clean, trial.corrupt)]
    alone = [[_alone(x, row) for x in (trial.clean, trial.corrupt)] for row in (0, 1)]
    length = trial.clean["input_ids"].shape[1]
    decoding = "decoder_input_ids" in trial.clean
    ends = [-1, -1] if side == "left" or decoding else [length - 1 - _SHORTER, length - 1]
    try:
        logits = trial.graph.run(together[0]).logits
        singles = [trial.graph.run(x).logits for x, _ in alone]
    except Exception as error:
        yield Finding(check, *told(error))
        return
    off = max(
        float((logits[i, end] - x[0, -1]).abs().max())
        for i, (end, x) in enumerate(zip(ends, singles, strict=True))
    )
    if not off < _SEEN:
        yield Finding(check, "not applicable", "the model itself sees padding")
        return
    tolerance = max(TOLERANCE, 100 * off)
    kept = [x for x in nodes if _within(x, 0, length - _SHORTER, decoding=decoding)]
    vocabulary = logits.shape[-1] // 2
    metric = logit_diff(3, vocabulary, ends)
    singly = logit_diff(3, vocabulary)
    try:
        parts = [exact_effects(trial.graph, *x, singly, kept, progress=False) for x in alone]
    except Exception as error:
        yield Finding(check, "not applicable", f"alone: {told(error)[1]}")
        return
    expected = dict(zip(kept, torch.cat(parts, -1), strict=True))
    scale = metric(logits)
    yield from compared(check, kept, lambda x: _exact(trial, together, metric, x), expected, scale, tolerance)
    yield from _slopes(trial, check, kept, together, alone, metric, singly, scale, tolerance)


def _slopes(
    trial: Trial, check: str, kept: Sequence[Location], together: Any, alone: Any, metric: Metric,
    singly: Metric, scale: Tensor, tolerance: float,
) -> Iterator[Finding]:  # fmt: skip
    """The same of attribution patching."""

    def attributed(pair: Any, how: Metric, these: Sequence[Location]) -> Tensor:
        found = patching_effect(trial.graph, *pair, how, these)
        return torch.stack(
            [found.effects[x].reshape(len(scale) if how is metric else 1, -1).sum(1) for x in these]
        )

    try:
        parts = [attributed(x, singly, kept) for x in alone]
    except Exception as error:
        yield Finding(f"{check}/attrib", "not applicable", f"alone: {told(error)[1]}")
        return
    expected = dict(zip(kept, torch.cat(parts, -1), strict=True))
    yield from compared(
        f"{check}/attrib", kept, lambda x: attributed(together, metric, x), expected, scale, tolerance
    )


def past(trial: Trial, nodes: Sequence[Location]) -> Iterator[Finding]:
    """The last tokens behind a cache of the first, and all of them without."""
    check = "past"
    reason = _not_text(trial) or ("an encoder" if "decoder_input_ids" in trial.clean else "")
    if reason:
        yield Finding(check, "not applicable", reason)
        return
    clean, other = dict(trial.clean), dict(trial.corrupt)
    clean.pop("use_cache", None)
    ids = clean["input_ids"]
    other = {**clean, "input_ids": torch.cat([ids[:, :_PAST], other["input_ids"][:, _PAST:]], 1)}
    try:
        with torch.no_grad():
            whole = read_output(trial.model(**clean))
            prefix = {"input_ids": ids[:, :_PAST], "attention_mask": torch.ones_like(ids[:, :_PAST])}
            cache = trial.model(**prefix, use_cache=True).past_key_values
        if not isinstance(cache, Cache):
            raise TypeError("no cache")
        behind = [
            {**x, "input_ids": x["input_ids"][:, _PAST:], "past_key_values": cache} for x in (clean, other)
        ]
        with torch.no_grad():
            rest = read_output(trial.model(**{**behind[0], "past_key_values": deepcopy(cache)}))
    except Exception as error:
        yield Finding(check, "not applicable", told(error)[1])
        return
    off = float((rest[:, -1] - whole[:, -1]).abs().max())
    if not off < _SEEN:
        yield Finding(check, "not applicable", "the model itself differs behind a cache")
        return
    kept = [x for x in nodes if _within(x, _PAST, ids.shape[1], decoding=False)]
    kept = [x for x in kept if Dimension.POS in dict(x.index)]
    for name, metric in {"last": logit_diff(3, 5), "each": logit_diff(3, 5, [-1, -2])}.items():
        try:
            plain = exact_effects(trial.graph, clean, other, metric, kept, progress=False)
        except Exception as error:
            yield Finding(f"{check}/{name}", "not applicable", f"without: {told(error)[1]}")
            continue
        expected = dict(zip(kept, plain, strict=True))
        measure = lambda x, metric=metric: _exact(trial, behind, metric, x)  # noqa: E731
        yield from compared(
            f"{check}/{name}", kept, measure, expected, metric(whole), max(TOLERANCE, 100 * off)
        )
    if cache.get_seq_length() != _PAST:
        yield Finding(check, "wrong", f"the cache that was given holds {cache.get_seq_length()} tokens")


def _exact(
    trial: Trial, pair: Sequence[Mapping[str, Any]], metric: Metric, nodes: Sequence[Location]
) -> Tensor:
    return exact_effects(trial.graph, *pair, metric, nodes, progress=False)


def _not_text(trial: Trial) -> str:
    other = set(trial.clean) - _TEXT
    if other or "input_ids" not in trial.clean or "attention_mask" not in trial.clean:
        return f"it is given {', '.join(sorted(other)) or 'no tokens'}"
    return "" if trial.clean["input_ids"].shape == trial.clean["attention_mask"].shape else "rows differ"


def _padded(inputs: Mapping[str, Any], side: str) -> dict[str, Any]:
    """The first example without its last tokens, and padding in their place."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[0, -_SHORTER:], mask[0, -_SHORTER:] = 0, 0
    if side == "left":
        ids[0], mask[0] = ids[0].roll(_SHORTER), mask[0].roll(_SHORTER)
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def _alone(inputs: Mapping[str, Any], row: int) -> dict[str, Any]:
    one = {k: v[row : row + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    if row == 0:
        one = {k: v[:, :-_SHORTER] if k in ("input_ids", "attention_mask") else v for k, v in one.items()}
    return one


def _within(node: Location, start: int, stop: int, *, decoding: bool) -> bool:
    """Whether a node lies at a position of all rows that has the same number in each."""
    stack = node.root.type.stack
    if decoding and stack == MAIN_STACK:
        return True
    known = stack in (MAIN_STACK, ENCODER.EMBED.type.stack)
    return known and start <= dict(node.index).get(Dimension.POS, -1) < stop
