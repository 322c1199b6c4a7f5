"""The inside of routed experts: neurons and outputs of every chosen expert of every token.

Experts that go through transformers' experts interface are dispatched by a name in their configuration. A
hooked module is given a copy of its configuration that names the function below; it computes what the
model's own eager function computes, in the same order. Other layers keep their kernels.
"""

from collections.abc import Iterator
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from hookgraph.binding.running.attention import TapsByCall, Turn, copied
from hookgraph.binding.running.passes import PassState
from hookgraph.hooks.taps import Tap

NAME: Final = "hookgraph"
_INTERIOR: Final = "_hookgraph_experts"


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds routed experts that go through the interface."""
    # Every such module is marked with whether its experts are spread over devices.
    return getattr(module, "_is_expert_parallel", None) is False and "config" in vars(module)


def expert_count(module: Any) -> int:
    """How many experts a module holds."""
    return int(module.num_experts)


@final
class ExpertsInterior:
    """The taps inside one experts module, by its calls in a pass, while a graph is attached."""

    def __init__(self, module: nn.Module, taps: TapsByCall, state: PassState) -> None:
        self._module = module
        self._turn = Turn(taps, state)
        self._state = state
        self._original = module.__dict__["config"]
        self._implementation: str = self._original._experts_implementation
        replaced = copied(self._original)
        replaced.__dict__["_experts_implementation_internal"] = NAME
        replaced.__dict__[_INTERIOR] = self
        module.__dict__["config"] = replaced

    def remove(self) -> None:
        """Give the module its own configuration back."""
        self._module.__dict__["config"] = self._original

    def __call__(
        self,
        module: nn.Module,
        hidden: Float[Tensor, "... d_model"],
        indices: Int[Tensor, "... choice"],
        weights: Float[Tensor, "... choice"],
    ) -> Float[Tensor, "... d_model"]:
        """What the experts give together, with every tap called on the way."""
        taps = self._turn.next()
        if not taps:
            own = type(module).forward.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
            function = ALL_EXPERTS_FUNCTIONS.get_interface(self._implementation, own)
            return function(module, hidden, indices, weights)
        rows = list(_rows(indices, expert_count(module)))
        neurons = [_neurons(module, expert, hidden[token]) for expert, token, _ in rows]
        neurons = self._tapped(taps.get("neurons"), neurons, rows, indices)
        outputs = [_outputs(module, row[0], n) for row, n in zip(rows, neurons, strict=True)]
        outputs = self._tapped(taps.get("outputs"), outputs, rows, indices)
        total = torch.zeros_like(hidden)
        for (_, token, choice), output in zip(rows, outputs, strict=True):
            total.index_add_(0, token, (output * weights[token, choice, None]).to(total.dtype))
        return total

    def _tapped(
        self, tap: Tap | None, parts: list[Tensor], rows: list["_Rows"], indices: Int[Tensor, "... choice"]
    ) -> list[Tensor]:
        """Call a tap on the rows of all experts, by token and choice."""
        if tap is None or not parts:
            return parts
        together = torch.cat(parts)
        whole = together.new_zeros(*indices.shape, together.shape[-1])
        places = (torch.cat([r[1] for r in rows]), torch.cat([r[2] for r in rows]))
        value = whole.index_put(places, together).unflatten(0, (self._state.batch, -1))
        new = tap(value)
        if new is value and not tap.tracks_gradient:
            return parts
        flat = new.flatten(0, 1)
        return [flat[token, choice] for _, token, choice in rows]


_Rows = tuple[int, Int[Tensor, "..."], Int[Tensor, "..."]]
"""An expert, and the tokens and choices that it is for."""


def _rows(indices: Int[Tensor, "... choice"], count: int) -> Iterator[_Rows]:
    """The rows of each expert that some token is sent to, in the order of the models' own code."""
    for expert in indices.unique().tolist():
        if expert < count:
            choice, token = torch.where(indices.mT == expert)
            yield expert, token, choice


def _neurons(module: Any, expert: int, given: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_mlp"]:
    into = "gate_up_proj" if module.has_gate else "up_proj"
    before = _projected(module, into, expert, given)
    return module._apply_gate(before) if module.has_gate else module.act_fn(before)


def _outputs(module: Any, expert: int, neurons: Float[Tensor, "... d_mlp"]) -> Float[Tensor, "... d_model"]:
    output = _projected(module, "down_proj", expert, neurons)
    return module.post_expert_norm(output) if module.has_post_expert_norm else output


def _projected(module: Any, name: str, expert: int, given: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    if not module.is_transposed:
        return linear(given, weight, bias)
    return given @ weight if bias is None else given @ weight + bias


def experts(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The experts function of hooked modules: finds the module's interior and calls it."""
    return module.config.__dict__[_INTERIOR](module, *args, *kwargs.values())


ExpertsInterface.register(NAME, experts)
