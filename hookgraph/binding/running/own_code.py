"""The inside of attention that a model computes by code of its own, in the functions of PyTorch it calls.

While a module runs whose attention is looked at, its products, its softmax and its fused attention are
watched, in this thread only; the first tells which one is meant by counting. Where scores or pattern of a
fused attention are asked for, it is computed step by step instead.
"""

from collections.abc import Callable, Mapping, Set
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.overrides import TorchFunctionMode

from hookgraph.binding.data.anchors import Anchor, Role, Way
from hookgraph.binding.data.layouts import arranged, restored
from hookgraph.binding.data.views import Axes, View
from hookgraph.binding.running.attention import TapsByCall, Turn, kept_masked, tap_heads
from hookgraph.binding.running.caching import NewStates
from hookgraph.binding.running.mechanisms import aside, needs_state
from hookgraph.binding.running.modes import WhileRunning
from hookgraph.binding.running.passes import PassState
from hookgraph.binding.tracing.operations import RESULT, SEEN_THROUGH, Kind, Operand, form_of, fused_arguments
from hookgraph.errors import BindingError
from hookgraph.hooks.masking import masked_score
from hookgraph.hooks.taps import Tap

_STATES = frozenset[Role]({"key", "value"})
_NAMES: Final[Mapping[Kind, str]] = {
    "product": "matrix product",
    "softmax": "softmax",
    "fused": "scaled_dot_product_attention",
    "split": "split",
    "weighing": "multiplication with a parameter",
}
_ANEW: Final = "bind the model on an example like these inputs, bind(model, example=...)"

_INSIDE = frozenset[Role]({"scores", "pattern"})


@final
class OwnCode:
    """The taps inside one module that computes attention by code of its own, by its calls in a pass.

    Args:
        module: the module.
        taps: what is called, by call of the module and by tensor.
        anchors: how each tensor is reached.
        state: the pass.
        watch: whether to look at keys and values without taps.
    """

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
        self._anchors = anchors
        self._turn, self._state = Turn(taps, state), state
        self._watch = watch
        self.seen: dict[Role, bool] = {}
        """Whether keys and values were those that a cache handed back, when last watched."""
        self._kept: frozenset[Role] = frozenset(role for role, a in anchors.items() if a.kept == "states")
        looks = watch or bool(_STATES & anchors.keys())
        self._states = NewStates(module, self._kept, self._change, lambda: None) if looks else None
        self._running = WhileRunning(module, self._watching, self._left)

    def remove(self) -> None:
        """Stop looking at the module."""
        self._running.remove()
        if self._states is not None:
            self._states.remove()

    def _watching(self) -> "_Watching":
        return _Watching(self._turn.next(), self._anchors, self._state, self._tap)

    def _left(self, mode: "_Watching", output: object) -> None:
        if output is not None:  # it did not raise
            mode.check(type(self._module).__name__, self._kept if self._is_cached else frozenset[Role]())

    @property
    def _is_cached(self) -> bool:
        return self._states is not None and self._states.cache is not None

    def _change(self, role: Role, raw: Tensor) -> Tensor:
        """Call the tap on what a cache is about to take, heads before positions."""
        return aside(tap_heads, self._state, self._running.current.taps.get(role), raw)

    def _tap(self, role: Role, view: View, raw: Tensor) -> Tensor:
        """Call the tap on a tensor, unless it was called as the cache took what it is made of."""
        tap, anchor = self._running.current.taps.get(role), self._anchors[role]
        if self._watch and role in _STATES and self._is_cached:
            self.seen[role] = self._is_handed_back(role, view, raw)
        if tap is None or (role in self._kept and self._is_cached):
            return raw
        masks = role == "scores" and tap.edits
        # What is masked must be known after an edit in place too; what the model overwrites is kept from it.
        before = raw.clone() if masks or anchor.overwritten else raw
        shaped = before if view is None else view.get(before)
        value = arranged(anchor.layout, shaped, self._state.batch if needs_state(anchor) else 0)
        new = tap(value)
        if new is value and not tap.tracks_gradient:
            return raw
        if masks:
            new = kept_masked(raw if view is None else view.get(raw), new)
        new = restored(anchor.layout, new, shaped)
        result = new if view is None else view.put(raw, new)
        return result.clone() if anchor.overwritten else result

    def _is_handed_back(self, role: Role, view: View, raw: Tensor) -> bool:
        """Whether attention computes with what the cache handed back, but for casts and the order of axes."""
        states = None if self._states is None else self._states.returned.get(role)
        value = raw if view is None else view.get(raw)
        if states is None or states.ndim != 4:
            return False
        given = states.transpose(1, 2)
        return given.shape == value.shape and bool(torch.equal(given.to(value), value))


