"""Bind a HuggingFace model: trace it once, resolve every location, prove each, freeze the result."""

from hookgraph.binding.binding import bind, check
from hookgraph.binding.huggingface import HuggingFaceBinding

__all__ = ["HuggingFaceBinding", "bind", "check"]
