"""Where a pass of a model lies in its sequences, from what the model is given."""

import inspect
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from hookgraph.errors import LocationError
from hookgraph.graph.examples import has_features
from hookgraph.hooks.handles import Handle
from hookgraph.hooks.positions import Place, Span
from hookgraph.ontology.locations import MAIN_STACK, STACKS

_DECODER = {"ids": "decoder_input_ids", "embeds": "decoder_inputs_embeds", "mask": "decoder_attention_mask"}
_KEYS = "past_key_values"
_STATES = ("cache_params", "state", _KEYS)
_ALONE = {"ids": "input_ids", "embeds": "inputs_embeds", "mask": "attention_mask"}


@final
class Following:
    """Brings a place up to date when a pass of a model begins, until it is removed.

    The step is counted: 0 where a cache is empty, or where a pass without a cache does not go on with what
    the pass before ended with.
    """

    def __init__(self, model: nn.Module, place: Place) -> None:
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._place = place
        self._begun = False
        self._prompt: Tensor | None = None
        self._span = Span()
        self._handle: Handle = model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)

    def remove(self) -> None:
        """Leave the place as it is from now on."""
        self._handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        spans = spans_of(arguments)
        span = spans.get(MAIN_STACK, Span())
        if self._begun and not span.past and _has_state(arguments):
            padding = span.padding if arguments.get(_ALONE["mask"]) is not None else self._span.padding
            span = Span(self._span.past + self._span.length, span.length, padding)
            spans[MAIN_STACK] = span
        self._place.spans.clear()
        self._place.spans.update(spans)
        goes_on = self._begun and (span.past > 0 or self._continued(arguments, span.length))
        self._place.step = self._place.step + 1 if goes_on else 0
        if not goes_on:
            self._prompt = _tokens(arguments)
        self._begun, self._span = True, span

    def _continued(self, arguments: Mapping[str, Any], length: int) -> bool:
        """Whether a pass without a cache holds one position more than the last one, after the same prompt."""
        if arguments.get("past_key_values") is not None or length != self._span.length + 1:
            return False
        tokens, prompt = _tokens(arguments), self._prompt
        if tokens is None or prompt is None:
            return tokens is prompt
        return tokens[:, : prompt.shape[1]].equal(prompt)


def spans_of(arguments: Mapping[str, Any]) -> dict[str, Span]:
    """Which positions a pass holds, given its arguments, by stack of tokens.

    Raises:
        LocationError: a mask of four axes does not show what is padding.
    """
    if _DECODER["ids"] in arguments or _DECODER["embeds"] in arguments:
        cache = arguments.get("past_key_values")
        spans = {MAIN_STACK: _span(arguments, _DECODER, cache, "decoder_position_ids")}
        if arguments.get("encoder_outputs") is None:
            spans["encoder"] = _span(arguments, _ALONE, None, "position_ids")
        return spans
    alone = _span(arguments, _ALONE, arguments.get("past_key_values"), "position_ids")
    # Where nothing but tokens is given, every stack reads these.
    stacks = (MAIN_STACK,) if has_features(arguments) else STACKS
    return dict.fromkeys(stacks, alone)


def _span(arguments: Mapping[str, Any], names: Mapping[str, str], cache: Any, positions: str) -> Span:
    given = next(
        (arguments[names[k]] for k in ("ids", "embeds") if arguments.get(names[k]) is not None), None
    )
    if not isinstance(given, Tensor) or given.ndim < 2:
        return Span()
    length, past = given.shape[1], cached_length(cache)
    mask = arguments.get(names["mask"])
    if isinstance(mask, Tensor) and mask.ndim == 2:
        if not past and not _is_fixed(cache):
            past = max(0, mask.shape[1] - length)
        mask = mask[:, : past + length]
        real, first, ends = (mask != 0).int(), (0,), ()
        if not bool(real[:, 0].all()):
            # A row of padding alone has its first token, if one comes, behind all columns.
            first = tuple(torch.where(real.any(1), real.argmax(1), mask.shape[1]).tolist())
        if not bool(real[:, -1].all()):
            ends = tuple((mask.shape[1] - past - real.flip(1).argmax(1)).tolist())
        return Span(past, length, first, ends)
    if mask is None:
        return Span(past, length)
    numbers = arguments.get(positions)
    if numbers is None and isinstance(mask, Tensor) and mask.ndim == 4 and _sees_first(mask):
        return Span(past, length)
    if not isinstance(numbers, Tensor) or numbers.ndim != 2:
        raise LocationError(
            f"positions cannot be told from {names['mask']} with more than two axes: give {positions}, or a "
            "mask of shape (batch, pos)"
        )
    last = [int(x) for x in numbers[:, -1]]
    return Span(past, length, tuple(past + length - 1 - x for x in last))


def _sees_first(mask: Tensor) -> bool:
    """Whether the last position of each row attends to the first one, which is no padding then."""
    first = mask[:, :, -1, 0]
    return bool((first if first.dtype == torch.bool else first == 0).all())


def cached_length(cache: Any) -> int:
    """How many columns a cache holds."""
    return _told(cache) or 0


def _told(cache: Any) -> int | None:
    """How many columns a cache says that it holds."""
    measure = getattr(cache, "get_seq_length", None)
    try:
        return None if measure is None else int(measure())
    except ValueError:  # it keeps states, and no keys whose number would tell
        return None


def _is_fixed(cache: Any) -> bool:
    """Whether a cache has one size from the start, as a mask of two axes may have then, and tells how much of
    it is filled.
    """
    return bool(getattr(cache, "is_compileable", False)) and _told(cache) is not None


def _has_state(arguments: Mapping[str, Any]) -> bool:
    """Whether a model without keys goes on from a state, which does not tell how long its past is."""
    name = next((k for k in _STATES if arguments.get(k) is not None), None)
    if name is None:
        return False
    told = getattr(arguments[name], "has_previous_state", None)
    try:
        return name != _KEYS if told is None else bool(told())
    except ValueError:  # it keeps keys, and no states
        return False


def _tokens(arguments: Mapping[str, Any]) -> Tensor | None:
    found = arguments.get(_DECODER["ids"], arguments.get(_ALONE["ids"]))
    return found if isinstance(found, Tensor) else None
