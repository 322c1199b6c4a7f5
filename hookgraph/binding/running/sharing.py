"""Attention of many copies of a batch to one past, of which there is one set of keys and values for all.

A cache hands attention keys and values of all positions, so that copies of a batch need copies of their past.
Here they stand one after the other in the rows of a query: each attends to the past, and to itself.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from hookgraph.binding.data.anchors import Anchor
from hookgraph.binding.data.findings import Findings
from hookgraph.errors import BindingError
from hookgraph.hooks.masking import masked_score
from hookgraph.ontology.transformer import ATTN_PATTERN

SHARED: Final = "shared"
"""The invariant that allows it."""

TOGETHER: Final = 64
"""So many queries at once: each is multiplied with the keys of all, of which it may see its own copy's."""

_UNREAD: Final = frozenset({"position_ids", "cache_position"})
"""What attention functions are given by row, and leave alone."""

MASKED: Final = frozenset({"eager", "sdpa"})
"""Implementations of attention that are told of each query which keys it sees."""

Attention = Callable[..., Any]
"""An attention function, as transformers' interface has it."""


def attending(findings: Findings) -> tuple[Anchor, ...]:
    """The patterns of attention that is reached from inside, by layer: there goes what a cache hands back.

    None if keys of some are known to be made of what the cache keeps, or some are computed in several calls.
    """
    anchors = [a for x, a in findings.anchors.items() if x.type == ATTN_PATTERN]
    remade = {a.module for a in findings.anchors.values() if a.kept == "source"}
    plain = all(a.mechanism == "interior" and a.calls == 1 and a.module not in remade for a in anchors)
    return tuple(anchors) if plain else ()


