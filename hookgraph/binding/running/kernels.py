"""The attention functions that a model can be given: its own eager one, and the fused one of torch."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from transformers import PreTrainedModel

_NAME: Final = "_attn_implementation_internal"
_OTHER: Final = {"sdpa": "eager", "eager": "sdpa"}


class InapplicableError(Exception):
    """Something is not to be asked of this model; the text is the reason."""


@contextmanager
def other_kernel(model: PreTrainedModel) -> Generator[None]:
    """Within this context attention is computed eagerly where it was fused, and fused where it was eager.

    Raises:
        InapplicableError: the model has one attention function only.
    """
    configs = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}
    configs |= {id(c): c for config in list(configs.values()) for c in _inside(config)}
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


def _inside(config: Any) -> list[Any]:
    """The configurations inside one, as of the towers of a model."""
    found = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    return [inner for one in found if one is not None for inner in (one, *_inside(one))]
