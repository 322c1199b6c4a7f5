"""The attention functions that a model can be given: its own eager one, the fused one of torch, and one that
is not looked into.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, Final

from transformers import PreTrainedConfig, PreTrainedModel

from hookgraph.errors import BindingError

_NAME: Final = "_attn_implementation_internal"
_OTHER: Final = {"sdpa": "eager", "eager": "sdpa"}
_UNSEEN: Final = "flex_attention"
"""It compiles itself around its inputs: hooks see none of its operations."""


class InapplicableError(Exception):
    """Something is not to be asked of this model; the text is the reason."""


@contextmanager
def other_kernel(model: PreTrainedModel) -> Generator[None]:
    """Within this context attention is computed eagerly where it was fused, and fused where it was eager.

    Raises:
        InapplicableError: the model has one attention function only.
    """
    configs = {id(config): config for config in configurations(model)}
    before = {key: vars(config).get(_NAME) for key, config in configs.items()}
    known = {name for name in before.values() if name in _OTHER}
    if not known:
        raise InapplicableError("its attention does not go through the interface of transformers")
    if "eager" in known and not getattr(model, "_supports_sdpa", False):
        raise InapplicableError("transformers knows no fused attention for it")
    try:
        for key, config in configs.items():
            if before[key] in _OTHER:
                vars(config)[_NAME] = _OTHER[before[key]]
        yield
    finally:
        for key, config in configs.items():
            if _NAME in vars(config):
                vars(config)[_NAME] = before[key]


def configurations(model: PreTrainedModel) -> list[Any]:
    """The configurations that modules of a model read, each once."""
    held = (vars(module).get("config") for module in model.modules())
    configs = {id(c): c for c in held if isinstance(c, PreTrainedConfig)}
    configs |= {id(c): c for config in list(configs.values()) for c in _inside(config)}
    return list(configs.values())


def check_kernels(model: PreTrainedModel, configs: Iterable[Any]) -> None:
    """Check that none of these configurations asks for an attention function that cannot be looked into.

    Raises:
        BindingError: one does, with what to do.
    """
    if any(vars(config).get(_NAME) == _UNSEEN for config in configs):
        raise BindingError(
            f"{type(model).__name__} computes attention by {_UNSEEN}, which compiles it: neither a trace nor "
            'hooks see into that. Call model.set_attn_implementation("sdpa"), or load the model with '
            'attn_implementation="sdpa"'
        )


def _inside(config: Any) -> list[Any]:
    """The configurations inside one, as of the towers of a model."""
    found = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    return [inner for one in found if isinstance(one, PreTrainedConfig) for inner in (one, *_inside(one))]
