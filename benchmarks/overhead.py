"""What the bookkeeping of hookgraph costs: reading, editing, generating and replaying, against raw hooks.

W1 to W4 and W12 of the specification, and replay. Run it with `python -m benchmarks.overhead`.
"""

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2 import modeling_gpt2

import hookgraph as hg
from benchmarks.harness import Comparison, Measurement, Work, begin, finish, measure
from hookgraph import locations as at

KEPT = (
    at.RESID_PRE,
    at.ATTN_Q,
    at.ATTN_K,
    at.ATTN_V,
    at.ATTN_SCORES,
    at.ATTN_PATTERN,
    at.ATTN_Z,
    at.ATTN_OUT,
    at.RESID_MID,
    at.MLP_PRE,
    at.MLP_POST,
    at.MLP_OUT,
    at.RESID_POST,
)
"""What W3 keeps of every layer."""

NEW_TOKENS = 32
_TINY_ROUNDS = 50
"""Rounds on the tiny model for each one on the small model: a round takes milliseconds there."""


class Size(StrEnum):
    """Which models are measured."""

    SMALL = "small"
    TINY = "tiny"
    ALL = "all"


@dataclass(frozen=True)
class Subject:
    """A model three times, with the same weights.

    Args:
        name: what it is called in the table.
        graph: hookgraph's view of the bound model.
        bound: the model that is bound.
        plain: the same model, never bound.
        eager: the same model, never bound, with eager attention.
        ids: the tokens it is run on.
    """

    name: str
    graph: hg.HookGraph
    bound: Any  # GPT2LMHeadModel, whose attributes are not all typed
    plain: Any
    eager: Any
    ids: Int[Tensor, "batch pos"]

    @property
    def blocks(self) -> Sequence[Any]:
        """The blocks of the plain model."""
        return list(self.plain.transformer.h)

    def run(self, model: Any, **arguments: Any) -> Float[Tensor, "batch pos vocab"]:
        """The logits of a forward pass without gradients and key-value cache, as `graph.run` makes it."""
        with torch.no_grad():
            return model(input_ids=self.ids, use_cache=False, **arguments).logits


def small() -> Subject:
    """GPT-2 small, with random weights."""
    return subject_of("small", GPT2Config(), batch=4, length=128)


def tiny(length: int = 8) -> Subject:
    """A model that is so small that what Python does is most of the time."""
    config = GPT2Config(
        n_layer=4, n_embd=128, n_head=4, vocab_size=1000, bos_token_id=None, eos_token_id=None
    )
    return subject_of(f"tiny 1x{length}", config, batch=1, length=length)


def subject_of(name: str, config: GPT2Config, *, batch: int, length: int) -> Subject:
    torch.manual_seed(0)
    bound = GPT2LMHeadModel(config).eval()
    plain, eager = copy.deepcopy(bound), copy.deepcopy(bound)
    eager.set_attn_implementation("eager")
    ids = torch.randint(0, config.vocab_size, (batch, length))
    return Subject(name, hg.bind(bound), bound, plain, eager, ids)


# --- W1: nothing hooked ----------------------------------------------------------------------------


def unhooked(subject: Subject) -> Iterator[Comparison]:
    """The bound model's own forward pass; and how far apart two runs of the very same thing come out."""

    def plain() -> Sequence[Tensor]:
        return [subject.run(subject.plain)]

    def bound() -> Sequence[Tensor]:
        return [subject.run(subject.bound)]

    def graph_run() -> Sequence[Tensor]:
        return [subject.graph.run(subject.ids).logits]

    yield Comparison("control: plain against plain", plain, plain, effort=2)
    yield Comparison("W1 forward, bound, nothing hooked", plain, bound, limit=1.01, effort=3)
    yield Comparison("W1 graph.run, nothing hooked", plain, graph_run)


# --- W2: the residual stream -----------------------------------------------------------------------


