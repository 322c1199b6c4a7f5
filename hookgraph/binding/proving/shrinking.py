"""Smaller configurations of the same structure: fewer layers, narrower ones, fewer tokens.

No class plays a part, only what a configuration says of itself. Everything that measures a width is divided
by one number, so that equations between widths stay true; everything that counts is kept; layers are cut
off at the end, so that whatever depends on the number of a layer stays as it is. Whether the outcome is a
model at all, and resolves like the large one, is for the caller to see.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from transformers import PreTrainedConfig

VOCABULARY: Final = 300
"""How many tokens are left."""

_D_HEAD: Final = 8
"""How wide heads are in the end: wide enough to rotate a quarter of their features."""

_EXPERTS_LEFT: Final = 16
"""How many experts are left: more than any token is routed to."""

_TOKEN: Final = re.compile(r"token.*(_id|_ids|_index)$|_token$")
_LAYERS: Final = re.compile(r"layer|depth|block")
_HEADS: Final = re.compile(r"^n(um)?_.*heads?$|_heads$|_num_heads_|^num_kv$")
_EXPERTS: Final = re.compile(r"experts$")
_COUNT: Final = re.compile(
    r"^num_|^n_(head|layer|group|expert|routed|shared)|heads|experts|layers|groups?$|top_?k|_per_|position|length|window|"
    r"ctx|chunk|period|interval|frequency|kernel|conv(_size|_width)?$|stride|factor|image|patch|channels|bins|rate|"
    r"type|version|_id$|index|expand|step|seed|bucket|distance"
)
"""Names of what is a number of things, not the width of one."""


@final
@dataclass(frozen=True, slots=True)
class Shrinking:
    """How much smaller: layers by how many there are, heads and their widths by what they are divided by.

    Where there are fewer heads, there are fewer experts too.
    """

    depths: Mapping[int, int]
    width: int
    heads: int

    def of(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The smaller configuration. The given one stays as it is."""
        result = copy.deepcopy(config)
        vars(result).pop("quantization_config", None)
        for part in _parts(result):
            known = getattr(part, "vocab_size", None)
            for name, value in list(vars(part).items()):
                if name.startswith("_"):
                    continue
                is_vocabulary = isinstance(known, int) and value == known and "pos" not in name
                vars(part)[name] = VOCABULARY if is_vocabulary else self._smaller(name, value)
        return result

    def _smaller(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: self._smaller(str(k), v) for k, v in value.items()}
        if isinstance(value, (list, tuple)) and value:
            return self._fewer(name, value)
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if _TOKEN.search(name):
            # The last tokens of the vocabulary: examples are made of others.
            return value if value < VOCABULARY else VOCABULARY - 1 - value % 7
        if _LAYERS.search(name) and value in self.depths:
            return self.depths[value]
        if "vocab" in name:
            return min(value, VOCABULARY)
        if _HEADS.search(name):
            return _divided(value, self.heads)
        if _EXPERTS.search(name) and self.heads > 1:
            return _divided(value, _power_of_two(value // _EXPERTS_LEFT))
        if _COUNT.search(name):
            return value
        return _divided(value, self.width if "head" in name or "rope" in name else self.width * self.heads)

    def _fewer(self, name: str, value: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
        """A list with an element per layer, per feature, or of widths."""
        if len(value) in self.depths:
            return value[: self.depths[len(value)]]
        if all(isinstance(x, float) for x in value) and len(value) % self.width == 0:
            return value[: len(value) // self.width]
        items = [self._smaller(name, x) for x in value]
        return type(value)(items) if type(value) in (list, tuple) else value


def shrinkings(config: PreTrainedConfig, depths: Mapping[int, int]) -> Iterator[Shrinking]:
    """Ways to make a configuration smaller, the one that shrinks most first.

    Args:
        config: the large one.
        depths: how many layers a stack of some number of layers is to keep.
    """
    try:
        text = config.get_text_config()
    except ValueError:  # there are several
        text = config
    heads = _number(text, "num_attention_heads") or 1
    d_head = _number(text, "head_dim") or (_number(text, "hidden_size") or 64) // heads
    groups = _number(text, "num_key_value_heads") or 1
    groups = groups if groups > 1 else heads
    narrower = _power_of_two(d_head // _D_HEAD)
    fewer = min(_power_of_two(heads // 4), _power_of_two(groups // 2), 16)
    if fewer > 1:
        yield Shrinking(depths, narrower, fewer)
    while narrower > 1:
        yield Shrinking(depths, narrower, 1)
        narrower //= 2
    yield Shrinking(depths, 1, 1)


def _number(config: PreTrainedConfig, name: str) -> int:
    """A positive number that a configuration states, or 0 where it does not, or one for each layer."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:
        return 0
    return value if isinstance(value, int) and value > 0 else 0


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _divided(value: int, by: int) -> int:
    return value // by if value % by == 0 and value // by >= 2 else value


def _power_of_two(limit: int) -> int:
    """The largest power of two that is no larger."""
    return 1 << (max(limit, 1).bit_length() - 1)