@final
class _Watching(TorchFunctionMode):
    """Hands the tensors that anchors name to `change`, and lets the model go on with what it returns."""

    def __init__(
        self,
        taps: Mapping[Role, Tap],
        anchors: Mapping[Role, Anchor],
        state: PassState,
        change: Callable[[Role, View, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.taps = taps
        self._state, self._change = state, change
        self._ways = {role: [way.operand for way in anchor.ways] for role, anchor in anchors.items()}
        self._places: dict[tuple[Kind, int], list[tuple[Role, Way]]] = {}
        for role, anchor in anchors.items():
            for way in anchor.ways:
                self._places.setdefault((way.operand.kind, way.operand.nth), []).append((role, way))
        self._count: dict[Kind, int] = {}
        self._reached: dict[Role, Operand] = {}
        self._odd: dict[Role, tuple[int, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SEEN_THROUGH and not self._state.aside:
            with self:
                return SEEN_THROUGH[func](*args, **kwargs)
        form = None if self._state.aside else form_of(func, args, kwargs)
        if form is None:
            return func(*args, **kwargs)
        nth = self._count.get(form.kind, 0)
        self._count[form.kind] = nth + 1
        here = self._places.get((form.kind, nth), ())
        if not here:
            return func(*args, **kwargs)
        operands = list(form.operands(args, kwargs))
        for role, way in here:
            place = way.operand.place
            if place >= 0:
                operands[place] = self._changed(role, way, operands[place])
        args, kwargs = form.replaced(args, kwargs, operands)
        if form.kind == "fused" and not self.taps.keys().isdisjoint(_INSIDE):
            inside: dict[Role, Way] = {role: way for role, way in here if role in self.taps}
            result = self._step_by_step(inside, **fused_arguments(args, kwargs))
        else:
            result = func(*args, **kwargs)
        for role, way in here:
            if way.operand.place == RESULT:
                result = self._changed(role, way, result)
        return result

    def _changed(self, role: Role, way: Way, raw: Tensor) -> Tensor:
        axes = way.view.axes if isinstance(way.view, Axes) else 4
        if raw.ndim != axes and way.operand.kind != "weighing":  # something else: `check` says so
            self._odd[role] = (raw.ndim, axes)
            return raw
        self._reached[role] = way.operand
        return self._change(role, way.view, raw)

    def _step_by_step(
        self,
        inside: Mapping[Role, Way],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What a fused attention computes, with its scores and its pattern on the way."""
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        lowest = masked_score(scores.dtype)
        if is_causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, lowest)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, lowest)
        elif attn_mask is not None:
            scores = scores + attn_mask.clamp(min=lowest)
        if "scores" in inside:
            scores = self._changed("scores", inside["scores"], scores)
        pattern = scores.softmax(-1)
        if "pattern" in inside:
            pattern = self._changed("pattern", inside["pattern"], pattern)
        return dropout(pattern, dropout_p) @ value

    def check(self, name: str, elsewhere: Set[Role]) -> None:
        """Raise unless everything was reached, but for what is reached `elsewhere`, and nothing more."""
        for role, tap in self.taps.items():
            why = "" if role in elsewhere else self._why_not(role)
            if why:
                raise BindingError(
                    f"{name} does not compute {tap.location} as it did when it was bound: {why}"
                )

    def _why_not(self, role: Role) -> str:
        """Why a tensor was not what it was said to be, and what to do; empty if it was."""
        ways = [self._reached[role]] if role in self._reached else self._ways[role]
        used = next((x for x in ways if self._count.get(x.kind)), None)
        if used is None:
            kinds = " or ".join(_NAMES[x.kind] for x in ways)
            return f"it calls no {kinds} now, as with another attn_implementation: bind it as it is used"
        number = self._count[used.kind]
        told = f"it calls {_NAMES[used.kind]} {number} times, not {used.of}"
        if number > used.of:
            return f"{told}: remove hooks of others that compute inside it; without such {_ANEW}"
        if number < used.of:
            return f"{told}: {_ANEW}"
        if role not in self._reached:
            axes, expected = self._odd[role]
            return f"it has {axes} axes there, not {expected}: {_ANEW}"
        return ""