def residual_stream(subject: Subject, limit: float) -> Iterator[Comparison]:
    """The residual stream after every block."""
    posts = subject.graph.every(at.RESID_POST)

    def plain() -> Sequence[Tensor]:
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.append(output)

        with registered([b.register_forward_hook(keep) for b in subject.blocks]):
            logits = subject.run(subject.plain)
        return [*seen, logits]

    def ours() -> Sequence[Tensor]:
        run = subject.graph.run(subject.ids, save=[*posts, at.LOGITS])
        return list(run.values())

    def stopping() -> Sequence[Tensor]:
        return list(subject.graph.run(subject.ids, save=posts).values())

    yield Comparison("W2 resid.post of every layer, and logits", plain, ours, limit=limit)
    yield Comparison(
        "W2 the same, without logits: the pass stops", lambda: plain()[: len(posts)], stopping, effort=0.5
    )


# --- W3: everything --------------------------------------------------------------------------------


def everything(subject: Subject, limit: float | None = None) -> Iterator[Comparison]:
    """What W3 lists; and every location that the model has."""
    kept = [x for kind in KEPT for x in subject.graph.every(kind)] + [at.LOGITS]
    every = list(subject.graph.locations)

    def keeping(wanted: Sequence[hg.Location]) -> Work:
        return lambda: list(subject.graph.run(subject.ids, save=wanted).values())

    def by_hand(wanted: Sequence[hg.Location], *, derived: bool) -> Work:
        names = [str(x) for x in wanted]

        def capture() -> Sequence[Tensor]:
            seen = capture_by_hand(subject, derived=derived)
            return [seen[name] for name in names]

        return capture

    yield Comparison("W3 everything, and logits", by_hand(kept, derived=False), keeping(kept), limit)
    yield Comparison(
        f"W3 all {len(every)} locations, attn.result too",
        by_hand(every, derived=True),
        keeping(every),
        limit,
        exact=False,  # the scale of a norm is computed in another order
        effort=0.5,
    )


def capture_by_hand(subject: Subject, *, derived: bool) -> dict[str, Tensor]:
    """Every activation of a GPT-2 with eager attention, by forward hooks and a copy of its attention.

    Args:
        subject: the model and the tokens.
        derived: also what W3 does not list: embeddings, norms, their scales, and each head's result.
    """
    seen: dict[str, Tensor] = {}
    model = subject.eager
    handles: list[RemovableHandle] = []

    def output(module: nn.Module, name: str) -> None:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = output

        handles.append(module.register_forward_hook(keep))

    def given(module: nn.Module, name: str) -> None:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0]

        handles.append(module.register_forward_pre_hook(keep))

    for i, block in enumerate(model.transformer.h):
        given(block, f"resid.pre[{i}]")
        given(block.attn.c_proj, f"attn.z[{i}]")
        output(block.attn.resid_dropout, f"attn.out[{i}]")
        given(block.ln_2, f"resid.mid[{i}]")
        output(block.mlp.c_fc, f"mlp.pre[{i}]")
        given(block.mlp.c_proj, f"mlp.post[{i}]")
        output(block.mlp, f"mlp.out[{i}]")
        output(block, f"resid.post[{i}]")
        if derived:
            output(block.ln_1, f"attn.in[{i}]")
            output(block.ln_2, f"mlp.in[{i}]")
    if derived:
        output(model.transformer.wte, "embed")
        output(model.transformer.ln_f, "final.ln_out")
    with torch.no_grad(), registered(handles), attention_replaced(_attention_that_keeps(seen)):
        seen["logits"] = subject.run(model)
        heads = model.config.n_head
        for i in range(len(model.transformer.h)):
            seen[f"attn.z[{i}]"] = seen[f"attn.z[{i}]"].unflatten(-1, (heads, -1))
        if derived:
            _derive(model, seen)
    return seen


def _attention_that_keeps(seen: dict[str, Tensor]) -> Callable[..., Any]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        i = module.layer_idx
        scores = torch.matmul(query, key.transpose(-1, -2)) * module.scaling
        if mask is not None:
            scores = scores + mask
        pattern = torch.softmax(scores, dim=-1)
        seen[f"attn.q[{i}]"] = query.transpose(1, 2)
        seen[f"attn.k[{i}]"] = key.transpose(1, 2)
        seen[f"attn.v[{i}]"] = value.transpose(1, 2)
        seen[f"attn.scores[{i}]"] = scores
        seen[f"attn.pattern[{i}]"] = pattern
        return torch.matmul(pattern, value).transpose(1, 2), pattern

    return attention


