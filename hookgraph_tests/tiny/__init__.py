"""A tiny random instance of any architecture of the installed transformers, built offline.

    model = build("causal", "llama")
    inputs = example_of(model)          # None where the model can be run on made-up tokens alone

A configuration is shrunk field by field: `rules` says how small a field of that name becomes, `overrides`
what an architecture needs beyond its rules. Both are data.
"""

from hookgraph_tests.tiny.inputs import example_of
from hookgraph_tests.tiny.models import TABLES, architectures, build, swept

__all__ = ["TABLES", "architectures", "build", "example_of", "swept"]
