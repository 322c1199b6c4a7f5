"""Which architectures there are, and a tiny random instance of each."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hookgraph.binding.proving.twins import kernels_of
from hookgraph_tests.tiny.configs import tiny_config

TABLES: Final = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "base": "MODEL_MAPPING_NAMES",
}
"""The mappings of transformers' automatic classes."""

_LISTENERS: Final = "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"

_DECODERS: Final = ("LMHeadModel", "ModelWithLMHead", "ForCausalLM", "Decoder")


def architectures(table: str) -> dict[str, str]:
    """Every architecture of a table with the name of its class."""
    names: dict[str, str | Sequence[str]] = getattr(modeling_auto, TABLES[table])
    return {kind: found if isinstance(found, str) else found[0] for kind, found in names.items()}


def swept(table: str) -> dict[str, str]:
    """The architectures of a table that the sweep tries: of the models without a head only the new ones.

    The others have a class with a head in another table, around the same layers, and no part beside it that
    listens; or they are what such a model has inside for its text.
    """
    found = architectures(table)
    if table != "base":
        return found
    listeners: set[str] = set(getattr(modeling_auto, _LISTENERS))
    known = {name for other in TABLES if other != "base" for name in architectures(other)}
    bodies = set(map(_text_of, sorted(known)))
    return {name: cls for name, cls in found.items() if name in listeners or name not in known | bodies}


@cache
def _text_of(architecture: str) -> str:
    """The architecture that one has inside for its text; empty where it is that itself."""
    inside = CONFIG_MAPPING[architecture].sub_configs.get("text_config")
    return getattr(inside, "model_type", "")


def build(table: str, architecture: str, *, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A tiny random model, in evaluation mode. No gain is 1, no bias 0 and no matrix close to 0.

    Args:
        table: one of `TABLES`.
        architecture: the `model_type` of its configuration.
        attention: the implementation of attention; by default the model's own choice.
        seed: of the weights.
    """
    name = architectures(table)[architecture]
    cls = getattr(transformers, name)
    config = _for_class(tiny_config(CONFIG_MAPPING[architecture]), cls)
    if table == "causal" and name.endswith(_DECODERS):
        for part in (config, *_parts(config)):
            if hasattr(part, "is_decoder"):
                part.is_decoder = True
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls._from_config(config, dtype=torch.float32, **options).eval()
    _roughen(model, torch.Generator().manual_seed(seed))
    return model


def _for_class(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """The configuration, or the one inside it that the class is made of."""
    wanted = cls.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in _parts(config) if isinstance(part, wanted)), config)


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    found = [getattr(config, name, None) for name in (config.sub_configs or {})]
    return [part for part in found if isinstance(part, PreTrainedConfig)]


def _is_gain(parameter: Tensor) -> bool:
    """Whether it is one number for each feature, the same for all, and lies along them: nothing it is divided
    by may come close to 0.
    """
    first = float(parameter.flatten()[0]) if parameter.numel() else 0.0
    return (
        max(parameter.shape, default=0) == parameter.numel()
        and first != 0
        and bool((parameter == first).all())
    )


@torch.no_grad()
def _roughen(model: nn.Module, generator: torch.Generator) -> None:
    kernels = kernels_of(model)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.ndim < 2 or _is_gain(parameter):
            parameter.copy_(parameter.nan_to_num(0.0, 0.0, 0.0) + 0.1 * noise)
            continue
        fan = kernels.get(id(parameter), parameter.shape[-1])
        if not float(parameter.std()) >= fan**-0.5:  # nor if it is not a number
            parameter.copy_(noise * fan**-0.5)
    for table in model.buffers():  # codebooks, and experts by token: of zeros all choices would be alike
        if table.ndim < 2 or table.shape[0] == 1 or table.any():
            continue
        if table.is_floating_point():
            table.copy_(torch.randn(table.shape, generator=generator))
        elif table.dtype == torch.long:
            table.copy_(torch.arange(table.numel()).view(table.shape) % 2)
