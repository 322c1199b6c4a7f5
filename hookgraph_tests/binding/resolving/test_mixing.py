"""What mixes positions without a softmax is told from what does not, however it is normed and drawn."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, RwkvConfig, RwkvForCausalLM

from hookgraph.binding import bind
from hookgraph.binding.resolving.examples import example_inputs
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import EXTRA_OUT, MIXER_OUT, MLP_OUT
from hookgraph_tests.binding.made_up import Dye, LoomConfig, LoomForCausalLM, Row
from hookgraph_tests.families import binding_of

WIDTH = LoomConfig.threads


class Fourier(nn.Module):
    """A transform over positions and features, as FNet has, without a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        """Every position reads all."""
        return torch.fft.fft2(x).real


class Across(nn.Module):
    """A map over positions, as MLP-Mixer has."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(40, 40) / 5)

    def forward(self, x: Tensor) -> Tensor:
        """Every position reads all."""
        return self.map[: x.shape[1], : x.shape[1]] @ x


class Convolution(nn.Module):
    """A causal convolution of each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Every position reads the two before it."""
        return self.kernel(pad(x.mT, (2, 0))).mT


class First(nn.Linear):
    """A map of the first position."""

    def forward(self, input: Tensor) -> Tensor:
        """Every position reads the first one."""
        return super().forward(input[:, :1]).expand_as(input)


class Shifted(Dye):
    """An MLP on what it is given and the position before, as RWKV has."""

    def forward(self, cloth: Tensor) -> Tensor:
        """Every position reads its neighbour."""
        return super().forward(0.5 * cloth + 0.5 * pad(cloth[:, :-1], (0, 0, 1, 0)))


class Weighed(Row):
    """Weighs by itself what its mixer adds."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.rand(config.threads))

    def forward(self, cloth: Tensor) -> Tensor:
        """The mixer, weighed, then the MLP."""
        cloth = cloth + self.weight * self.weft(self.before(cloth))
        return cloth + self.dye(self.between(cloth))


def loom(weft: nn.Module, dye: nn.Module | None = None, row: type[Row] = Row) -> PreTrainedModel:
    """A loom whose rows have another mixer, behind a layer norm, and perhaps another MLP."""
    config = LoomConfig(echo=False, rows=2)
    model = LoomForCausalLM(config)
    model.cloth = nn.ModuleList(row(config) for _ in range(2))
    for cloth in model.cloth:
        cloth.before, cloth.weft = nn.LayerNorm(WIDTH), weft
        cloth.dye = cloth.dye if dye is None else dye
    model.cloth[1] = Row(config)
    return model.eval()


def modules_of(graph: HookGraph) -> Mapping[str, str]:
    """Where the updates of the first layer are reached, as far as they are."""
    anchors = binding_of(graph).findings.anchors
    return {
        kind.name: str(anchors[kind[0]]) for kind in (MIXER_OUT, MLP_OUT, EXTRA_OUT) if kind[0] in anchors
    }


ROW = {"mixer.out": "output of cloth.0.weft", "mlp.out": "output of cloth.0.dye"}


@pytest.mark.parametrize("mixer", [Fourier, Across, Convolution])
def test_what_reads_other_positions_behind_a_layer_norm_is_the_mixer(mixer: type[nn.Module]):
    torch.manual_seed(0)
    assert modules_of(bind(loom(mixer()), check=False)) == ROW


def test_what_reads_one_position_only_is_a_mixer_if_that_is_the_first():
    assert modules_of(bind(loom(First(WIDTH, WIDTH)), check=False)) == ROW


@pytest.mark.parametrize("mixer", [Across, Convolution])
def test_an_mlp_that_reads_its_neighbour_beside_a_mixer_that_reads_more_is_the_mlp(mixer: type[nn.Module]):
    torch.manual_seed(0)
    graph = bind(loom(mixer(), Shifted(WIDTH, 48)), check=False)
    assert modules_of(graph) == ROW


def test_two_that_read_as_many_positions_are_two_mixers():
    assert modules_of(bind(loom(Shifted(WIDTH, 48), Shifted(WIDTH, 48)), check=False)) == {}


def test_a_mixer_that_the_layer_weighs_itself_is_not_taken_for_a_branch_without_mixing():
    torch.manual_seed(0)
    graph = bind(loom(Across(), row=Weighed), check=False)
    assert modules_of(graph) == {**ROW, "mixer.out": "own code mixer at weighing 0 of cloth.0"}


@pytest.mark.parametrize("spread", [None, 1.0, 30.0])
def test_rwkv_has_a_mixer_and_an_mlp_however_its_embeddings_were_drawn(spread: float | None):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64}
    model = RwkvForCausalLM(RwkvConfig(vocab_size=48, num_hidden_layers=2, context_length=16, **sizes)).eval()
    if spread is not None:
        nn.init.normal_(model.rwkv.embeddings.weight, std=spread)
    graph = bind(model, check=False)
    run = graph.run(example_inputs(model), save=[MIXER_OUT[0], MLP_OUT[0]])
    assert modules_of(graph) == {
        "mixer.out": "output of rwkv.blocks.0.attention[0]",
        "mlp.out": "output of rwkv.blocks.0.feed_forward[0]",
    }
    assert run[MLP_OUT[0]].shape == run[MIXER_OUT[0]].shape
