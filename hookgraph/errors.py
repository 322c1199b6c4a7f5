"""The errors of hookgraph. Each message says what was given, why it cannot be done, and what to do.

```
HookGraphError
├── LocationError            a location that cannot exist: unknown name, dimension, layer or text
│   └── UnknownLocationError a location that this graph does not have, with the reason
├── InputError               inputs that cannot be run: text without a tokenizer, no tokens, ...
├── ShapeMismatchError       an edit, or a corrupt input, whose shape or dtype does not fit
├── MetricError              a metric that is not one number per example, or has no gradient
├── MemoryLimitError         a pass that does not fit in memory, however few rows it has
├── AlreadyAttachedError     the model is attached already
├── SubgraphError            a subgraph that cannot be injected: name taken, site unknown, overlap
├── BindingError             an invariant failed at bind: which, where, by how much
└── LoadError                a file that cannot be written, or is not what it should be: what was found
```
"""

from collections.abc import Iterable
from difflib import get_close_matches


class HookGraphError(Exception):
    """Base of every error that hookgraph raises for something a user did."""


class LocationError(HookGraphError):
    """A location that cannot exist: unknown name, dimension, layer or text."""


class UnknownLocationError(LocationError, KeyError):
    """A location that this graph, or run, does not have, with the reason or the nearest names."""

    def __str__(self) -> str:
        # KeyError would print the message as a quoted literal.
        return str(self.args[0]) if self.args else ""


class InputError(HookGraphError):
    """Inputs that cannot be run."""


class ShapeMismatchError(HookGraphError):
    """An edit, or a corrupt input, whose shape or dtype does not fit."""


class MetricError(HookGraphError):
    """A metric that does not return one number per example, or has no gradient at a location."""


class MemoryLimitError(HookGraphError):
    """A pass that does not fit in memory with the fewest rows that it can have."""


class AlreadyAttachedError(HookGraphError):
    """The model is attached already; one graph at a time may hold a model."""


class SubgraphError(HookGraphError):
    """A subgraph that cannot be injected: its name is taken, its site unknown, its locations overlap."""


class BindingError(HookGraphError):
    """A model that cannot be bound: what was looked for, what was found, by how much it failed."""


class LoadError(HookGraphError):
    """A file that cannot be written, or is not what it should be: what was expected and what was found."""


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """A clause naming the known names nearest to `name`, or all of them when there are few.

    >>> nearest("attn.zz", ["attn.z", "mlp.out"])
    'did you mean attn.z?'
    """
    names = sorted(set(known))
    close = get_close_matches(name, names, n=count, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if not names:
        return "there are none"
    return f"known: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
