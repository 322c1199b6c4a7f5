"""`contributions`: how much each token, head, MLP and the stream itself contribute to the stream."""

from collections.abc import Iterator

from torch import Tensor

from hookgraph.algorithms.flow.dividing import Shares, Stage, divided, stages
from hookgraph.algorithms.flow.results import Contributions
from hookgraph.algorithms.flow.writing import interior
from hookgraph.algorithms.padding import real_tokens
from hookgraph.algorithms.progress import Progress
from hookgraph.algorithms.proximity import Number, check_norm
from hookgraph.algorithms.streams import last_residual
from hookgraph.errors import HookGraphError
from hookgraph.graph.abstract import Inputs, Prepared
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.ontology.locations import Location
from hookgraph.ontology.transformer import RESID_PRE


def contributions(
    graph: HookGraph,
    inputs: Inputs,
    norm: Number = 1,
    threshold: Number | None = None,
    *,
    heads: bool = True,
    neurons: bool = False,
    progress: bool | None = None,
) -> Contributions:
    """What each part of a sum of the residual stream contributes to it, in every layer.

    The whole w is the stream after an update, Σ parts: the stream before it; of attention
    pattern[h, q, k] · v[k, h] W_O[h] for every key and head; of the MLP the whole, or a vector for each
    neuron; the bias of a projection that is divided. The norm and the multiplier after a projection are
    applied to every part. With z = max(‖w‖ - ‖w - part‖, 0) a part contributes z / Σ z.

    Where a layer adds attention and MLP at once, there is one whole with all of these parts.

    Args:
        graph: the hooked model.
        inputs: what is run.
        norm: q of the norm: 1, as published; 2, which is faster; or any other from 1 to infinity.
        threshold: drop parts that contribute no more than this, and scale the others to a sum of 1.
        heads: whether attention is divided by key and head, or is one part.
        neurons: whether MLPs are divided by neuron.
        progress: whether to show a progress bar; by default on a terminal, if it takes long.

    Raises:
        HookGraphError: the norm is none, the stream of a layer is not the sum of its updates, or an
            update is not what its projection returns, up to a scale.
        UnknownLocationError: the model has no residual stream.

    Source: Ferrando and Voita, "Information Flow Routes", arXiv:2403.00824.
    """
    check_norm(norm)
    last = last_residual(graph)
    prepared = graph.binding.prepare(inputs)
    layers = sorted({x.layer for x in graph.every(last.type) if x.layer is not None})
    plan = {layer: list(stages(graph, layer)) for layer in layers}
    empty = [layer for layer, found in plan.items() if not found]
    if empty:
        raise HookGraphError(
            f"layer {empty[0]} has no sum of the stream and its updates that are locations: "
            "see graph.report for what is absent, and why"
        )
    wanted = {layer: _wanted(graph, found, heads=heads, neurons=neurons) for layer, found in plan.items()}
    shares: list[tuple[Shares, ...]] = []
    with Progress("contributions", len(layers), shown=progress) as bar:
        for layer, run in _layer_by_layer(graph, prepared, wanted):
            real = real_tokens(prepared, run[last.type[layer]])
            found = (divided(graph, run, x, real, norm, heads=heads, neurons=neurons) for x in plan[layer])
            shares.append(tuple(x if threshold is None else x.threshold(threshold) for x in found))
            bar.advance()
    whole = shares[0][0].residual
    ids = prepared.get("input_ids")
    tokens = ids if isinstance(ids, Tensor) and ids.shape == whole.shape else None
    names = {} if tokens is None else graph.binding.token_texts(tokens.unique().tolist())
    real = real_tokens(prepared, whole)
    return Contributions(tuple(shares), norm, threshold, real, tokens, graph.binding.metadata, names)


def _wanted(graph: HookGraph, found: list[Stage], *, heads: bool, neurons: bool) -> list[Location]:
    """What the sums of a layer are divided from, each once."""
    seen: dict[Location, None] = {}
    for stage in found:
        inside = [y for x in stage.added for y in interior(graph, x, heads=heads, neurons=neurons)]
        seen.update(dict.fromkeys([stage.before, *inside, *stage.added, stage.whole]))
    return list(seen)


def _layer_by_layer(
    graph: HookGraph, inputs: Prepared, wanted: dict[int, list[Location]]
) -> Iterator[tuple[int, Run]]:
    """Runs that saved what is wanted of each layer: each executes one layer only, if replays can start there.

    So that the patterns of one layer are held at a time.
    """
    layers = list(wanted)
    starts = [RESID_PRE[layer] for layer in layers]
    known = set(graph.locations)
    if any(x not in known or graph.entry(x) != x for x in starts):
        run = graph.run(inputs, save=list(dict.fromkeys(x for found in wanted.values() for x in found)))
        yield from ((layer, run) for layer in layers)
        return
    first = graph.run(inputs, save=[starts[0]])
    value = first[starts[0]]
    for layer, start, after in zip(layers, starts, [*starts[1:], None], strict=True):
        save = wanted[layer] if after is None else [*wanted[layer], after]
        run = graph.replay(first, start, value=value, save=save)
        yield layer, run
        value = value if after is None else run[after]
