"""Models run as they are written while they are looked into: not compiled, and no layer in one kernel.

Hooks would be compiled with the model, anew for each graph, and those inside attention not at all; what was
compiled before calls none. And PyTorch computes an encoder layer of its own, or its attention, in one call
where no gradient is asked for.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Final

import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode

from hookgraph.binding.running.modes import WhileRunning
from hookgraph.hooks.handles import installed

_IN_ONE_CALL: Final = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules of PyTorch that do not always call their parts."""


@contextmanager
def as_written(modules: Iterable[nn.Module]) -> Generator[None]:
    """Within this context what `module.compile()` compiled is left aside, and afterwards used again; what
    `torch.compile` returned calls what it was given; and modules of PyTorch call their parts.
    """
    every = list(modules)
    compiled = [(m, m._compiled_call_impl) for m in every if m._compiled_call_impl is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        # With some mode on, in this thread, they take it that somebody looks at their functions.
        with (
            torch.compiler.set_stance("force_eager"),
            installed(
                *(
                    partial(WhileRunning, m, BaseTorchFunctionMode)
                    for m in every
                    if isinstance(m, _IN_ONE_CALL)
                )
            ),
        ):
            yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
