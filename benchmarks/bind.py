"""How long `bind` takes beyond one forward pass: GPT-2 small and a Llama of a billion parameters, on the CPU.

    python -m benchmarks.bind

Weights are random. `again` binds a second time, from what was kept of the first; `limit` is for `bind`.
"""

import os
import tempfile
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hookgraph.binding import bind
from hookgraph.binding.resolving.examples import example_inputs

LIMIT = 2.0
"""Seconds that `bind` may take beyond one forward pass."""


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config())


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    return LlamaForCausalLM._from_config(config)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    table = Table("model", "parameters", "forward s", "bind s", "beyond s", "again s", "limit s")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOOKGRAPH_CACHE"] = folder
        for name, make in (("GPT-2 small, float32", gpt2), ("Llama shape, bfloat16", llama)):
            model = make().eval()
            example = example_inputs(model)
            with torch.no_grad():
                forward = min(timed(lambda m=model, e=example: m(**e)) for _ in range(3))
            first, again = (timed(lambda m=model: bind(m)) for _ in range(2))
            size = f"{sum(p.numel() for p in model.parameters()):,}"
            numbers = (forward, first, first - forward, again, LIMIT)
            table.add_row(name, size, *(f"{x:.2f}" for x in numbers))
    Console().print(table)


if __name__ == "__main__":
    main()
