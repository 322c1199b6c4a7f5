"""What an MLP reads where the layer computes it by itself, and the norm before it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

import hookgraph as hg
from hookgraph import HookGraph
from hookgraph.locations import MLP_IN, MLP_LN_SCALE, MLP_OUT, MLP_POST, RESID_MID
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM, Row
from hookgraph_tests.families import tokens
from hookgraph_tests.tiny import build

LAYER, WIDTH = 1, 32
IDS = tokens(2, 6)


class Bare(Row):
    """A row with an MLP as wide as its stream, and no module for it."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.soak, self.rinse = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dye = nn.Identity()

    def forward(self, cloth: Tensor) -> Tensor:
        """Add attention, then the MLP."""
        cloth = cloth + self.weft(self.before(cloth))
        return cloth + self.rinse(gelu(self.soak(self.between(cloth))))


class Flat(Row):
    """A row whose MLP, and the norm before it, are given the positions of all examples on one axis."""

    def forward(self, cloth: Tensor) -> Tensor:
        """Add attention, then the MLP."""
        cloth = cloth + self.weft(self.before(cloth))
        flat = cloth.flatten(0, 1)
        return (flat + self.dye(self.between(flat))).view(cloth.shape)


def woven(row: Callable[[LoomConfig], Row]) -> HookGraph:
    """A loom of such rows, bound with proof, every weight another one."""
    config = LoomConfig(echo=False)
    model = LoomForCausalLM(config)
    model.cloth = nn.ModuleList(row(config) for _ in range(config.rows))
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return hg.bind(model, cached=False)


def by_hand(graph: HookGraph, mlp_in: Tensor) -> tuple[Tensor, Tensor]:
    """The neurons, and what the MLP adds, of what it reads."""
    row = graph.binding.model.get_submodule(f"cloth.{LAYER}")  # pyright: ignore[reportAttributeAccessIssue]
    neurons = gelu(row.soak(mlp_in))
    return neurons, row.rinse(neurons)


def test_what_an_mlp_without_a_module_reads_is_no_activation_of_its_own():
    graph = woven(Bare)
    run = graph.run(IDS, save=[x[LAYER] for x in (MLP_IN, MLP_POST, MLP_OUT)])
    neurons, out = by_hand(graph, run[MLP_IN[LAYER]])
    torch.testing.assert_close(run[MLP_POST[LAYER]], neurons)
    torch.testing.assert_close(run[MLP_OUT[LAYER]], out)
    edited = graph.hook(MLP_IN[LAYER], torch.zeros_like).run(IDS, save=[MLP_POST[LAYER]])
    expected, _ = by_hand(graph, torch.zeros(2, 6, WIDTH, dtype=torch.float64))
    torch.testing.assert_close(edited[MLP_POST[LAYER]], expected)
    assert MLP_LN_SCALE[LAYER] in graph.locations


def test_a_norm_of_positions_of_all_examples_on_one_axis_has_a_scale():
    graph = woven(Flat)
    run = graph.run(IDS, save=[RESID_MID[LAYER], MLP_LN_SCALE[LAYER]])
    square = run[RESID_MID[LAYER]].square().mean(-1, keepdim=True)
    torch.testing.assert_close(run[MLP_LN_SCALE[LAYER]], torch.rsqrt(square + 1e-6))
    assert graph.report.proves(MLP_LN_SCALE[LAYER], "conserved")


def test_the_norm_before_the_mlp_of_opt_has_a_scale():
    graph = hg.bind(build("causal", "opt"))
    assert graph.report.proves(MLP_LN_SCALE[LAYER], "edit = gradient")
