"""From the name of a model to the model: a local folder, or a name on the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hookgraph.errors import LoadError

_KINDS: tuple[tuple[Any, Any], ...] = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
    (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    (AutoModel, MODEL_MAPPING),
)
"""What a model may be loaded as, the first one that its configuration allows."""

_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""What transformers raises for a folder or a name that it cannot load."""


def load_model(name: str | Path) -> PreTrainedModel:
    """The model in a local folder or of this name on the hub, ready to evaluate.

    It is loaded as what it was saved as; where that is not known, as a causal, a masked or a
    sequence-to-sequence language model, or without a head, the first of these that exists.

    Raises:
        LoadError: there is no such model, or it cannot be loaded, with the reason.
    """
    place = _place(name)
    try:
        return _loader(AutoConfig.from_pretrained(place))(place).eval()
    except _FAILURES as error:
        raise LoadError(f"cannot load a model from {place!r}: {_reason(place, error)}") from error


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder or of this name on the hub.

    Raises:
        LoadError: there is none, or it cannot be loaded, with the reason.
    """
    place = _place(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except _FAILURES as error:
        raise LoadError(f"cannot load a tokenizer from {place!r}: {_reason(place, error)}") from error
    # Where there are no files, transformers makes a tokenizer without a vocabulary.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise LoadError(f"cannot load a tokenizer from {place!r}: it has no vocabulary there")
    return tokenizer


def _place(name: str | Path) -> str:
    """A folder by its whole path, so that a message says which `.` it was; a name on the hub as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _loader(config: PreTrainedConfig) -> Callable[[str | Path], PreTrainedModel]:
    """What loads a model as what it was saved as, or as the first kind that its configuration allows."""
    possible = [(auto, known.get(type(config), None)) for auto, known in _KINDS]
    possible = [(auto, found) for auto, found in possible if found is not None]
    saved_as = tuple(config.architectures or ())
    for auto, found in possible:
        if found.__name__ in saved_as:
            return auto.from_pretrained
    return possible[0][0].from_pretrained if possible else AutoModel.from_pretrained


def _reason(place: str, error: Exception) -> str:
    """The first line of what transformers says, and what it does not say of a name that is no folder."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    nowhere = "" if Path(place).exists() else " (there is no such folder here)"
    return f"{lines[0].strip()}{nowhere}"
