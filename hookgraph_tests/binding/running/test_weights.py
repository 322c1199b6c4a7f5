import pytest
import torch
from einops import einsum
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hookgraph.binding.running.weights import affine_map
from hookgraph.errors import UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import (
    ATTN_IN,
    ATTN_K,
    ATTN_K_PRE,
    ATTN_Q,
    ATTN_Q_PRE,
    ATTN_RESULT,
    ATTN_V,
    ATTN_Z,
    EMBED,
    FINAL_LN_OUT,
    MLP_IN,
    MLP_POST,
    MLP_PRE,
)
from hookgraph.ontology.weights import (
    W_E,
    W_K,
    W_O,
    W_Q,
    W_U,
    W_V,
    W_gate,
    W_in,
    W_out,
    WeightType,
    b_gate,
    b_in,
    b_K,
    b_O,
    b_out,
    b_Q,
    b_U,
    b_V,
)
from hookgraph_tests.families import FAMILIES, LAYERS, VOCABULARY, bound, layers_of, model_of, tokens

IDS = tokens()
GATED = ("llama", "gemma2")
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def graph_of(family: str) -> HookGraph:
    return bound(family, torch.float64)


def returned(module: nn.Module, graph: HookGraph) -> Tensor:
    """What a module returns in a plain pass, seen without hookgraph."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    try:
        with torch.no_grad():
            model_of(graph)(input_ids=IDS)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_queries_keys_and_values_are_what_their_weights_make_of_the_input(family: str, layer: int):
    graph = graph_of(family)
    rotary = family != "gpt2"
    made = (
        (ATTN_Q_PRE if rotary else ATTN_Q, W_Q, b_Q),
        (ATTN_K_PRE if rotary else ATTN_K, W_K, b_K),
        (ATTN_V, W_V, b_V),
    )
    run = graph.run(IDS, save=[ATTN_IN[layer], *(kind[layer] for kind, _, _ in made)])
    for kind, weight, bias in made:
        matrix, offset = graph.weight(weight, layer), graph.weight(bias, layer)
        expected = einsum(run[ATTN_IN[layer]], matrix, "b p m, h m d -> b p h d") + offset
        torch.testing.assert_close(run[kind[layer]], expected, **EXACT)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_results_of_the_heads_and_the_bias_are_the_projections_output(family: str, layer: int):
    graph = graph_of(family)
    run = graph.run(IDS, save=[ATTN_Z[layer], ATTN_RESULT[layer]])
    projection = layers_of(family, model_of(graph))[layer].get_submodule(FAMILIES[family].projection)
    expected = einsum(run[ATTN_Z[layer]], graph.weight(W_O, layer), "b p h d, h d m -> b p h m")
    torch.testing.assert_close(run[ATTN_RESULT[layer]], expected, **EXACT)
    total = run[ATTN_RESULT[layer]].sum(2) + graph.weight(b_O, layer)
    torch.testing.assert_close(total, returned(projection, graph), **EXACT)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_are_read_and_written_by_the_weights_of_the_mlp(family: str, layer: int):
    graph = graph_of(family)
    run = graph.run(IDS, save=[MLP_IN[layer], MLP_PRE[layer], MLP_POST[layer]])
    reads, before, after = run.values()
    into = (W_gate, b_gate) if family in GATED else (W_in, b_in)
    pre = reads @ graph.weight(into[0], layer) + graph.weight(into[1], layer)
    torch.testing.assert_close(before, pre, **EXACT)
    if family in GATED:
        up = reads @ graph.weight(W_in, layer) + graph.weight(b_in, layer)
        activated = (
            nn.functional.silu(pre) if family == "llama" else nn.functional.gelu(pre, approximate="tanh")
        )
        torch.testing.assert_close(after, activated * up, **EXACT)
    out = after @ graph.weight(W_out, layer) + graph.weight(b_out, layer)
    down = layers_of(family, model_of(graph))[layer].get_submodule(FAMILIES[family].down)
    torch.testing.assert_close(out, returned(down, graph), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_and_unembedding_explain_the_ends_of_the_stream(family: str):
    graph = graph_of(family)
    run = graph.run(IDS, save=[EMBED, FINAL_LN_OUT])
    torch.testing.assert_close(run[EMBED], graph.weight(W_E)[IDS], **EXACT)
    logits = run[FINAL_LN_OUT] @ graph.weight(W_U) + graph.weight(b_U)
    logits = 10 * torch.tanh(logits / 10) if family == "gemma2" else logits
    torch.testing.assert_close(run.logits, logits, **EXACT)


SHAPES: dict[WeightType, tuple[str, ...]] = {
    W_Q: ("head", "d_model", "d_head"),
    W_K: ("kv_head", "d_model", "d_head"),
    W_V: ("kv_head", "d_model", "d_head"),
    W_O: ("head", "d_head", "d_model"),
    W_in: ("d_model", "d_mlp"),
    W_out: ("d_mlp", "d_model"),
    b_Q: ("head", "d_head"),
    b_K: ("kv_head", "d_head"),
    b_V: ("kv_head", "d_head"),
    b_O: ("d_model",),
    b_in: ("d_mlp",),
    b_out: ("d_model",),
    W_E: ("vocab", "d_model"),
    W_U: ("d_model", "vocab"),
    b_U: ("vocab",),
}


@pytest.mark.parametrize("kind", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_weight_has_its_normal_form_whatever_the_model_stores(family: str, kind: WeightType):
    sizes = {"head": 4, "kv_head": 2 if family in GATED else 4, "d_head": 8, "d_model": 32, "d_mlp": 40}
    sizes["vocab"] = VOCABULARY
    layer = None if kind in (W_E, W_U, b_U) else 1
    weight = graph_of(family).weight(kind, layer)
    assert weight.shape == tuple(sizes[dim] for dim in SHAPES[kind])
    assert not weight.requires_grad


@pytest.mark.parametrize(
    ("family", "kind", "layer", "message"),
    [
        ("gpt2", W_gate, 0, r"this model has no weight W_gate\[0\]: did you mean"),
        ("llama", W_Q, LAYERS, r"no weight W_Q\[3\]: did you mean W_Q"),
        ("llama", b_Q, None, r"no weight W_Q: did you mean .*W_Q\[2\]"),
        ("llama", W_E, 0, r"no weight W_E\[0\]: did you mean"),
    ],
)
def test_a_weight_that_a_model_has_not_says_so(
    family: str, kind: WeightType, layer: int | None, message: str
):
    with pytest.raises(UnknownLocationError, match=message):
        graph_of(family).weight(kind, layer)


# --- reading a projection ---------------------------------------------------------------------


class Quantised(nn.Module):
    """A projection none of whose parameters is its matrix."""

    def __init__(self, matrix: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.in_features = matrix.shape[0]
        self.levels = nn.Parameter((matrix * 4).round().T, requires_grad=False)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.levels.T / 4) + self.bias


def random_conv1d(into: int, out: int) -> Conv1D:
    module = Conv1D(out, into)
    nn.init.normal_(module.bias)
    return module


PROJECTIONS: dict[str, tuple[nn.Module, int]] = {
    "linear": (nn.Linear(3, 5), 3),
    "linear without bias": (nn.Linear(3, 5, bias=False), 3),
    "square linear": (nn.Linear(4, 4), 4),
    "stored the other way round": (random_conv1d(3, 5), 3),
    "square, the other way round": (random_conv1d(4, 4), 4),
    "quantised": (Quantised(torch.randn(3, 5), torch.randn(5)), 3),
}


@pytest.mark.parametrize(("module", "width"), PROJECTIONS.values(), ids=PROJECTIONS)
def test_a_projection_is_read_off_what_it_does(module: nn.Module, width: int):
    x = torch.randn(7, width)
    with torch.no_grad():
        matrix, bias = affine_map(module)
        torch.testing.assert_close(x @ matrix + bias, module(x))
