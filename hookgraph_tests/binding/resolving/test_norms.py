import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hookgraph.binding.resolving.norms import Norm, find_norm
from hookgraph.binding.running.normalising import scale_of
from hookgraph.binding.tracing.trace import Call
from hookgraph.binding.tracing.values import Slot, Value

WIDTH = 12


def call_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> Call:
    """One traced call of a module on a tensor."""
    x = Value(0, "add", (), torch.randn(2, 3, WIDTH).to(dtype))
    with torch.no_grad():
        out = module(x.tensor)
    values = out if isinstance(out, tuple) else (out,)
    slots: list[Slot] = list(range(len(out))) if isinstance(out, tuple) else [None]
    found = [(s, t) for s, t in zip(slots, values, strict=True) if t is not None]
    outputs = {s: Value(1 + i, "mul", (x,), t) for i, (s, t) in enumerate(found)}
    return Call(0, "norm", module, 0, (), 1, {0: x}, outputs, 2)


def shaken(module: nn.Module) -> nn.Module:
    """The module with gains and biases that matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


class Upcasting(nn.Module):
    """A norm of unusual make: its epsilon is not called so, it computes in single precision."""

    def __init__(self, tiny: float) -> None:
        super().__init__()
        self.tiny = tiny
        self.g = nn.Parameter(torch.ones(WIDTH))
        self.dropout = 0.05

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.tiny)).to(x.dtype) * self.g


NORMS: dict[str, tuple[nn.Module, bool, float]] = {
    "layer norm": (nn.LayerNorm(WIDTH), True, 1e-5),
    "layer norm, large epsilon": (nn.LayerNorm(WIDTH, eps=1e-3), True, 1e-3),
    "layer norm, tiny epsilon": (nn.LayerNorm(WIDTH, eps=1e-12), True, 1e-12),
    "layer norm without bias": (nn.LayerNorm(WIDTH, bias=False), True, 1e-5),
    "layer norm without gain": (nn.LayerNorm(WIDTH, elementwise_affine=False), True, 1e-5),
    "rms norm": (nn.RMSNorm(WIDTH, eps=1e-6), False, 1e-6),
    "rms norm of Llama": (LlamaRMSNorm(WIDTH, eps=1e-5), False, 1e-5),
    "rms norm of Gemma, gain 1 + w": (Gemma2RMSNorm(WIDTH, eps=1e-6), False, 1e-6),
    "rms norm, epsilon under another name": (Upcasting(1e-4), False, 1e-4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("module", "centred", "epsilon"), NORMS.values(), ids=NORMS)
def test_a_norm_is_recognised_by_what_it_does(
    module: nn.Module, centred: bool, epsilon: float, dtype: torch.dtype
):
    norm = find_norm(call_of(shaken(module).to(dtype), dtype))
    assert isinstance(norm, Norm)
    assert (norm.centred, norm.epsilon, norm.slot) == (centred, epsilon, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_norm_in_half_precision_is_recognised(dtype: torch.dtype):
    norm = find_norm(call_of(LlamaRMSNorm(WIDTH, eps=1e-5).to(dtype), dtype))
    assert norm is not None
    assert not norm.centred


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.layer_norm(x, (WIDTH,)), x


class Narrow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,))[..., :4]


OTHERS: dict[str, nn.Module] = {
    "linear": nn.Linear(WIDTH, WIDTH),
    "identity": nn.Identity(),
    "dropout": nn.Dropout(0.1).eval(),
    "nonlinearity": nn.GELU(),
    "bounded nonlinearity": nn.Tanh(),
    "softmax": nn.Softmax(-1),
    "norm inside another module": nn.Sequential(nn.LayerNorm(WIDTH)),
    "two outputs": Two(),
    "another shape": Narrow(),
}


@pytest.mark.parametrize("module", OTHERS.values(), ids=OTHERS)
def test_what_is_no_norm_is_not_taken_for_one(module: nn.Module):
    assert find_norm(call_of(module)) is None


@pytest.mark.parametrize(("module", "centred", "epsilon"), NORMS.values(), ids=NORMS)
def test_the_scale_explains_what_the_norm_returns(module: nn.Module, centred: bool, epsilon: float):
    module = shaken(module).double()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64) * 10 ** torch.linspace(-3, 1, 3)[None, :, None]
    s = scale_of(x, centred=centred, epsilon=epsilon)
    assert s.shape == (2, 3, 1)
    with torch.no_grad():
        bias = module(torch.zeros_like(x))
        gain = (module(x) - bias) / ((x - x.mean(-1, keepdim=True) if centred else x) * s)
    torch.testing.assert_close(gain, gain[:1, :1].expand_as(gain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_the_scale_is_computed_in_at_least_single_precision(dtype: torch.dtype, expected: torch.dtype):
    assert scale_of(torch.ones(1, 1, 4, dtype=dtype), centred=False, epsilon=0.0).dtype == expected


class Telling(nn.Module):
    """A norm that returns its result and more, and has a part without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.g = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.layer_norm(x, (WIDTH,)) * self.g, None


def test_a_norm_may_return_more_than_its_result():
    found = find_norm(call_of(Telling()))
    assert found is not None
    assert found.centred
    assert found.returned == 0
