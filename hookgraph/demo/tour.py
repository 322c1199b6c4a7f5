"""Every algorithm once, on the embedded model: what it is asked, what it answers, and a figure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from rich.console import Console
from rich.text import Text

import hookgraph.algorithms as hga
from hookgraph.algorithms.batches import Batch
from hookgraph.algorithms.metrics import LogitDifference, logit_diff
from hookgraph.demo import load_dictionaries
from hookgraph.demo.grammar import Pair, ioi_pairs
from hookgraph.demo.story import SEED, STORY, Speaker
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.ontology.transformer import ATTN_Z, MLP_OUT, RESID_POST
from hookgraph.report import page
from hookgraph.report.figures import Picture, png
from hookgraph.report.page import Page, Section
from hookgraph.subgraphs import AutoencoderGraph

if TYPE_CHECKING:
    import matplotlib.figure

Drawn = Callable[[], "matplotlib.figure.Figure"]


@final
@dataclass(frozen=True, eq=False)
class Guide:
    """What the algorithms are shown on: one pair, and more pairs of the same sentence.

    Args:
        speaker: the model.
        count: how many pairs.
        effort: a number that budgets are multiplied by.
    """

    speaker: Speaker
    count: int = 32
    effort: float = 1.0

    @property
    def graph(self) -> HookGraph:
        """The hooked model."""
        return self.speaker.graph

    @cached_property
    def pairs(self) -> list[Pair]:
        """Pairs of one template, so that positions agree."""
        return ioi_pairs(self.count, SEED, template=0)

    @property
    def clean(self) -> list[str]:
        """Their prompts with the behaviour."""
        return [p.text for p in self.pairs]

    @property
    def corrupt(self) -> list[str]:
        """And those without."""
        return [p.corrupt for p in self.pairs]

    @cached_property
    def metric(self) -> LogitDifference:
        """logit(answer) - logit(wrong) of each pair."""
        return self._metric(self.pairs)

    @cached_property
    def story(self) -> LogitDifference:
        """The same of the one pair."""
        return self._metric([STORY])

    @property
    def batch(self) -> list[Batch]:
        """All pairs as a stream of one batch."""
        return [(self.clean, self.corrupt, self.metric)]

    def tokens(self, text: str = STORY.text) -> list[str]:
        """The tokens of a text."""
        ids = self.speaker.tokenizer(text)["input_ids"]
        return [str(self.speaker.tokenizer.convert_ids_to_tokens(i)) for i in ids]

    def budget(self, number: int) -> int:
        """A number of tries or steps, as the effort allows."""
        return max(2, round(self.effort * number))

    def _metric(self, pairs: Sequence[Pair]) -> LogitDifference:
        ids = [[self.speaker.ids([getattr(p, name)])[0] for p in pairs] for name in ("answer", "wrong")]
        return logit_diff(*ids)


@final
@dataclass(frozen=True, eq=False)
class Answer:
    """What an algorithm found: a table as text, and how to draw it."""

    text: str
    plot: Drawn


@final
@dataclass(frozen=True, eq=False)
class Stop:
    """One algorithm.

    Args:
        name: of its files.
        shows: the functions that it shows.
        question: what it is asked.
        run: asks it.
    """

    name: str
    shows: tuple[str, ...]
    question: str
    run: Callable[[Guide], Answer]


def _attribution(guide: Guide) -> Answer:
    graph = guide.graph
    found = hga.patching_effect(
        graph, guide.clean, guide.corrupt, guide.metric, graph.every(ATTN_Z), "ig", steps=guide.budget(10)
    )
    heads = found.mean("batch").sum("pos", "d_head")
    return Answer(repr(heads.check(8)), heads.plot)


def _sweep(guide: Guide) -> Answer:
    graph, tokens = guide.graph, guide.tokens()
    found = hga.activation_patching(
        graph, STORY.text, STORY.corrupt, guide.story, graph.every(RESID_POST), direction="denoising"
    ).mean("batch")
    return Answer(repr(found), lambda: found.plot({"pos": tokens}))


def _paths(guide: Guide) -> Answer:
    graph = guide.graph
    last = graph.every(RESID_POST)[-1]
    found = hga.path_patching(
        graph, guide.clean, guide.corrupt, guide.metric, graph.every(ATTN_Z), [last], over=["head"]
    ).mean("batch")
    return Answer(repr(found), found.plot)


def _means(guide: Guide) -> Answer:
    graph, heads = guide.graph, guide.graph.every(ATTN_Z)
    means = hga.mean_activations(graph, [guide.clean], heads, per_position=True)
    found = hga.patching_effect(
        graph, guide.clean, None, guide.metric, heads, "exact", joint=["pos", "d_head"], statistics=means
    ).mean("batch")
    return Answer(repr(found), found.plot)


def _tracing(guide: Guide) -> Answer:
    names = [i for i, token in enumerate(guide.tokens()) if token in (STORY.answer, STORY.wrong)]
    found = hga.causal_tracing(
        guide.graph, STORY.text, guide.story, names, guide.graph.every(RESID_POST), samples=guide.budget(10)
    )
    return Answer(repr(found), found.plot)


def _direct(guide: Guide) -> Answer:
    ids = guide.speaker.ids([STORY.answer, STORY.wrong])
    found = hga.direct_logit_attribution(guide.graph, STORY.text, *ids, by="head")
    return Answer(repr(found), found.plot)


def _lens(guide: Guide) -> Answer:
    found = hga.logit_lens(guide.graph, STORY.text)
    return Answer(repr(found), found.plot)


def _tuned_lens(guide: Guide) -> Answer:
    lens = hga.TunedLens.fit(guide.graph, [guide.clean] * guide.budget(20), progress=False)
    found = hga.logit_lens(guide.graph, STORY.text, lens=lens)
    return Answer(repr(found), found.plot)


def _basis(guide: Guide) -> Answer:
    found = hga.causal_basis(
        guide.graph, guide.clean[:4], RESID_POST[1], guide.budget(3), max_iter=guide.budget(200)
    )
    return Answer(repr(found), found.plot)


def _alignment(guide: Guide) -> Answer:
    found = hga.stimulus_response(guide.graph, guide.clean[:8])
    return Answer(repr(found), found.plot)


def _contributions(guide: Guide) -> Answer:
    found = hga.contributions(guide.graph, STORY.text)
    return Answer(repr(found), lambda: found.plot(-1, 0.04))


def _profile(guide: Guide) -> Answer:
    graph = guide.graph
    found = hga.path_profile(
        graph,
        STORY.text,
        STORY.corrupt,
        guide.story,
        graph.every(ATTN_Z)[:1],
        guide.budget(50),
        over=["head"],
    )
    return Answer(repr(found), found.plot)


def _counterfactuals(guide: Guide) -> Answer:
    found = hga.counterfactuals(
        guide.graph, STORY.text, guide.story, [ATTN_Z[0].at(head=1)], tries=guide.budget(256)
    )
    return Answer(repr(found), found.plot)


def _circuit(guide: Guide) -> Answer:
    graph, coders = _spliced(guide)
    threshold = 0.02 / guide.effort
    found = hga.discover_circuit(
        graph, guide.batch, None, coders, node_threshold=threshold, steps=guide.budget(5), progress=False
    )
    measured = hga.faithfulness(graph, found, guide.batch, None, progress=False)
    return Answer(f"{found!r}\n\n{measured!r}", lambda: found.plot(60))


def _sizes(guide: Guide) -> Answer:
    graph, coders = _spliced(guide)
    every = hga.discover_circuit(
        graph, guide.batch, None, coders, node_threshold=0.0, edge_threshold=inf, steps=guide.budget(5)
    )
    found = hga.size_curve(graph, every, guide.batch, None, random=1, progress=False)
    return Answer(repr(found), found.plot)


def _edges(guide: Guide) -> Answer:
    graph = guide.graph
    scores = hga.edge_attribution(graph, guide.batch, None, "eap-ig-inputs", steps=guide.budget(5))
    found = scores.circuit(40, "greedy")
    return Answer(repr(found), found.plot)


def _curves(guide: Guide) -> Answer:
    graph = guide.graph
    scores = hga.edge_attribution(graph, guide.batch, None)
    shares = (0.002, 0.01, 0.05, 0.2, 1.0)
    found = [
        f(graph, scores, guide.batch, None, fractions=shares, progress=False) for f in (hga.cpr, hga.cmd)
    ]
    return Answer("\n\n".join(map(repr, found)), found[1].plot)


def _spliced(guide: Guide) -> tuple[HookGraph, list[AutoencoderGraph]]:
    coders = [AutoencoderGraph(c, x) for x, c in load_dictionaries().items() if x.type == MLP_OUT]
    return guide.graph.inject(*coders), coders


STOPS: Final = (
    Stop("attribution", ("patching_effect",), "Which heads carry the answer?", _attribution),
    Stop("sweep", ("activation_patching",), "At which token does the answer stand, layer by layer?", _sweep),
    Stop("paths", ("path_patching",), "Which heads act on the logits directly?", _paths),
    Stop(
        "means", ("mean_activations",), "Which heads are missed if each says what it says on average?", _means
    ),
    Stop("tracing", ("causal_tracing",), "Where are the names remembered when noise hides them?", _tracing),
    Stop("direct", ("direct_logit_attribution",), "What does each head write into the answer?", _direct),
    Stop("lens", ("logit_lens",), "What would the model say after each layer?", _lens),
    Stop("tuned-lens", ("TunedLens",), "And read by a lens that is fitted?", _tuned_lens),
    Stop("basis", ("causal_basis",), "Without which directions does the model say something else?", _basis),
    Stop("alignment", ("stimulus_response",), "Does the lens read what later layers read?", _alignment),
    Stop("contributions", ("contributions",), "Which tokens is the last position made of?", _contributions),
    Stop("profile", ("path_profile",), "How does each head act between the two prompts?", _profile),
    Stop("counterfactuals", ("counterfactuals",), "Which other words change the answer?", _counterfactuals),
    Stop("circuit", ("discover_circuit", "faithfulness"), "Which latents act on which?", _circuit),
    Stop("sizes", ("size_curve",), "How many latents does it take?", _sizes),
    Stop("edges", ("edge_attribution",), "Which heads and MLPs act on which?", _edges),
    Stop("curves", ("cpr", "cmd"), "How many of these edges does it take?", _curves),
)


def tour(console: Console, guide: Guide, out: Path, card: str = "", stops: Sequence[Stop] = STOPS) -> Path:
    """Ask every question, print the answers, and write a figure for each and a page of all to a folder.

    Raises:
        HookGraphError: matplotlib is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = []
    for stop in stops:
        console.rule(stop.question, align="left")
        answer = stop.run(guide)
        console.print(Text(f"{', '.join(stop.shows)}\n{answer.text}\n"))
        picture = _picture(answer.plot, stop)
        (out / f"{stop.name}.png").write_bytes(picture.light)
        pieces = (
            page.picture(picture, ", ".join(stop.shows)),
            page.folded("numbers", page.verbatim(answer.text)),
        )
        sections.append(Section(stop.question, pieces))
    path = Page("Every algorithm, on one small model", card, tuple(sections)).write(out / "algorithms.html")
    console.rule("Written", align="left")
    console.print(Text(f"{path}\nand a figure for each beside it"))
    return path


def _picture(plot: Drawn, stop: Stop) -> Picture:
    """The figure of an algorithm, the same for light and dark surroundings."""
    figure = plot()
    image, width = png(figure), float(figure.get_size_inches()[0])
    from matplotlib import pyplot

    pyplot.close(figure)
    return Picture(image, image, width, stop.question)
