"""The inside of attention: queries, keys, values, scores, pattern and z of the layers that ask for it.

A hooked attention module is given a copy of its configuration that names the attention function below;
it calls what the model itself would have called. Only where scores or pattern are asked for is that the
model's own eager function, with its softmax intercepted; every other layer keeps its fused kernel.
Nothing outside the hooked modules changes, so other models, in other threads too, are not affected.
"""

import importlib
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hookgraph.binding.data.anchors import Anchor, Role
from hookgraph.binding.running.caching import Edited, NewStates
from hookgraph.binding.running.passes import PassState
from hookgraph.binding.running.sharing import MASKED, Attention, SharedPast
from hookgraph.errors import BindingError
from hookgraph.hooks.masking import masked_cells, masked_score
from hookgraph.hooks.taps import Tap
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location

NAME: Final = "hookgraph"
_INTERIOR: Final = "_hookgraph_interior"
_SOFTMAX: Final = frozenset({torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax})


TapsByCall = Mapping[int, Mapping[Role, Tap]]


@final
class Turn:
    """Which taps the next call of a module is for."""

    def __init__(self, taps: TapsByCall, state: PassState) -> None:
        self._taps = taps
        self._state = state
        self._only = taps.get(0) if set(taps) == {0} and not state.counts else None
        self._pass, self._calls = -1, 0

    def next(self) -> Mapping[Role, Tap]:
        """The taps for this call."""
        if self._only is not None:
            return self._only
        if self._pass != self._state.number:
            self._pass, self._calls = self._state.number, 0
        self._calls += 1
        return self._taps.get(self._calls - 1, {})


