"""From the class of a configuration to a tiny instance of it."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Final

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hookgraph_tests.tiny.overrides import OVERRIDES, UNSET
from hookgraph_tests.tiny.rules import (
    DEPTHS,
    HEADS,
    LAYER_KINDS,
    LAYER_KINDS_ONCE,
    TOKENS,
    VOCABULARY,
    rule_for,
)

_UNKNOWN_ARGUMENT: Final = re.compile(r"unexpected keyword argument '(\w+)'")


def tiny_config(
    cls: type[PreTrainedConfig],
    overrides: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """A small configuration of a class: by the rules, then by what is known of its architecture.

    Args:
        cls: the class.
        overrides: fields that are to be as given.
        defaults: fields whose default is not that of the class.
    """
    known = {**(defaults or {}), **OVERRIDES.get(cls.model_type, {}), **(overrides or {})}
    arguments = {k: v for k, v in {**_shrunk(cls), **known}.items() if v is not UNSET}
    arguments.update(_inner(cls, known))
    while True:
        try:
            return cls(**arguments)
        except TypeError as error:
            # A field that a class inherits, but computes by itself.
            unknown = _UNKNOWN_ARGUMENT.search(str(error))
            if unknown is None or arguments.pop(unknown.group(1), UNSET) is UNSET:
                raise


def _shrunk(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """What the rules say of each field; layers and special tokens."""
    defaults = {f.name: _default(f) for f in dataclasses.fields(cls) if f.init}
    arguments: dict[str, Any] = {k: v for k, d in defaults.items() if (v := rule_for(k, d)) is not None}
    arguments.update(_special_tokens(defaults))
    if "kv_lora_rank" in defaults and "num_key_value_heads" in arguments:
        arguments["num_key_value_heads"] = HEADS  # the latent of all heads is one
    arguments.update(_layers(arguments, _default_instance(cls), defaults))
    return arguments


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _default_instance(cls: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    try:
        return cls()
    except Exception:  # some have no defaults that fit together
        return None


def _special_tokens(defaults: Mapping[str, object]) -> dict[str, object]:
    tokens: dict[str, object] = {}
    free = VOCABULARY - 2
    for name, default in defaults.items():
        if not name.endswith(("_token_id", "_token_index")):
            continue
        if isinstance(default, (list, tuple)):
            tokens[name] = [TOKENS["eos_token_id"]]
        elif isinstance(default, int) and default >= 0:
            tokens[name] = TOKENS.get(name, free)
            free -= name not in TOKENS
    return tokens


def _layers(
    arguments: Mapping[str, Any], example: PreTrainedConfig | None, defaults: Mapping[str, object]
) -> dict[str, Any]:
    """As many layers as it takes to have one of each kind that the default configuration mixes."""
    depth = next((name for name in DEPTHS if name in arguments), None)
    if depth is None:
        return {}
    kinds = {name: _kinds(example, name) for name in (*LAYER_KINDS, *LAYER_KINDS_ONCE) if name in defaults}
    kinds = {name: found for name, found in kinds.items() if found}
    count = max([arguments[depth], *map(len, kinds.values())])
    lists = {
        name: [
            found[min(i, len(found) - 1) if name in LAYER_KINDS_ONCE else i % len(found)]
            for i in range(count)
        ]
        for name, found in kinds.items()
    }
    return {depth: count, **lists}


def _kinds(example: PreTrainedConfig | None, name: str) -> list[str]:
    listed = getattr(example, name, None)
    return list(dict.fromkeys(listed)) if isinstance(listed, (list, tuple)) else []


def _inner(cls: type[PreTrainedConfig], known: Mapping[str, Any]) -> dict[str, Any]:
    """The configurations inside one, each tiny too.

    Where a configuration of any class will do, it is of the class that is known, or of the default's.
    """
    example = _default_instance(cls)
    inner: dict[str, Any] = {}
    for name, declared in (cls.sub_configs or {}).items():
        changes = known.get(name, {})
        if not isinstance(changes, Mapping):
            continue
        found, specified = getattr(example, name, None), cls.sub_configs_defaults.get(name)
        kind = type(found) if isinstance(found, PreTrainedConfig) else declared
        stated = changes.get("model_type") or (kind is AutoConfig and getattr(specified, "model_type", None))
        if stated:
            kind = CONFIG_MAPPING[stated]
        if isinstance(kind, type) and issubclass(kind, PreTrainedConfig) and kind is not AutoConfig:
            defaults = getattr(specified, "init_kwargs", {}) or {}
            small = {k: rule_for(k, v) or v for k, v in defaults.items()}
            changed = {k: v for k, v in changes.items() if k != "model_type"}
            inner[name] = tiny_config(kind, changed, small).to_dict()
    return inner
