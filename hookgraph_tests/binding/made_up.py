"""An architecture outside transformers' tree, with names and a norm of its own, and a third branch."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LoomConfig(PreTrainedConfig):
    """Sizes of a loom."""

    model_type = "loom"
    threads: int = 32
    shuttles: int = 4
    rows: int = 3
    dyes: int = 48
    vocab_size: int = 48
    echo: bool = True
    fringe: bool = False


class Even(nn.Module):
    """A root-mean-square norm under another name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tension = nn.Parameter(torch.ones(width))
        self.slack = 1e-6

    def forward(self, cloth: Tensor) -> Tensor:
        """Divide by the root of the mean square."""
        return self.tension * cloth * torch.rsqrt(cloth.pow(2).mean(-1, keepdim=True) + self.slack)


class Weft(nn.Module):
    """Causal self-attention, written out."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__()
        self.shuttles, width = config.shuttles, config.threads
        self.over, self.under, self.through = (nn.Linear(width, width) for _ in range(3))
        self.tie = nn.Linear(width, width)

    def forward(self, cloth: Tensor) -> Tensor:
        """Mix positions."""
        over, under, through = (
            f(cloth).unflatten(-1, (self.shuttles, -1)).transpose(1, 2)
            for f in (self.over, self.under, self.through)
        )
        scores = over @ under.transpose(-1, -2) * over.shape[-1] ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        pattern = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        return self.tie((pattern @ through).transpose(1, 2).flatten(2))


class Dye(nn.Module):
    """Two linear maps with a nonlinearity between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.soak, self.rinse = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, cloth: Tensor) -> Tensor:
        """Each position by itself."""
        return self.rinse(gelu(self.soak(cloth)))


class Row(nn.Module):
    """A layer."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__()
        self.before, self.between = Even(config.threads), Even(config.threads)
        self.weft, self.dye = Weft(config), Dye(config.threads, config.dyes)
        self.echo = Dye(config.threads, config.dyes // 2) if config.echo else None
        self.fringe = nn.Linear(config.threads, config.threads) if config.fringe else None

    def forward(self, cloth: Tensor) -> Tensor:
        """Add attention, then the MLP and, beside it, a third branch, or a fourth."""
        cloth = cloth + self.weft(self.before(cloth))
        given = self.between(cloth)
        cloth = cloth + self.dye(given)
        cloth = cloth if self.echo is None else cloth + self.echo(given)
        return cloth if self.fringe is None else cloth + self.fringe(given)


class LoomForCausalLM(PreTrainedModel):
    """Rows between a spool and a label."""

    config_class = LoomConfig
    config: LoomConfig

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.spool = nn.Embedding(config.vocab_size, config.threads)
        self.cloth = nn.ModuleList(Row(config) for _ in range(config.rows))
        self.hem = Even(config.threads)
        self.label = nn.Linear(config.threads, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits for every position."""
        cloth = self.spool(input_ids)
        for row in self.cloth:
            cloth = row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth)))
