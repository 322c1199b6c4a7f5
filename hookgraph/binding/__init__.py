"""Bind a HuggingFace model: trace it once, resolve every location, prove each, freeze the result."""

from hookgraph.binding.binding import bind, check
from hookgraph.binding.data.family import Family
from hookgraph.binding.running.huggingface import HuggingFaceBinding

__all__ = ["Family", "HuggingFaceBinding", "bind", "check"]
