"""Lenses as decoders: the model's own end read off a location, with or without a translation before it."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hookgraph.algorithms.batches import stream_of
from hookgraph.algorithms.padding import check_finite, real_tokens
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.readouts.decoding import decoded
from hookgraph.algorithms.reduction import summed
from hookgraph.errors import HookGraphError, InputError, LoadError, UnknownLocationError
from hookgraph.graph.abstract import Inputs, Prepared
from hookgraph.graph.foreign import read_settings, read_weights
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import LOGITS, RESID_POST, RESID_PRE


@final
@dataclass(frozen=True, eq=False)
class Translation:
    """z = h + W h + b: a residual as it would be after the last layer. A `LensGraph` takes it as translator.

    Args:
        weight: W.
        bias: b.
    """

    weight: Float[Tensor, "d_model d_model"]
    bias: Float[Tensor, " d_model"]

    def __call__(self, h: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """z, where and in the precision that h is in."""
        return h + h @ self.weight.to(h).mT + self.bias.to(h)

    def linear(self, like: Float[Tensor, "..."]) -> Float[Tensor, "d_model d_model"]:
        """I + W, where and in the precision that a tensor is in."""
        return torch.eye(len(self.weight)).to(like) + self.weight.to(like)


@runtime_checkable
class Lens(Protocol):
    """What comes before the model's last norm and unembedding."""

    def translation(self, at: Location) -> Translation | None:
        """What becomes of the states at a location; None where they are decoded as they are."""
        ...


@final
@dataclass(frozen=True)
class LogitLens:
    """The last norm and the unembedding, of any residual: z = h.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
    """

    def translation(self, at: Location) -> Translation | None:
        """None: nothing is translated."""
        return None