@final
class SharedPast:
    """Hands over the keys and values of each layer from its cache to its attention, in one pass.

    Args:
        copies: how often the batch stands in the pass, one copy after the other.
    """

    def __init__(self, copies: int) -> None:
        self._copies = copies
        self._past: tuple[Tensor, Tensor] | None = None
        self._new: Tensor | None = None
        self._masks: tuple[Tensor | None, dict[tuple[object, ...], Tensor]] = (None, {})

    def update(
        self,
        past: tuple[Float[Tensor, "... key_pos d_head"], Float[Tensor, "..."]],
        key: Float[Tensor, "batch kv_head pos d_head"],
        value: Float[Tensor, "batch kv_head pos ..."],
    ) -> tuple[Tensor, Tensor]:
        """What a layer of a cache returns: the new keys and values only."""
        self._past, self._new = past, key
        return key, value

    def holds(self, key: Tensor) -> bool:
        """Whether these are the keys that the cache of this layer handed back, without the past.

        Raises:
            BindingError: the cache handed back others, which attention was not given.
        """
        if self._past is not None and key is not self._new:
            raise BindingError("attention was not given the keys that its cache handed back")
        return self._past is not None

    def wholes(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, for each copy."""
        old_key, old_value = self._taken()
        return _whole(old_key, key, self._copies), _whole(old_value, value, self._copies)

    def attend(
        self,
        function: Attention,
        module: nn.Module,
        query: Float[Tensor, "batch head pos d_head"],
        key: Float[Tensor, "batch kv_head pos d_head"],
        value: Float[Tensor, "batch kv_head pos ..."],
        mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What the attention function returns for every copy, given the past once for several of them."""
        rows, length, given = len(query), query.shape[2], (*args, *_read(kwargs))
        by_row = any(isinstance(x, Tensor) and x.shape[:1] == (rows,) for x in given)
        past = self._past
        if past is None or by_row or not _is_known(mask, rows, length, past[0].shape[2]):
            return self.repeat(function, module, query, key, value, mask, *args, **kwargs)
        self._taken()
        batch, step = rows // self._copies, max(1, TOGETHER // length)
        found: list[Tensor] = []
        for first in range(0, self._copies, step):
            here = slice(first * batch, (first + step) * batch)
            packed = [_packed(x[here], batch) for x in (query, key, value)]
            count = packed[0].shape[2] // length
            keys, values = (torch.cat(pair, 2) for pair in zip(past, packed[1:], strict=True))
            seen = self._mask(mask, first, count, query, past[0].shape[2])
            output = function(module, packed[0], keys, values, seen, *args, **kwargs)
            found.append(_unpacked(output[0] if isinstance(output, tuple) else output, count))
        return torch.cat(found) if len(found) > 1 else found[0], None

    def repeat(
        self,
        function: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        """What the attention function returns, given the past for each copy."""
        return function(module, query, *self.wholes(key, value), *rest, **kwargs)

    def _taken(self) -> tuple[Tensor, Tensor]:
        past = self._past
        if past is None:
            raise BindingError("no cache handed over a past")
        self._past, self._new = None, None
        return past

    def _mask(self, mask: Tensor | None, first: int, copies: int, query: Tensor, past: int) -> Tensor:
        """A mask for copies side by side, made once for all layers that are given the same."""
        if self._masks[0] is not mask or not self._masks[1]:
            self._masks = (mask, {})
        made, kind = self._masks[1], (first, copies, past, query.device)
        if kind not in made:
            batch = len(query) // self._copies
            if mask is None:
                mask = torch.ones(1, 1, 1, past + 1, dtype=torch.bool, device=query.device)
            several = len(mask) > 1 and self._copies > 1
            own = (
                mask[first * batch : (first + copies) * batch] if several else mask.expand(copies, -1, -1, -1)
            )
            made[kind] = side_by_side(own, copies, past)
        return made[kind]


def side_by_side(
    mask: Shaped[Tensor, "... head pos key_pos"], copies: int, past: int
) -> Shaped[Tensor, "batch head ..."]:
    """The mask of copies of some positions that follow one past: each copy sees that, and itself.

    Args:
        mask: of one copy after the other: whether a key is seen, or what is added to its score.
        copies: how many.
        past: how many keys belong to the past.
    """
    each = mask.unflatten(0, (copies, -1))
    _, batch, heads, length, _ = each.shape
    hidden = False if mask.dtype == torch.bool else masked_score(mask.dtype)
    own = mask.new_full((batch, heads, copies, length, copies, length), hidden)
    number = torch.arange(copies, device=mask.device)
    own[:, :, number, :, number] = each[..., past:]
    old = each[..., :past].movedim(0, 2).flatten(2, 3)
    return torch.cat((old, own.view(batch, heads, copies * length, copies * length)), -1)


def _is_known(mask: object, rows: int, length: int, past: int) -> bool:
    """Whether a mask says of each key whether it is seen. Without one, a single position sees all."""
    if not isinstance(mask, Tensor):
        return mask is None and length == 1
    return mask.ndim == 4 and len(mask) in (1, rows) and mask.shape[2:] == (length, past + length)


def _read(options: Mapping[str, Any]) -> Iterator[object]:
    return (x for name, x in options.items() if name not in _UNREAD)


def _whole(past: Tensor, new: Tensor, copies: int) -> Tensor:
    rest = [-1] * (past.ndim - 1)
    old = past.expand(copies, *rest) if len(past) == 1 else past.repeat(copies, *([1] * (past.ndim - 1)))
    return torch.cat((old, new), 2)


def _packed(x: Float[Tensor, "batch head pos ..."], batch: int) -> Float[Tensor, "..."]:
    """Copies of a batch side by side along positions."""
    return x.unflatten(0, (-1, batch)).movedim(0, 2).flatten(2, 3)


def _unpacked(x: Float[Tensor, "batch pos ..."], copies: int) -> Float[Tensor, "..."]:
    """The other way round, of what attention returns."""
    return x.unflatten(1, (copies, -1)).movedim(1, 0).flatten(0, 1)
