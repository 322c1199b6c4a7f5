"""What a model is run on, where made-up tokens, a picture or a sound alone do not do."""

from typing import Any

from transformers import PreTrainedModel


def example_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """None."""
    return None
