"""Notice which parts of a pass a backward pass will run again, whoever had them checkpointed."""

import sys
from types import FrameType
from typing import Final

import torch
from torch.utils import checkpoint

_REENTRANT: Final = checkpoint.CheckpointFunction.forward.__code__


def is_checkpointed() -> bool:
    """Whether what runs now runs inside a checkpoint of PyTorch's, reentrant or not.

    One that is not keeps tensors in its own way; a reentrant one runs without gradients.
    """
    keeping = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
    if keeping is not None:
        return keeping[0].__module__ == checkpoint.__name__
    return not torch.is_grad_enabled() and _is_running_reentrant()


def _is_running_reentrant() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _REENTRANT:
        frame = frame.f_back
    return frame is not None
