"""Caches among the inputs of a pass: it writes to a copy of its own, what that is made of stays as it is."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, final

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hookgraph.binding.running.sharing import SharedPast

_APPENDED: Final = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache that put new tensors in place of old ones, and never write into them."""


@final
@dataclass(frozen=True, eq=False)
class Remembered:
    """Keys and values of the first positions of a batch. Every pass is given a copy of its own.

    Args:
        cache: what one pass over those positions left; it is never written to.
        copies: how often the batch stands in it, one after the other.
    """

    cache: DynamicCache
    copies: int = 1

    def get_seq_length(self) -> int:
        """How many positions it holds."""
        return int(self.cache.get_seq_length())

    def repeated(self, copies: int) -> "Remembered":
        """The same for a batch that is repeated."""
        return replace(self, copies=self.copies * copies)

    def rows(self, chosen: slice | Int[Tensor, " batch"]) -> "Remembered":
        """The same for some examples of the batch."""
        cache = copy.copy(self.cache)
        cache.layers = [_rows_of(layer, chosen) for layer in self.cache.layers]
        return Remembered(cache, self.copies)

    def fresh(self, past: SharedPast | None = None) -> DynamicCache:
        """A cache that a pass may write to. It is for one pass: what that adds is forgotten.

        Args:
            past: what gives the copies of the batch their past, where attention asks that, not the cache.
        """
        cache = copy.copy(self.cache)
        cache.layers = [self._layer(layer, past) for layer in self.cache.layers]
        return cache

    def lasting(self) -> DynamicCache:
        """A cache for pass after pass, of the batch itself."""
        return copy.deepcopy(self.cache)

    def _layer(self, layer: Any, past: SharedPast | None) -> Any:
        own = copy.copy(layer)
        if not layer.is_initialized:
            return own
        if past is None:
            own.keys, own.values = (self._tiled(states) for states in (layer.keys, layer.values))
        passing = _Passing(copy.copy(own), None if past is None else partial(_handed_over, past, layer))
        own.update, own.get_seq_length = passing.update, passing.get_seq_length
        return own

    def _tiled(self, states: Tensor) -> Tensor:
        rest = [-1] * (states.ndim - 1)
        if len(states) == 1:  # nothing is copied before a layer of the model appends to it
            return states.expand(self.copies, *rest)
        return states.repeat(self.copies, *([1] * len(rest)))


@final
@dataclass(frozen=True, eq=False)
class Lent:
    """A cache that came with the inputs, of another kind: each pass is given a copy, reordered as for beams.

    Args:
        cache: as it came; it is never written to.
        examples: of each row of a pass, which example of the cache it goes on from.
    """

    cache: Cache
    examples: Int[Tensor, " batch"]

    def get_seq_length(self) -> int:
        """How many positions it holds."""
        return int(self.cache.get_seq_length())

    def repeated(self, copies: int) -> "Lent":
        """The same for a batch that is repeated."""
        return replace(self, examples=self.examples.repeat(copies))

    def rows(self, chosen: slice | Int[Tensor, " batch"]) -> "Lent":
        """The same for some examples of the batch."""
        return replace(self, examples=self.examples[chosen])

    def fresh(self) -> Cache:
        """A cache that a pass may write to."""
        return self.lasting()

    def lasting(self) -> Cache:
        """A cache for pass after pass."""
        own = copy.deepcopy(self.cache)
        kind = type(own)
        # One that holds more than layers says in one way or the other how it is ordered (MiniMax).
        selects = kind.batch_select_indices is not Cache.batch_select_indices
        choose = own.reorder_cache
        if selects and kind.reorder_cache is Cache.reorder_cache:
            choose = own.batch_select_indices
        choose(self.examples)  # pyright: ignore[reportArgumentType] (the device does not matter)
        return own


def _rows_of(layer: Any, chosen: slice | Int[Tensor, " batch"]) -> Any:
    own = copy.copy(layer)
    if layer.is_initialized:
        own.keys, own.values = layer.keys[chosen], layer.values[chosen]
    return own