@final
@dataclass(frozen=True, eq=False, repr=False)
class TunedLens:
    """An affine map per layer into the basis of the last residual: z = h + W h + b.

    Translator i reads `resid.pre[i]`, which is `resid.post[i - 1]`. After the last layer nothing
    is translated.

    Args:
        translators: by layer.
        losses: the mean KL to the final logits in nats, by layer, over the last batch of the fit.
        metadata: the model's name, revision and dtype, and how the lens was fitted.

    Source: Belrose et al., arXiv:2303.08112.
    """

    translators: Mapping[int, Translation]
    losses: Mapping[int, float] = field(default_factory=dict[int, float])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def __repr__(self) -> str:
        width = len(next(iter(self.translators.values())).bias)
        model = self.metadata.get("name", "an unnamed model")
        return f"TunedLens of {model}: {len(self.translators)} translators of width {width}"

    def translation(self, at: Location) -> Translation | None:
        """That of a boundary between layers.

        Raises:
            UnknownLocationError: there is no translator for the location.
        """
        first, last = min(self.translators), max(self.translators)
        if at == at.whole and at.site is None and at.layer is not None and at.type in (RESID_PRE, RESID_POST):
            boundary = at.layer + (at.type == RESID_POST)
            if boundary in self.translators:
                return self.translators[boundary]
            if boundary == last + 1:
                return None
        raise UnknownLocationError(
            f"this lens has no translator for {at}: they read resid.pre[{first}] to resid.pre[{last}]"
        )

    @staticmethod
    def fit(
        graph: HookGraph,
        batches: Iterable[Inputs],
        *,
        epochs: int = 1,
        learning_rate: float = 1e-3,
        progress: bool | None = None,
    ) -> "TunedLens":
        """min over (W, b) of mean KL(p_final ‖ softmax D(h + W h + b)), by Adam, one step per batch.

        Where a group of processes is initialised, each passes its own batches, as many as the others, and all
        get the same lens.

        Args:
            graph: the hooked model.
            batches: inputs, streamed; something that can be iterated again where there are several epochs.
            epochs: passes over the batches.
            learning_rate: of Adam.
            progress: whether a bar is shown.

        Raises:
            InputError: there are no batches, or none for a later epoch.
            HookGraphError: fewer than one epoch.
            MetricError: a residual or a logit is not finite.
        """
        if epochs < 1:
            raise HookGraphError(f"epochs={epochs}: a lens is fitted in at least one")
        places = graph.every(RESID_PRE)
        fits: dict[Location, tuple[Tensor, Tensor]] = {}
        optimizer = None
        losses: dict[int, float] = {}
        with Progress("tuned lens", None, shown=progress) as bar:
            for batch in _repeatedly(batches, epochs):
                prepared = graph.binding.prepare(batch)
                run = graph.run(prepared, save=[*places, LOGITS])
                check_finite(run)
                if optimizer is None:
                    fits = {x: _zeros(run[x]) for x in places}
                    optimizer = torch.optim.Adam([p for pair in fits.values() for p in pair], learning_rate)
                optimizer.zero_grad()
                for place in places:
                    losses[place.layer or 0] = _descend(graph, prepared, run, place, fits[place])
                optimizer.step()
                bar.advance()
        if optimizer is None:
            raise InputError("there are no batches to fit a lens to: pass an iterable of inputs")
        told = {**graph.binding.metadata, "epochs": str(epochs), "learning_rate": str(learning_rate)}
        found = {x.layer or 0: Translation(W.detach(), b.detach()) for x, (W, b) in fits.items()}
        return TunedLens(found, losses, told)

    def save(self, folder: str | Path) -> None:
        """Write `params.pt` and `config.json` in the published layout: `0.weight`, `0.bias`, ...

        Raises:
            LoadError: the folder cannot be written.
        """
        place = Path(folder)
        tensors: dict[str, Tensor] = {}
        for layer, found in self.translators.items():
            tensors[f"{layer}.weight"], tensors[f"{layer}.bias"] = found.weight.cpu(), found.bias.cpu()
        losses = {str(k): v for k, v in self.losses.items()}
        config = {
            "base_model_name_or_path": self.metadata.get("name", ""),
            "d_model": len(next(iter(self.translators.values())).bias),
            "num_hidden_layers": len(self.translators),
            "bias": True,
            "lens_type": "linear_tuned_lens",
            "hookgraph": {"metadata": dict(self.metadata), "losses": losses},
        }
        try:
            place.mkdir(parents=True, exist_ok=True)
            torch.save(tensors, place / "params.pt")
            (place / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        except OSError as error:
            raise LoadError(f"cannot save a tuned lens to {str(folder)!r}: {error}") from error

    @staticmethod
    def load(path: str | Path) -> "TunedLens":
        """Read a published lens, or what `save` wrote: the folder, or its `.pt` or `.safetensors` file.

        Raises:
            LoadError: the file is missing, damaged, or no tuned lens.
        """
        place = Path(path)
        file = place / "params.pt" if place.is_dir() else place
        tensors = read_weights(file)
        layers = sorted(int(x.removesuffix(".weight")) for x in tensors if re.fullmatch(r"\d+\.weight", x))
        if not layers:
            raise LoadError(f"{file}: expected tensors 0.weight, 0.bias, ..., found {', '.join(tensors)}")
        found = {i: _translation(file, tensors[f"{i}.weight"], tensors[f"{i}.bias"]) for i in layers}
        config = file.parent / "config.json"
        about = read_settings(config) if config.is_file() else {}
        own = about.get("hookgraph", {})
        metadata = own.get("metadata", {"name": str(about.get("base_model_name_or_path", ""))})
        return TunedLens(found, {int(k): v for k, v in own.get("losses", {}).items()}, metadata)


def _translation(file: Path, weight: Tensor, bias: Tensor) -> Translation:
    """A translator of a file.

    Raises:
        LoadError: not a square matrix and a vector of its width.
    """
    if weight.ndim != 2 or weight.shape != (*bias.shape, *bias.shape):
        raise LoadError(
            f"{file}: expected translators of one width, found {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    return Translation(weight, bias)


def _repeatedly(batches: Iterable[Inputs], epochs: int) -> Iterator[Inputs]:
    """The batches, as often as there are epochs.

    Raises:
        InputError: they can be gone through once only, or are a single one.
    """
    for epoch in range(epochs):
        count = 0
        for batch in stream_of(batches):
            yield batch
            count += 1
        if epoch and not count:
            raise InputError(
                f"there are no batches left for epoch {epoch + 1} of {epochs}: pass a list, or anything else "
                "that can be gone through again"
            )


def _zeros(states: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor]:
    """A translator that changes nothing, in no less than single precision."""
    width, dtype = states.shape[-1], torch.promote_types(states.dtype, torch.float32)
    weight, bias = (states.new_zeros(shape, dtype=dtype) for shape in ((width, width), (width,)))
    return weight.requires_grad_(), bias.requires_grad_()


def _descend(
    graph: HookGraph, inputs: Prepared, run: Run, place: Location, pair: tuple[Tensor, Tensor]
) -> float:
    """The mean KL of one layer, whose gradient is left at its translator."""
    h, final = run[place].detach(), run[LOGITS].detach().log_softmax(-1)
    kept = real_tokens(inputs, h)
    with torch.enable_grad():
        logits = decoded(graph, inputs, Translation(*pair)(h))
        divergence = (final.exp() * (final - logits.log_softmax(-1))).sum(-1)[kept].sum()
        gradients = torch.autograd.grad(divergence, pair)
    count = summed(kept.sum().to(divergence))
    for part, gradient in zip(pair, gradients, strict=True):
        part.grad = summed(gradient) / count
    return float(summed(divergence.detach()) / count)