def _derive(model: Any, seen: dict[str, Tensor]) -> None:
    """The scales of the norms, and what each head writes."""
    config, last = model.config, model.config.n_layer - 1
    for i, block in enumerate(model.transformer.h):
        seen[f"attn.ln_scale[{i}]"] = _scale(seen[f"resid.pre[{i}]"], config.layer_norm_epsilon)
        seen[f"mlp.ln_scale[{i}]"] = _scale(seen[f"resid.mid[{i}]"], config.layer_norm_epsilon)
        weight = block.attn.c_proj.weight.view(config.n_head, -1, config.n_embd)
        seen[f"attn.result[{i}]"] = torch.einsum("bphd,hdo->bpho", seen[f"attn.z[{i}]"], weight)
    seen["final.ln_scale"] = _scale(seen[f"resid.post[{last}]"], config.layer_norm_epsilon)


def _scale(x: Float[Tensor, "batch pos d_model"], epsilon: float) -> Float[Tensor, "batch pos one"]:
    return torch.rsqrt(x.var(-1, correction=0, keepdim=True) + epsilon)


# --- W4: edits of a part ---------------------------------------------------------------------------


def parts_zeroed(subject: Subject) -> Iterator[Comparison]:
    """Zero one head's z; zero one neuron. In the middle of the model, logits as the answer."""
    layer, head, neuron = len(subject.blocks) // 2, 3, 100
    d_head = subject.plain.config.n_embd // subject.plain.config.n_head
    block = subject.blocks[layer]

    def plain(module: nn.Module, part: slice) -> Work:
        def zero(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            value = args[0].clone()
            value[..., part] = 0
            return (value,)

        def work() -> Sequence[Tensor]:
            with registered([module.register_forward_pre_hook(zero)]):
                return [subject.run(subject.plain)]

        return work

    def ours(location: hg.Location) -> Work:
        graph = subject.graph.hook(location, torch.zeros_like)
        return lambda: [graph.run(subject.ids).logits]

    yield Comparison(
        "W4 zero one head's z",
        plain(block.attn.c_proj, slice(head * d_head, (head + 1) * d_head)),
        ours(at.ATTN_Z[layer].at(head=head)),
    )
    yield Comparison(
        "W4 zero one neuron",
        plain(block.mlp.c_proj, slice(neuron, neuron + 1)),
        ours(at.MLP_POST[layer].at(d_mlp=neuron)),
    )


# --- W12: generation, and hooks that do nothing ----------------------------------------------------


def generation(subject: Subject) -> Iterator[Comparison]:
    """Generate with a vector added to the residual stream of one layer. Both sides keep a key-value cache."""
    layer = len(subject.blocks) // 2
    vector = torch.randn(subject.plain.config.n_embd)
    graph = subject.graph.hook(at.RESID_POST[layer], lambda value: value + vector)

    def generate(model: Any) -> Sequence[Tensor]:
        mask = torch.ones_like(subject.ids)
        made: Any = model.generate(
            subject.ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        return [made]

    def plain() -> Sequence[Tensor]:
        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + vector

        with registered([subject.blocks[layer].register_forward_hook(add)]):
            return generate(subject.plain)

    def ours() -> Sequence[Tensor]:
        with graph.attached():
            return generate(subject.bound)

    name = f"W12 generate {NEW_TOKENS} tokens, one residual edit"
    yield Comparison(name, plain, ours, limit=1.05, effort=0.4)


def passing_through(subject: Subject) -> Iterator[Comparison]:
    """Twelve hooks that hand back what they are given."""
    kinds = (at.ATTN_OUT, at.MLP_OUT, at.RESID_POST)
    graph = subject.graph
    for location in (x for kind in kinds for x in subject.graph.every(kind)):
        graph = graph.hook(location, lambda value: value)

    def plain() -> Sequence[Tensor]:
        modules = [m for b in subject.blocks for m in (b.attn.resid_dropout, b.mlp, b)]
        hooks = [m.register_forward_hook(lambda module, args, output: output) for m in modules]
        with registered(hooks):
            return [subject.run(subject.plain)]

    def ours() -> Sequence[Tensor]:
        return [graph.run(subject.ids).logits]

    yield Comparison(f"W12 forward, {len(graph.registrations)} hooks that do nothing", plain, ours)


# --- replay ----------------------------------------------------------------------------------------


def replay(subject: Subject, *, required: bool) -> Iterator[Comparison]:
    """From layer l of L on, against a full forward pass.

    The logits are those of the last position: all of them are a third of a GPT-2 small, which no replay
    can leave out. What that comes to is reported too.
    """
    layers = len(subject.blocks)
    for layer in sorted({layers // 4, layers // 2, 3 * layers // 4, layers - 1}):
        part = (layers - layer) / layers
        limit = part + 0.05 if required else None
        name = f"replay from layer {layer} of {layers}, last logits: {part:.2f}"
        yield _replay(subject, layer, name, limit, logits_to_keep=1)
    yield _replay(subject, layers // 2, f"replay from layer {layers // 2} of {layers}, all logits", None)


def _replay(subject: Subject, layer: int, name: str, limit: float | None, **arguments: Any) -> Comparison:
    after = at.RESID_PRE[layer]
    first = subject.graph.run({"input_ids": subject.ids, **arguments}, save=[after])

    def plain() -> Sequence[Tensor]:
        return [subject.run(subject.plain, **arguments)]

    def ours() -> Sequence[Tensor]:
        return [subject.graph.replay(first, after).logits]

    return Comparison(name, plain, ours, limit=limit, effort=0.6)


# --- shared by the plain sides ---------------------------------------------------------------------


@contextmanager
def registered(handles: Sequence[RemovableHandle]) -> Generator[None]:
    """Remove hooks on leaving."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention_replaced(attention: Callable[..., Any]) -> Generator[None]:
    """Within this context GPT-2's eager attention is another function."""
    before = modeling_gpt2.eager_attention_forward
    modeling_gpt2.eager_attention_forward = attention
    try:
        yield
    finally:
        modeling_gpt2.eager_attention_forward = before


# --- the command -----------------------------------------------------------------------------------


def on_small() -> Iterator[tuple[Subject, Comparison]]:
    """Everything that is measured on GPT-2 small."""
    subject = small()
    for group in (
        unhooked(subject),
        residual_stream(subject, limit=1.05),
        everything(subject, limit=1.15),
        parts_zeroed(subject),
        generation(subject),
        replay(subject, required=True),
    ):
        yield from ((subject, comparison) for comparison in group)


def on_tiny() -> Iterator[tuple[Subject, Comparison]]:
    """Everything that is measured on the tiny models."""
    subject, shortest = tiny(), tiny(length=1)
    for group in (
        unhooked(subject),
        residual_stream(subject, limit=1.15),
        everything(subject),
        parts_zeroed(subject),
        generation(subject),
        replay(subject, required=False),
    ):
        yield from ((subject, comparison) for comparison in group)
    for group in (unhooked(shortest), passing_through(shortest)):
        yield from ((shortest, comparison) for comparison in group)


def main(
    model: Annotated[Size, typer.Option(help="Which models to measure.")] = Size.ALL,
    rounds: Annotated[int, typer.Option(help="Rounds of a comparison on the small model.")] = 7,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    only: Annotated[str, typer.Option(help="Only comparisons whose name contains this.")] = "",
) -> None:
    """Compare hookgraph with raw hooks and print a table."""
    found: list[Measurement] = []
    plans = (
        (Size.TINY, rounds * _TINY_ROUNDS, on_tiny),
        (Size.SMALL, rounds, on_small),
    )
    begin(threads)
    for size, times, comparisons in plans:
        if model not in (size, Size.ALL):
            continue
        for subject, comparison in comparisons():
            if only in comparison.name:
                found.append(measure(subject.name, comparison, times))
                print(f"  {subject.name}: {comparison.name}: {found[-1].ratio:.3f}", flush=True)
    finish(found, json)


if __name__ == "__main__":
    typer.run(main)