@final
class _Passing:
    """A layer of a cache that counts what one pass adds, and hands it on, but goes on holding its own only.

    Otherwise the states of all layers, for every copy of the batch, would live until the pass is over.

    Args:
        layer: what it holds.
        hands: what makes the states that attention is given of new ones; None: those held and these.
    """

    def __init__(self, layer: Any, hands: Callable[..., Any] | None) -> None:
        self._layer = layer
        self._hands = hands
        self._length = int(layer.get_seq_length())

    def get_seq_length(self) -> int:
        """How many positions there are, those of this pass too once they are added."""
        return self._length

    def update(self, key: Tensor, *rest: Any, **options: Any) -> Any:
        """What attention is given."""
        self._length += key.shape[2]
        hands = self._hands or copy.copy(self._layer).update
        return hands(key, *rest, **options)


def _filled_by(cache: DynamicCache, rows: int) -> DynamicCache:
    """A cache to give to one pass, of whose examples the first few fill `cache`."""
    given = copy.copy(cache)
    given.layers = [_divided_layer(layer, rows) for layer in cache.layers]
    return given


def _divided_layer(layer: Any, rows: int) -> Any:
    own = copy.copy(layer)
    own.update = partial(_filling, layer, rows)
    return own


def _filling(layer: Any, rows: int, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """The states, all of them, since none were there before: those of the first examples are kept."""
    layer.update(key[:rows], value[:rows], *args, **options)
    return key, value


def _handed_over(past: SharedPast, layer: Any, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """The new states: those that the layer holds go to attention on another way."""
    return past.update((layer.keys, layer.values), key, value)


@final
class Retained:
    """Gives each pass an empty cache of its own, and holds the one that the last pass filled.

    Args:
        config: of the model.
        rows: of how many examples it is filled, the first ones; None for all.
    """

    def __init__(self, config: PreTrainedConfig, rows: int | None = None) -> None:
        self._config = config
        self._rows = rows
        self._filled: DynamicCache | None = None

    def fresh(self) -> DynamicCache:
        """A cache that a pass may write to."""
        self._filled = DynamicCache(config=self._config)
        self._filled.activate_past_recording()  # a window keeps what lies before it, too
        return self._filled if self._rows is None else _filled_by(self._filled, self._rows)

    def repeated(self, copies: int) -> "Retained":
        """The same for a batch that is repeated, whose passes are others."""
        return Retained(self._config)

    def rows(self, chosen: slice | Int[Tensor, " batch"]) -> "Retained":
        """The same for some examples, whose passes are others."""
        return Retained(self._config)

    @property
    def held(self) -> slice:
        """Which examples of such a pass it holds."""
        return slice(self._rows)

    def first(self, length: int, total: int) -> DynamicCache | None:
        """What a pass over the first of `total` positions would have left; None if there was no such pass."""
        if self._filled is None or not holds(self._filled, total):
            return None
        cache = copy.copy(self._filled)
        cache.layers = [copy.copy(layer) for layer in self._filled.layers]
        cache.crop(length - total)
        return cache


def holds(cache: DynamicCache, length: int) -> bool:
    """Whether a cache is of the kind that is known, and holds so many positions."""
    return all(map(_appended, cache.layers)) and cache.get_seq_length() == length


def _appended(layer: Any) -> bool:
    return type(layer) in _APPENDED and layer.is_initialized


def recalled(
    inputs: Mapping[str, Any], past: SharedPast | None = None, *, lasting: bool = False
) -> dict[str, Any]:
    """Inputs as the model takes them, with a fresh cache of what is remembered, or for what is to be.

    Args:
        inputs: what was prepared.
        past: what gives copies of the batch their past, if they share it.
        lasting: whether the cache is for pass after pass.
    """

    def given(value: object) -> object:
        if isinstance(value, Remembered | Lent) and lasting:
            return value.lasting()
        if isinstance(value, Remembered):
            return value.fresh(past)
        return value.fresh() if isinstance(value, Retained | Lent) else value

    return {k: given(v) for k, v in inputs.items()}


def several(inputs: Mapping[str, Any], layers: int) -> int:
    """How many copies of a batch have one past between them, held by so many layers; 1 if that is not so."""
    found = [v for v in inputs.values() if isinstance(v, Remembered)]
    held = [sum(map(_appended, x.cache.layers)) for x in found]
    return found[0].copies if held == [layers] else 1


def lent(cache: Cache, examples: int) -> Remembered | Lent:
    """What came with inputs of so many examples, so held that no pass writes to it."""
    if type(cache) is DynamicCache and all(type(layer) in _APPENDED for layer in cache.layers):
        return Remembered(cache)  # a kind of it may hold more, which `fresh` would hand on as it is
    return Lent(cache, torch.arange(examples))
