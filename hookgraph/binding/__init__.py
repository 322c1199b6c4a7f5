"""Bind a HuggingFace model: trace it once, resolve every location, prove each, freeze the result."""

from hookgraph.binding.binding import bind, check
from hookgraph.binding.family import Family
from hookgraph.binding.huggingface import HuggingFaceBinding

__all__ = ["Family", "HuggingFaceBinding", "bind", "check"]
