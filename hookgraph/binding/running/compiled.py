"""Compiled models: while they are looked into, their modules run as they are written.

Hooks would be compiled with the model, anew for each graph, and those inside attention not at all.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager

from torch import nn


@contextmanager
def as_written(modules: Iterable[nn.Module]) -> Generator[None]:
    """Within this context what `module.compile()` compiled is left aside, and afterwards used again."""
    compiled = [(m, m._compiled_call_impl) for m in modules if m._compiled_call_impl is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
