"""Keys and values on their way into a cache: what a pass adds is tapped before the cache takes it.

A cache hands attention the whole past. The taps on keys and values see what this pass adds; where the
cache keeps the very states that attention is given, they are called as these are added, so that later
passes see an edit. Only the cache of the pass is touched, and only while the module runs.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from hookgraph.binding.data.anchors import Role
from hookgraph.errors import LocationError
from hookgraph.hooks.taps import Tap

Change: TypeAlias = Callable[[Role, Tensor], Tensor]
"""Calls the tap of a role on heads that lie before positions."""


@final
class NewStates:
    """What one attention module adds to a cache, call by call, until it is removed.

    Args:
        module: the attention module.
        roles: `key` and `value`, as far as they are to be changed when the cache takes them.
        change: what is called with them.
        leave: what is called when a call of the module ends, also by an error.
    """

    def __init__(
        self, module: nn.Module, roles: frozenset[Role], change: Change, leave: Callable[[], None]
    ) -> None:
        self._roles = roles
        self._change = change
        self._left = leave
        self.cache: Cache | None = None
        """The cache that this call was given."""
        self.whole = True
        """Whether attention is given every position of the sequence, not a window."""
        self._patched: list[Cache] = []
        self.held = 0
        """How many positions of the sequence the cache has seen, with those of this call."""
        self.returned: Mapping[Role, Tensor] = {}
        """What the cache handed back in this call."""
        self._handles = (
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        )

    def remove(self) -> None:
        """Stop looking at the module."""
        for handle in self._handles:
            handle.remove()

    def new_part(self, total: int, length: int) -> slice:
        """Which of `total` columns of keys a call of `length` queries added."""
        held = self.held
        if self.cache is not None and not held:  # another layer's keys: that layer has added to the cache
            held = int(self.cache.get_seq_length())
        end = min(total, held) if held else total
        self.whole = total >= held
        return slice(max(0, end - length), end)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        self.held = 0
        self.returned = {}
        if self.cache is None:
            return
        for cache in _parts(self.cache):
            if "update" not in vars(cache):
                vars(cache)["update"] = self._updating(cache)
                self._patched.append(cache)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._patched:
            del vars(self._patched.pop())["update"]
        self.cache = None
        self._left()

    def _updating(self, cache: Cache) -> Callable[..., tuple[Tensor, Tensor]]:
        update = cache.update

        def updating(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            if "key" in self._roles:
                key = self._change("key", key)
            if "value" in self._roles:
                value = self._change("value", value)
            held = int(cache.get_seq_length(layer))  # before: not every cache counts what this pass adds
            keys, values = update(key, value, layer, *args, **kwargs)
            self.held = held + key.shape[2]
            self.returned = {"key": keys, "value": values}
            return keys, values

        return updating


def _parts(cache: Cache) -> Iterator[Cache]:
    """The caches of an encoder-decoder model are two."""
    if isinstance(cache, EncoderDecoderCache):
        yield cache.self_attention_cache
        yield cache.cross_attention_cache
    else:
        yield cache


@final
class Edited:
    """Edited keys or values of which the cache keeps only what they are made from: they are kept here.

    In each pass the model makes all of them anew from its cache. What was edited in earlier passes over the
    same cache takes the place of what is made anew.
    """

    def __init__(self) -> None:
        self._cache: weakref.ref[Cache] | None = None
        self._plain: Tensor | None = None
        self._edited: Tensor | None = None

    def tap(self, tap: Tap, raw: Tensor, states: NewStates, length: int) -> Tensor:
        """Call a tap on the newest of all keys or values; returns all of them, earlier edits included.

        Raises:
            LocationError: rows of the cache were exchanged since they were edited.
        """
        part = states.new_part(raw.shape[2], length)
        past = self._earlier(tap, raw[:, :, : part.start], states)
        value = raw[:, :, part].transpose(1, 2)
        new = tap(value)
        if new is value and past is None and not tap.tracks_gradient:
            return raw
        past = raw[:, :, : part.start] if past is None else past
        every = torch.cat((past, new.transpose(1, 2)), dim=2)
        if states.cache is not None and tap.edits:
            self._cache = weakref.ref(states.cache)
            self._plain, self._edited = raw[:, :, : part.stop].detach(), every
        return torch.cat((every, raw[:, :, part.stop :]), dim=2)

    def _earlier(self, tap: Tap, past: Tensor, states: NewStates) -> Tensor | None:
        """What earlier passes made of the past; None if they left it alone."""
        plain, edited = self._plain, self._edited
        known = self._cache is not None and self._cache() is states.cache
        if not known or plain is None or edited is None or not past.shape[2]:
            return None
        kept = slice(0, past.shape[2]) if states.whole else slice(plain.shape[2] - past.shape[2], None)
        plain, edited = plain[:, :, kept], edited[:, :, kept]
        if plain.shape != past.shape or not torch.allclose(plain, past, rtol=1e-2, atol=1e-3):
            raise LocationError(
                f"{tap.location} was edited in earlier passes, and the cache, which keeps what these are "
                "made from, has exchanged its rows since, as beams do: generate without beams, or with "
                "use_cache=False"
            )
        return edited