@final
class Interior:
    """The taps inside one attention module, by its calls in a pass, while a graph is attached."""

    def __init__(
        self,
        module: nn.Module,
        taps: TapsByCall,
        anchors: Mapping[Role, Anchor],
        state: PassState,
        *,
        watch: bool = False,
    ) -> None:
        self._module = module
        keeping = ("states", "shared")
        self._kept: frozenset[Role] = frozenset(role for role, a in anchors.items() if a.kept in keeping)
        self._shared: frozenset[Role] = frozenset(role for role, a in anchors.items() if a.kept == "shared")
        self._taps: Mapping[Role, Tap] | None = None
        self._edited: dict[Location, Edited] = {}
        self.seen: dict[Role, bool] = {}
        """Whether keys and values were the very tensors that a cache handed back, when last watched."""
        self.given: dict[Role, Tensor] | None = {} if watch else None
        """The keys and values that attention was given, while watched."""
        self._turn = Turn(taps, state)
        self._state = state
        self._original = module.__dict__["config"]
        self._implementation: str = self._original._attn_implementation
        self._eager = _function(next(iter(anchors.values())).eager)
        module.__dict__["config"] = _naming(self._original, self)
        looks = watch or any("key" in inside or "value" in inside for inside in taps.values())
        self._states = NewStates(module, self._kept, self._change, self._end) if looks else None

    def remove(self) -> None:
        """Give the module its own configuration back."""
        self._module.__dict__["config"] = self._original
        if self._states is not None:
            self._states.remove()

    def _begin(self) -> Mapping[Role, Tap]:
        """The taps for this call of the module: the cache is reached before attention."""
        if self._taps is None:
            self._taps = self._turn.next()
        return self._taps

    def _end(self) -> None:
        self._taps = None

    def _change(self, role: Role, raw: Tensor) -> Tensor:
        return tap_heads(self._begin().get(role), raw)

    def _tap_states(self, role: Role, raw: Tensor, query: Tensor) -> Tensor:
        """Call the tap on keys or values where the cache did not."""
        states, tap = self._states, self._begin().get(role)
        if states is None:
            return raw
        self.seen[role] = raw is states.returned.get(role)
        if self.given is not None:
            self.given[role] = raw
        if tap is None or states.cache is None:
            return _tap_shared(tap, raw) if tap is not None and role in self._shared else tap_heads(tap, raw)
        if role not in self._kept:
            if Dimension.POS not in tap.location.type.dims:  # the positions of another stack, all of them
                return tap_heads(tap, raw)
            return self._edited.setdefault(tap.location, Edited()).tap(tap, raw, states, query.shape[2])
        if states.returned and not self.seen[role]:
            raise BindingError(f"{tap.location}: attention was not given what the cache handed back")
        return raw

    def __call__(
        self,
        module: nn.Module,
        query: Float[Tensor, "batch head pos d_head"],
        key: Float[Tensor, "batch kv_head key_pos d_head"],
        value: Float[Tensor, "batch kv_head key_pos ..."],
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What the model's attention function returns, with every tap called on the way."""
        taps = self._begin()
        query = tap_heads(taps.get("query"), query)
        key = self._tap_states("key", key, query)
        value = self._tap_states("value", value, query)
        self._end()
        past = self._state.past if self._state.past and self._state.past.holds(key) else None
        if "scores" in taps or "pattern" in taps:
            if past is not None:
                key, value = past.wholes(key, value)
            fused = self._implementation != "eager"  # which reads the want of a mask as it stands
            additive = _additive_mask(module, query, key, attention_mask, kwargs, fused=fused)
            with _SoftmaxTaps(taps.get("scores"), taps.get("pattern")) as softmax:
                output = self._eager(module, query, key, value, additive, *args, **kwargs)
            softmax.check(module)
        else:
            function = ALL_ATTENTION_FUNCTIONS.get_interface(self._implementation, self._eager)
            if past is not None:
                function = _given_past(past, self._implementation, function)
            output = function(module, query, key, value, attention_mask, *args, **kwargs)
        tap = taps.get("out")
        if tap is None:
            return output
        if isinstance(output, tuple):
            return (tap(output[0]), *output[1:])
        return tap(output)


@contextmanager
def sharing(
    modules: Mapping[str, nn.Module], anchors: Iterable[Anchor], past: SharedPast, state: PassState
) -> Generator[None]:
    """Within this context attention is given its past by `past`; where there are taps, by the interior."""
    lent: list[tuple[nn.Module, Any]] = []
    state.past = past
    try:
        for anchor in anchors:
            module = modules[anchor.module]
            own = module.__dict__["config"]
            if _INTERIOR not in own.__dict__:
                eager = _function(anchor.eager)
                function = ALL_ATTENTION_FUNCTIONS.get_interface(own._attn_implementation, eager)
                lent.append((module, own))
                shared = _given_past(past, own._attn_implementation, function)
                module.__dict__["config"] = _naming(own, partial(_untapped, past, function, shared))
        yield
    finally:
        state.past = None
        for module, own in lent:
            module.__dict__["config"] = own


def _untapped(
    past: SharedPast,
    function: Attention,
    shared: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    return (shared if past.holds(key) else function)(module, query, key, *rest, **kwargs)


def _given_past(past: SharedPast, implementation: str, function: Attention) -> Attention:
    """The attention function, given keys and values of all positions, once for all copies if it can be."""
    return partial(past.attend if implementation in MASKED else past.repeat, function)


def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The attention function of hooked modules: calls what the module's configuration holds."""
    return module.config.__dict__[_INTERIOR](module, *args, **kwargs)


AttentionInterface.register(NAME, attention)


def copied(config: Any) -> Any:
    """As `copy.copy` makes it. The protocol of that takes longer, and each pass copies for each layer."""
    result = object.__new__(type(config))
    result.__dict__.update(config.__dict__)
    return result


@final
class _Named(str):
    """The name of the implementation that a module is told to use, which is looked up as the function above.

    Modules compare it: those with sparse attention make their mask for some implementations only.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(NAME)

    def __eq__(self, other: object) -> bool:
        return (type(other) is str and other == NAME) or str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other


def _naming(config: Any, function: Callable[..., Any]) -> Any:
    """A copy of a configuration that leads to the attention function above, which calls this one."""
    result = copied(config)
    result.__dict__["_attn_implementation_internal"] = _Named(config._attn_implementation or "eager")
    result.__dict__[_INTERIOR] = function
    return result


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def tap_heads(tap: Tap | None, raw: Tensor) -> Tensor:
    """Call a tap on heads that lie before positions."""
    if tap is None:
        return raw
    value = raw.transpose(1, 2)
    new = tap(value)
    return raw if new is value and not tap.tracks_gradient else new.transpose(1, 2)


def _tap_shared(tap: Tap, raw: Tensor) -> Tensor:
    """Call a tap on heads that later layers are given too: they are changed for all of them, in place."""
    if not tap.edits and not tap.tracks_gradient:
        return tap_heads(tap, raw)
    return raw.copy_(tap(raw.transpose(1, 2).clone()).transpose(1, 2))


@final
class _SoftmaxTaps(TorchFunctionMode):
    """Calls the taps on what the first softmax inside reads and returns."""

    def __init__(self, scores: Tap | None, pattern: Tap | None) -> None:
        super().__init__()
        self._scores, self._pattern, self._count = scores, pattern, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _SOFTMAX:
            return func(*args, **kwargs)
        self._count += 1
        scores = args[0] if args else kwargs.pop("input")
        if self._scores is not None and self._scores.edits:
            # A copy, because what is masked must be known after an edit in place too.
            scores = kept_masked(scores, self._scores(scores.clone()))
        elif self._scores is not None:
            scores = self._scores(scores)
        pattern = func(scores, *args[1:], **kwargs)
        return pattern if self._pattern is None else self._pattern(pattern)

    def check(self, module: nn.Module) -> None:
        """Raise unless there was exactly one softmax."""
        if self._count != 1:
            raise BindingError(
                f"the eager attention of {type(module).__name__} computed {self._count} softmaxes where one "
                "was expected; its scores and pattern cannot be hooked"
            )


def kept_masked(before: Tensor, after: Tensor) -> Tensor:
    """Edited scores with masked cells as they were: a softmax over freed cells would see the future."""
    return torch.where(masked_cells(before), before, after)


def _additive_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    kwargs: Mapping[str, Any],
    *,
    fused: bool,
) -> Float[Tensor, "batch one pos key_pos"]:
    """The mask as eager attention adds it: fused kernels are given none for causal, or a boolean one.

    Not every eager function can do without, and none can do with a row of nothing but minus infinity.
    """
    lowest = masked_score(query.dtype)
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        shape = (1, 1, query.shape[2], key.shape[2])
        if not fused or not causal or query.shape[2] == 1:
            return query.new_zeros(()).expand(shape)
        return torch.full(shape, lowest, dtype=query.dtype, device=query.device).triu(1)
    if mask.dtype != torch.bool:
        return mask.clamp(min=lowest) if mask.is_floating_point() else mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
