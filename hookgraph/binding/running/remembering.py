"""What a model remembers of the first positions of its inputs, for passes over the rest of them alone."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from hookgraph.binding.running.compiled import as_written
from hookgraph.binding.running.others import is_changed, is_hooked
from hookgraph.binding.running.recalling import Remembered, Retained, holds
from hookgraph.binding.tracing.trace import evaluating
from hookgraph.hooks.handles import Handle, installed

_BY_POSITION: Final = frozenset({"input_ids", "attention_mask", "position_ids"})
"""The inputs that are known to be divided along positions."""


@final
class Memory:
    """Lets a model remember the first positions of its inputs.

    Args:
        model: the model.
        last: its last layer.
    """

    def __init__(self, model: PreTrainedModel, last: nn.Module) -> None:
        self._model = model
        self._last = last
        self._takes: bool | None = None

    def retaining(self, inputs: Mapping[str, Any], rows: int | None = None) -> dict[str, Any] | None:
        """Inputs of which a pass retains what `remember` needs, so that this takes no pass of its own.

        With `rows` that is retained of the first so many examples, and these are those that are remembered.

        None where `remember` would not look at the inputs, or where modules were given another forward. The
        model has to be one whose later positions leave earlier ones alone, which what others did to it may
        have changed: then a pass over the first positions by themselves tells.
        """
        parts = _divided(inputs)
        if parts is None or any(map(is_hooked, self._model.modules())) or not self._takes_cache(parts):
            return None
        retained = Retained(self._model.config, rows)
        return {**inputs, "use_cache": True, "past_key_values": retained}

    def remember(self, inputs: Mapping[str, Any], length: int) -> dict[str, Any] | None:
        """Inputs for the positions from `length` on, with what the model remembers of those before.

        Runs the model over the first positions, up to its last layer, unless a pass over all of them has
        retained it. None where it cannot be said that this is all that they do: there is padding or an input
        that is not divided by position, the cache is of another kind, or others look into modules, who may
        count positions.
        """
        parts = _divided(inputs)
        total = 0 if parts is None else parts["input_ids"].shape[1]
        if parts is None or not 0 < length < total:
            return None
        if any(map(is_changed, self._model.modules())) or not self._takes_cache(parts):
            return None
        retained = inputs.get("past_key_values")
        held = retained.held if isinstance(retained, Retained) else slice(None)
        cache = retained.first(length, total) if isinstance(retained, Retained) else None
        if cache is None:
            cache = self._filled({k: v[held, :length] for k, v in parts.items()})
        if not holds(cache, length):
            return None
        rest = {k: v[held, length:] for k, v in parts.items()}
        return {**rest, "use_cache": True, "past_key_values": Remembered(cache)}

    def _takes_cache(self, parts: Mapping[str, Tensor]) -> bool:
        """Whether the model fills a cache made by its configuration, seen once on the first two tokens.

        Some models make one of their own kind and take no other (MiniMax), or have no single one (BLT).
        """
        if self._takes is None:
            try:
                with evaluating(self._model), as_written(self._model.modules()):
                    self._takes = holds(self._filled({k: v[:1, :2] for k, v in parts.items()}), 2)
            except Exception:  # whatever a model raises that is given a cache it was not made for
                self._takes = False
        return self._takes

    def _filled(self, first: dict[str, Any]) -> DynamicCache:
        """What a pass leaves that ends with the last layer."""
        cache = DynamicCache(config=self._model.config)
        with torch.no_grad(), suppress(_Passed), installed(partial(_ending, self._last)):
            self._model(**first, use_cache=True, past_key_values=cache)
        return cache


def _divided(inputs: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The inputs that positions divide among them, if these are all; None too where there is padding."""
    own = {k for k, v in inputs.items() if v is None or isinstance(v, Retained)} | {"use_cache"}
    mask = inputs.get("attention_mask")
    if not isinstance(inputs.get("input_ids"), Tensor) or not inputs.keys() - own <= _BY_POSITION:
        return None
    if isinstance(mask, Tensor) and (mask.ndim != 2 or not bool(mask.all())):
        return None
    parts = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and k != "attention_mask"}
    return parts if all(v.ndim == 2 for v in parts.values()) else None


class _Passed(Exception):  # noqa: N818 (it ends a pass, and is no error)
    """The last layer has run: nothing is asked of what comes after."""


def _ending(last: nn.Module) -> Handle:
    return last.register_forward_hook(_stop)


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Passed
